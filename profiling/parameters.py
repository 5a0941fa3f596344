"""The parameters of a causal LM, tensor by tensor, from its Hugging Face config alone: arithmetic, no torch.

Shapes are those of transformers' modules (experts fused, as it keeps them), so counts are exact; the tests hold them
against the modules on the meta device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]
COUNTED = "counted parameters"
"""Where a config holds the parameters of its module, of an architecture not known here (see `find_model`)."""


@dataclass(frozen=True)
class Parameter:
    """Some tensors of one shape, one in each of `copies` like modules."""

    name: str
    """Within its unit."""
    shape: tuple[int, ...]
    unit: str
    """`layers` (decoder layers, the units of sharding), `dense layers` where others are mixtures, or `rest`."""
    copies: int = 1
    """Units that have one."""

    @property
    def numel(self) -> int:
        """Entries of all copies."""
        return prod(self.shape) * self.copies


class UnknownArchitecture(ValueError):
    """The config's `model_type` is not among those whose shapes are known here."""


def parameters(config: Config) -> list[Parameter]:
    """All parameters; tied ones once.

    Args:
        config: what `config.json` holds; of a model of text and more, its text part is taken.

    Raises:
        UnknownArchitecture: see there.
        ValueError: a size is missing, or is not one.

    Example:
        >>> sizes = {"hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 5}
        >>> llama = {"model_type": "llama", "vocab_size": 7, "tie_word_embeddings": True, **sizes}
        >>> sum(p.numel for p in parameters(llama))  # 7*4 + 3 * (4*4*4 + 3*4*5 + 2*4) + 4
        428
    """
    config = config.get("text_config") or config
    kind = config.get("model_type")
    if COUNTED in config:
        return list(config[COUNTED])
    if kind not in ARCHITECTURES:
        raise UnknownArchitecture(f"model: the shapes of {kind!r} models are not known here")
    for name in SIZES:
        value = config.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"model: {name} must be a whole number above 0, got {value!r}")
    try:
        return list(ARCHITECTURES[kind](config))
    except KeyError as error:
        raise ValueError(f"model: its config has no {error.args[0]!r}") from None


def count(config: Config) -> int:
    """Entries of all parameters."""
    return sum(p.numel for p in parameters(config))


def named() -> dict[str, dict[str, Any]]:
    """The configs of well-known models, packaged: by name, only what decides shapes."""
    found: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "models.json").read_text())
    return found


def _layers(kinds: Mapping[str, tuple[int, ...]], copies: int, unit: str = "layers") -> Iterator[Parameter]:
    if copies:
        yield from (Parameter(name, shape, unit, copies) for name, shape in kinds.items())


def _rest(config: Config, *norms: str) -> Iterator[Parameter]:
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    yield Parameter("embed_tokens", (vocab, hidden), "rest")
    for norm in norms or ("norm",):
        yield Parameter(norm, (hidden,), "rest")
    if not config.get("tie_word_embeddings", TIED.get(config["model_type"], False)):
        yield Parameter("lm_head", (vocab, hidden), "rest")


def _linear(name: str, out: int, into: int, bias: Any = False) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def _attention(config: Config) -> dict[str, tuple[int, ...]]:
    """Grouped-query attention, with the biases and norms of its family."""
    kind, hidden, heads = config["model_type"], config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or HEAD_DIM.get(kind) or hidden // heads
    keys = config.get("num_key_value_heads") or heads
    all_bias = config.get("attention_bias", False)
    bias = all_bias or kind in ("qwen2", "qwen2_moe")
    found = _linear("q_proj", heads * size, hidden, bias)
    found |= _linear("k_proj", keys * size, hidden, bias) | _linear("v_proj", keys * size, hidden, bias)
    found |= _linear("o_proj", hidden, heads * size, all_bias)
    if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
        found |= {"q_norm": (size,), "k_norm": (size,)}
    return found


def _mlp(config: Config, size: int, name: str = "mlp") -> dict[str, tuple[int, ...]]:
    hidden, bias = config["hidden_size"], config.get("mlp_bias", False)
    found = _linear(f"{name}.gate_proj", size, hidden, bias) | _linear(f"{name}.up_proj", size, hidden, bias)
    return found | _linear(f"{name}.down_proj", hidden, size, bias)


def _norms(config: Config) -> dict[str, tuple[int, ...]]:
    four = config["model_type"] in ("gemma2", "gemma3_text")
    return {f"norm_{k}": (config["hidden_size"],) for k in range(4 if four else 2)}


