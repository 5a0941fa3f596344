"""What a forward pass keeps for the backward pass, and the temporaries around it, in closed form.

Derived from what autograd saves in transformers' layers of the Llama family, tensor by tensor; exact for these (the
tests count). For others (mixtures, latent attention, GPT-2, OPT, Gemma) it is an estimate by the same rules.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlvr_lightning.profiling.parameters import HEAD_DIM

BLOCK_BYTES, CAST_BYTES, MOST_TOKENS = 32 << 20, 4 << 20, 16384
"""Those of `rlvr_lightning.logprobs`, which this module may not import: it would load torch."""
CAST_ENTRIES = 1 << 20
"""That of `rlvr_lightning.compute`, likewise."""
COLUMNS, PROMPT_TOKENS, SAMPLING_BLOCK = 64, 4096, 128
"""Those of `rlvr_lightning.rollout`, likewise."""


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Entries a token has in each place of a layer."""

    hidden: int
    inner: int
    """Of the MLP; of a mixture, of all experts that a token goes through."""
    queries: int
    keys: int
    values: int
    outputs: int
    """Of attention."""
    heads: int
    norms: int
    """Over heads of queries and keys: 1 where the family has them."""
    spread: int
    """Copies of the hidden state that a mixture sends to experts."""
    vocab: int
    layers: int
    head: int
    """Entries of one head that are rotated."""


def widths(config: Mapping[str, Any], tensor: int = 1) -> Widths:
    """Of a model.

    Args:
        config: see `parameters`.
        tensor: processes that compute each layer together.
    """
    config = config.get("text_config") or config
    kind = config["model_type"]
    if kind == "gpt2":
        names = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
        config = {**config, **{new: config[old] for old, new in names.items()}, "n_inner": config.get("n_inner")}
        config["intermediate_size"] = config["n_inner"] or 4 * config["hidden_size"]
    hidden, heads = config["hidden_size"], config["num_attention_heads"] // tensor
    head = config.get("head_dim") or HEAD_DIM.get(kind) or hidden // config["num_attention_heads"]
    key_head = value_head = head
    key_heads = (config.get("num_key_value_heads") or config["num_attention_heads"]) // tensor
    if config.get("kv_lora_rank"):
        key_head, value_head = config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["v_head_dim"]
        key_heads = heads
    inner, spread = _inner(config, kind)
    return Widths(
        hidden=hidden,
        inner=inner // tensor,
        queries=heads * key_head,
        keys=key_heads * key_head,
        values=key_heads * value_head,
        outputs=heads * value_head,
        heads=heads,
        norms=int(kind in ("qwen3", "qwen3_moe", "gemma3_text")),
        spread=spread,
        vocab=config["vocab_size"],
        layers=config["num_hidden_layers"],
        head=config.get("qk_rope_head_dim") or head,
    )


