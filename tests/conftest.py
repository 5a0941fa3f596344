"""Small random models and rollouts; nothing is downloaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run in its interpreter, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))  # tests import `reference` and each other's helpers by name

from rlvr_lightning import heap
from rlvr_lightning.schema import Rollouts

torch.set_num_threads(1)  # two threads on busy cores wait for each other


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers, and none of the buffers that a test before may have left."""
    torch.manual_seed(0)
    heap._buffers.__dict__.clear()


def tiny_causal_lm(kind: str = "qwen3", **overrides):
    """A random two-layer model with grouped query attention, vocabulary 17."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        sizes |= {"vocab_size": 17, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(**sizes | overrides))
    sizes = {
        "vocab_size": 17,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes | overrides))
    return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **sizes | overrides))


def random_rollouts(prompt_lengths=(5, 2), group: int = 3, width: int = 7, vocab: int = 17) -> Rollouts:
    """Rollouts with completions of every length from 1 to `width`, at random."""
    rows = len(prompt_lengths) * group
    lengths = torch.randint(1, width + 1, (rows,))
    lengths[0] = width
    mask = torch.arange(width) < lengths[:, None]
    return Rollouts(
        prompt_ids=[torch.randint(0, vocab, (n,)).tolist() for n in prompt_lengths],
        completion_ids=torch.randint(0, vocab, (rows, width)) * mask,
        completion_mask=mask,
        rollout_logprobs=-torch.rand(rows, width) * mask,
        truncated=torch.zeros(rows, dtype=torch.bool),
    )