def _experts(config: Config, number: int, size: int) -> dict[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    up, down = (number, 2 * size, hidden), (number, hidden, size)
    if config["model_type"] == "llama4_text":  # keeps them the other way round
        up, down = (number, hidden, 2 * size), (number, size, hidden)
    return {"router": (number, hidden), "experts.gate_up_proj": up, "experts.down_proj": down}


def dense(config: Config) -> Iterator[Parameter]:
    """Llama and what is built like it."""
    layer = _attention(config) | _mlp(config, config["intermediate_size"]) | _norms(config)
    yield from _layers(layer, config["num_hidden_layers"])
    yield from _rest(config)


def mixtral(config: Config) -> Iterator[Parameter]:
    """Every layer a mixture."""
    experts = _experts(config, config["num_local_experts"], config["intermediate_size"])
    yield from _layers(_attention(config) | experts | _norms(config), config["num_hidden_layers"])
    yield from _rest(config)


def qwen_moe(config: Config) -> Iterator[Parameter]:
    """Some layers mixtures (Qwen2 with a shared expert)."""
    common, total = _attention(config) | _norms(config), config["num_hidden_layers"]
    step, excepted = config.get("decoder_sparse_step", 1), set(config.get("mlp_only_layers") or ())
    mixed = sum(layer not in excepted and (layer + 1) % step == 0 for layer in range(total))
    number = config["num_local_experts"] if "num_local_experts" in config else config["num_experts"]
    experts = _experts(config, number, config["moe_intermediate_size"])
    if config["model_type"] == "qwen2_moe":
        experts |= _mlp(config, config["shared_expert_intermediate_size"], "shared_expert")
        experts |= {"shared_expert_gate": (1, config["hidden_size"])}
    yield from _layers(common | experts, mixed)
    yield from _layers(common | _mlp(config, config["intermediate_size"]), total - mixed, "dense layers")
    yield from _rest(config)


def llama4(config: Config) -> Iterator[Parameter]:
    """Every layer, or every second, a mixture with a shared expert."""
    common, total = _attention(config) | _norms(config), config["num_hidden_layers"]
    step = config.get("interleave_moe_layer_step", 1)
    layers = config.get("moe_layers")
    mixed = len(layers) if layers is not None else len(range(step - 1, total, step))
    experts = _experts(config, config["num_local_experts"], config["intermediate_size"])
    experts |= _mlp(config, config["intermediate_size"], "shared_expert")
    yield from _layers(common | experts, mixed)
    yield from _layers(common | _mlp(config, config["intermediate_size_mlp"]), total - mixed, "dense layers")
    yield from _rest(config)


def deepseek(config: Config) -> Iterator[Parameter]:
    """Latent attention; after the first layers mixtures with shared experts."""
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    bias, rank = config.get("attention_bias", False), config.get("q_lora_rank")
    if rank:
        attention = _linear("q_a_proj", rank, hidden, bias) | {"q_a_norm": (rank,)}
        attention |= _linear("q_b_proj", heads * (nope + rope), rank)
    else:
        attention = _linear("q_proj", heads * (nope + rope), hidden)
    attention |= _linear("kv_a_proj", latent + rope, hidden, bias) | {"kv_a_norm": (latent,)}
    attention |= _linear("kv_b_proj", heads * (nope + value), latent) | _linear("o_proj", hidden, heads * value, bias)
    common, first = attention | _norms(config), config.get("first_k_dense_replace", 0)
    experts = _experts(config, config["n_routed_experts"], config["moe_intermediate_size"])
    shared = config["moe_intermediate_size"] * config["n_shared_experts"]
    yield from _layers(common | _mlp(config, config["intermediate_size"]), first, "dense layers")
    yield from _layers(common | experts | _mlp(config, shared, "shared_experts"), config["num_hidden_layers"] - first)
    yield from _rest(config)


def gpt2(config: Config) -> Iterator[Parameter]:
    """GPT-2: learned positions, biases everywhere."""
    hidden = config["n_embd"]
    inner = config.get("n_inner") or 4 * hidden
    layer: dict[str, tuple[int, ...]] = {}
    for name, out, into in (
        ("c_attn", 3 * hidden, hidden),
        ("c_proj", hidden, hidden),
        ("c_fc", inner, hidden),
        ("mlp.c_proj", hidden, inner),
    ):
        layer |= {f"{name}.weight": (into, out), f"{name}.bias": (out,)}
    layer |= {f"{norm}.{part}": (hidden,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    yield from _layers(layer, config["n_layer"])
    yield Parameter("wpe", (config["n_positions"], hidden), "rest")
    yield from _rest({**config, "hidden_size": hidden}, "ln_f.weight", "ln_f.bias")


def opt(config: Config) -> Iterator[Parameter]:
    """OPT: learned positions, two more than it says; some with an embedding of another width."""
    hidden, size, bias = config["hidden_size"], config["ffn_dim"], config.get("enable_bias", True)
    width = config.get("word_embed_proj_dim") or hidden
    layer: dict[str, tuple[int, ...]] = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= _linear(name, hidden, hidden, bias)
    layer |= _linear("fc1", size, hidden, bias) | _linear("fc2", hidden, size, bias)
    layer |= {f"{norm}.{part}": (hidden,) for norm in ("norm_1", "norm_2") for part in ("weight", "bias")}
    yield from _layers(layer, config["num_hidden_layers"])
    yield Parameter("embed_positions", (config["max_position_embeddings"] + 2, hidden), "rest")
    yield Parameter("embed_tokens", (config["vocab_size"], width), "rest")
    if not config.get("tie_word_embeddings", True):
        yield Parameter("lm_head", (config["vocab_size"], width), "rest")
    if width != hidden:
        yield Parameter("project_in", (hidden, width), "rest")
        yield Parameter("project_out", (width, hidden), "rest")
    if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False):
        yield Parameter("final_norm.weight", (hidden,), "rest")
        yield Parameter("final_norm.bias", (hidden,), "rest")


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "n_embd"),
    *("num_hidden_layers", "n_layer", "num_attention_heads", "num_key_value_heads", "n_head"),
    *("num_experts", "num_local_experts"),
)
"""Settings that must be sizes."""
TIED = {"gpt2": True, "opt": True, "gemma": True, "gemma2": True, "gemma3_text": True, "smollm3": True}
"""Whether the output layer is the embedding where the config does not say."""
HEAD_DIM = {"gemma": 256, "gemma2": 256, "gemma3_text": 256, "qwen3": 128, "llama4_text": 128}
"""Where the config does not say and it is not hidden_size / heads."""
ARCHITECTURES: dict[str, Callable[[Config], Iterator[Parameter]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"), dense),
    "mixtral": mixtral,
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), qwen_moe),
    "llama4_text": llama4,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), deepseek),
    "gpt2": gpt2,
    "opt": opt,
}