def _inner(config: Mapping[str, Any], kind: str) -> tuple[int, int]:
    """Entries a token has inside the MLP, and copies of it that go to experts."""
    if kind == "opt":
        return config["ffn_dim"], 0
    chosen = config.get("num_experts_per_tok") or 0
    size = config.get("moe_intermediate_size") or config.get("intermediate_size")
    if not isinstance(size, int):
        raise ValueError("model: its config has no 'intermediate_size'")
    if not chosen:
        return config["intermediate_size"], 0
    shared = config.get("shared_expert_intermediate_size") or size * (config.get("n_shared_experts") or 0)
    return chosen * size + shared + (size if kind == "llama4_text" else 0), chosen


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward and backward pass."""

    widths: Widths
    rows: int
    length: int
    """Tokens of a row, padding included."""
    packed: bool
    """Several completions to a row, which takes a mask."""
    targets: int
    """Completion tokens whose log-probs are wanted."""
    compute: int
    """Bytes of an entry in the dtype of the arithmetic."""
    rank: int = 0
    """Of the adapters that are trained instead of the weights."""

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.rows * self.length

    def layer(self) -> int:
        """What one layer keeps.

        A norm keeps its input in fp32, the normalised values and (where a product with a weight follows) its output;
        the gated MLP four tensors of its inner size; attention the rotated queries and keys, values, output and the
        logarithms of its sums. With a mask, keys and values are repeated for every query head, and the mask is kept in
        the dtype of the arithmetic. Where adapters are trained, no norm needs its normalised values; each adapter keeps
        its input, cast for itself alone if the arithmetic is not fp32, and its own two products.
        """
        w, c, learning = self.widths, self.compute, not self.rank
        norms = 2 * ((4 + (1 + learning) * c) * w.hidden + 4)
        norms += w.norms * ((4 + c * learning) * (w.queries + w.keys) + 4 * (w.heads + w.keys * w.heads // w.queries))
        attention = c * (w.queries + w.outputs) + 4 * w.heads
        attention += c * (w.queries + w.outputs + self.length) if self.packed else c * (w.keys + w.values)
        return self.tokens * (norms + attention + self._adapters() + c * (4 * w.inner + 2 * w.spread * w.hidden))

    def _adapters(self) -> int:
        """What those of a layer keep of a token."""
        w, c = self.widths, self.compute
        cast_apart = c * (3 * w.hidden + w.outputs) if self.rank and c < 4 else 0
        return cast_apart + 7 * self.rank * c

    def unlearned(self) -> int:
        """What the first layer does not keep: the input of its first norm, for nothing is learned in front of it."""
        return self.tokens * (4 * self.widths.hidden + 4) if self.rank else 0

    def input(self) -> int:
        """What is kept of one layer when it is recomputed."""
        return self.tokens * self.widths.hidden * self.compute

    def rest(self) -> int:
        """What is kept around the layers: the last norm, hidden states to predict from, rotations, indices."""
        w, c = self.widths, self.compute
        around = self.tokens * ((4 + c * (not self.rank)) * w.hidden + 4) + self.rotations()
        return around + self.targets * (w.hidden * c + 36)

    def rotations(self) -> int:
        """Cosines and sines of positions, and indices of tokens: there until the first layer's backward pass."""
        return self.tokens * (2 * self.widths.head * self.compute + 24)

    def mask(self) -> int:
        """Which tokens see which, while the forward pass runs."""
        return self.tokens * self.length if self.packed else 0

    def slope(self) -> int:
        """Temporaries of one layer's backward pass, at its MLP, where they are largest."""
        return self.tokens * self.compute * (self.widths.inner + 3 * self.widths.hidden)

    def block(self) -> tuple[int, int]:
        """Tokens and words whose logits exist at once."""
        tokens = max(1, min(self.targets, MOST_TOKENS))
        words = min(BLOCK_BYTES // (4 * tokens), CAST_BYTES // (4 * self.widths.hidden), self.widths.vocab)
        return tokens, max(1, words)

    def logits(self, backward: bool) -> int:
        """Slices of logits: two in fp32 going forward; going backward one, its cast, and gradients of the slice."""
        tokens, words = self.block()
        z = 4 * tokens * words
        if not backward:
            return 2 * z + 16 * self.targets
        cast = z * self.compute // 4 if self.compute < 4 else 0
        product = words * self.widths.hidden * self.compute if self.compute < 4 else 0
        slope = 0 if self.rank else product + 4 * words * self.widths.hidden
        return z + cast + slope + 4 * self.targets * self.widths.hidden


def per_row(prompt: int, completion: int, group: int, layer_entries: float, hidden: int) -> int:
    """Completions that share a row with their prompt: the choice of `rlvr_lightning.packing`.

    >>> per_row(100, 10, 4, 2000.0 * 2, 1), per_row(10, 4000, 4, 2000.0 * 2, 1)
    (4, 1)
    """

    def cost(count: int) -> float:
        length = prompt + count * completion
        pairs = length**2 if count > 1 else length**2 / 2
        return (length * layer_entries / (2 * hidden) + pairs) / count

    return min((count for count in range(1, group + 1) if group % count == 0), key=cost)


def kv_cache(w: Widths, rows: int, prompts: int, prompt: int, completion: int, compute: int) -> int:
    """Keys and values while completions grow: every prompt once, own tokens in room for 64 more at a time."""
    own = rows * (completion + -completion % COLUMNS)
    return (own + prompts * prompt) * (w.keys + w.values) * w.layers * compute


def sampling(w: Widths, rows: int, compute: int, divided: bool = False) -> int:
    """Logits of the next tokens, in fp32, divided by a temperature, their probabilities, and these padded."""
    kinds = 4 * (compute < 4) + 4 * divided + 4 + (4 if w.vocab % SAMPLING_BLOCK else 0)
    return rows * w.vocab * (compute + kinds)


def reading(w: Widths, tokens: int, compute: int) -> int:
    """Activations of a layer that nothing is kept of."""
    attention = w.queries + w.keys + w.values + w.outputs
    return tokens * compute * max(3 * w.inner + 2 * w.hidden, attention + 2 * w.hidden)
