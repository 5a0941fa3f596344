"""Parameters in closed form: those of transformers' modules, tensor by tensor."""

from __future__ import annotations

import json
from collections import Counter
from math import prod

import pytest
import torch

from rlvr_lightning.profiling.parameters import ARCHITECTURES, UnknownArchitecture, count, named, parameters

SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 28,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts": 5, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 8}
LOCAL = {"num_local_experts": 5, "intermediate_size_mlp": 30, "interleave_moe_layer_step": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 6, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 7}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 1}
OWN = {
    "gpt2": {"vocab_size": 97, "n_embd": 20, "n_head": 4, "n_layer": 3, "n_positions": 31},
    "opt": {
        "vocab_size": 97,
        "hidden_size": 20,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "ffn_dim": 28,
        "word_embed_proj_dim": 12,
        "max_position_embeddings": 31,
        "do_layer_norm_before": True,
    },
    "qwen2_moe": SIZES | EXPERTS | {"decoder_sparse_step": 2},
    "qwen3_moe": SIZES | {"head_dim": 6} | EXPERTS | {"mlp_only_layers": [0]},
    "mixtral": SIZES | LOCAL,
    "llama4_text": SIZES | LOCAL,
    "deepseek_v2": SIZES | LATENT | ROUTED | {"n_group": 1, "topk_group": 1},
    "deepseek_v3": SIZES | LATENT | ROUTED | {"n_group": 1, "topk_group": 1, "q_lora_rank": None},
}
TIES = ({}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False})
PUBLISHED = {  # as their makers or the model hub count them
    "gpt2": 124_439_808,
    "smollm2-135m": 134_515_008,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-70b": 70_553_706_496,
    "mixtral-8x7b": 46_702_792_704,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "deepseek-v3": 671_026_404_352,
}


def module(config: dict[str, object]) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(str(config["model_type"]), **settings))


def shapes(config: dict[str, object]) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for parameter in parameters(config):
        found[parameter.shape] += parameter.copies
    return found


@pytest.mark.parametrize("tie", TIES, ids=["default", "tied", "untied"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_tensor_of_the_module(kind: str, tie: dict[str, bool]) -> None:
    config = {"model_type": kind, **OWN.get(kind, SIZES), **TOKENS, **tie}
    assert shapes(config) == Counter(tuple(p.shape) for p in module(config).parameters())


def test_what_saved_configs_hold() -> None:
    """`save_pretrained` spells out every setting, also those that are left out here."""
    from transformers import AutoConfig

    for kind in ("llama", "qwen3", "gemma2", "llama4_text", "deepseek_v3"):
        config = {**OWN.get(kind, SIZES), **TOKENS}
        assert count(AutoConfig.for_model(kind, **config).to_dict()) == count({"model_type": kind, **config})


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_biases(bias: str) -> None:
    config = {"model_type": "llama", **SIZES, bias: True}
    assert shapes(config) == Counter(tuple(p.shape) for p in module(config).parameters())


def test_well_known_models_have_their_published_size() -> None:
    models = named()
    assert len(models) >= 35
    for name, number in PUBLISHED.items():
        assert count(models[name]) == number, name


@pytest.mark.parametrize("name", ["opt-125m", "qwen3-1.7b", "gemma-3-1b", "llama-3.2-1b", "deepseek-v2-lite"])
def test_well_known_models_are_their_modules(name: str) -> None:
    config = dict(named()[name])
    layers = {"num_hidden_layers": 2}  # the shapes of one layer are those of all
    assert count(config | layers) == sum(p.numel() for p in module(config | layers).parameters())


def test_text_part_and_errors() -> None:
    text = {"model_type": "llama", **SIZES}
    assert count({"model_type": "llava", "text_config": text}) == count(text)
    assert sum(prod(p.shape) * p.copies for p in parameters(text)) == count(text)
    with pytest.raises(UnknownArchitecture, match="'mamba'"):
        count({"model_type": "mamba"})
    with pytest.raises(ValueError, match="'vocab_size'"):
        count({name: size for name, size in text.items() if name != "vocab_size"})
    with pytest.raises(ValueError, match=r"hidden_size.*'x'"):
        count(text | {"hidden_size": "x"})
    assert json.dumps(named()["gpt2"])
