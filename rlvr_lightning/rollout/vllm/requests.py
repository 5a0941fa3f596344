"""What is asked of vLLM and what it answers, the same in both modes; its options, without importing it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlvr_lightning.rollout.vllm.settings import VLLM
from rlvr_lightning.schema import Sampling

CPU_KV_GIB = 0.25
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Request:
    """Some completions of a prompt to sample; the k-th has the seed `seed + k`, as vLLM counts."""

    prompt: Sequence[int]
    num: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """A completion that was sampled."""

    tokens: list[int]
    logprobs: list[float]
    stopped: bool
    """By a stop token, not by the limit."""
    versions: tuple[str, ...] = ()
    """Of the weights that it was sampled with, where the engine says so."""


def engine_options(
    settings: VLLM, folder: str, dtype: torch.dtype, max_len: int, device: torch.device, lora_rank: int = 0
) -> dict[str, Any]:
    """Arguments of vLLM, the same for both modes: empty weights, which are sent from the policy.

    Args:
        settings: how it runs.
        folder: of the model's config, or its name on the hub.
        dtype: of weights and arithmetic.
        max_len: of prompt and completion.
        device: cpu or cuda.
        lora_rank: of adapters; 0 for none.
    """
    cpu = device.type == "cpu"
    kv_gib = settings.kv_cache_gib or (CPU_KV_GIB if cpu else None)
    options: dict[str, Any] = {
        "model": folder,
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_len,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # the model's own defaults for sampling are not ours
        "enforce_eager": settings.eager or cpu,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is drawn from
        "worker_extension_cls": "rlvr_lightning.rollout.vllm.worker.Extension",
        "weight_transfer_config": {"backend": "rlvr_lightning"},
    }
    options |= {"kv_cache_memory_bytes": int(kv_gib * 2**30)} if kv_gib else {}
    if lora_rank:  # two of them for a moment, when one takes the place of the other
        rank = next(each for each in LORA_RANKS if each >= lora_rank)
        options |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 2}
    if not cpu:
        return options | {"gpu_memory_utilization": settings.memory_frac}
    # On a CPU a prompt read in pieces breaks seeded sampling: "CPU Generator does not use offset".
    return options | {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_len)}


def sampling_options(sampling: Sampling, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams."""
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop_token_ids": list(stop_token_ids),
        "ignore_eos": True,  # the stop tokens name it if it is to stop
        "logprobs": 0,  # the sampled token's
        "detokenize": False,
    }


def memory_folder() -> Path | None:
    """Where files are kept in memory, if the system has such a place."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else None


def one_line(text: str) -> str:
    """The end of a text, without line breaks."""
    return " ".join(text.split())[-1200:]


def remedy(told: str) -> str:
    """What to do about an error of vLLM, as far as that is known.

    >>> remedy("ValueError: No available memory for the cache blocks.")
    '; raise rollout.kv_cache_gib or rollout.memory_frac, or lower sampling.max_tokens'
    """
    if any(sign in told.lower() for sign in ("kv cache", "cache blocks", "free memory")):
        return "; raise rollout.kv_cache_gib or rollout.memory_frac, or lower sampling.max_tokens"
    return ""
