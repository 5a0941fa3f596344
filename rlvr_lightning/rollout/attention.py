"""The attention the engine lends to a model while it generates.

transformers lets a model's attention be any registered function. Ours finds its keys and values not in the arguments
but in a state object that the engine passes through the model's forward as a keyword: `PromptPass` while prompts are
read, `rlvr_lightning.rollout.cache.SharedCache` while completions grow. No mask and no transformers cache is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

NAME = "rlvr_rollout"
UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # extras of attention that this function would silently leave out


class AttentionState(Protocol):
    """Where keys and values live."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Store new keys and values and attend to what is stored.

        Args:
            layer: number of the layer.
            query: float [B, query heads, tokens, D].
            key: float [B, heads, tokens, D].
            value: float [B, heads, tokens, D].
            scale: multiplies the dot products.
            window: a token sees itself and the window - 1 before it; None sees all before it.

        Returns:
            float [B, tokens, query heads, D]
        """
        ...


def rollout_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **extras: Any
) -> tuple[Tensor, None]:
    """The function registered with transformers."""
    for name in UNSUPPORTED:
        if extras.get(name) is not None:
            raise ValueError(f"model: its attention uses {name!r}, which HFEngine does not compute; use another engine")
    state: AttentionState = extras["rollout_state"]
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if extras.get("scaling") is None else extras["scaling"]
    return state.attend(layer, query, key, value, scale, extras.get("sliding_window")), None


@contextmanager
def rollout_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode with our attention; its modes and settings come back afterwards, whatever happens."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, rollout_attention)
    training = [m for m in model.modules() if m.training]
    configs: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    configs = list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())
    before = [(c, c._attn_implementation) for c in configs]
    try:
        for module in training:
            module.training = False
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        for module in training:
            module.training = True
        for config, implementation in before:
            config._attn_implementation = implementation


class PromptPass:
    """One forward pass over several prompts, laid end to end in one row: no padding at all.

    Args:
        lengths: tokens of each prompt.
    """

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Causal attention of each prompt to itself: see `AttentionState`."""
        self.layers[layer] = (key[0], value[0])
        gqa = query.shape[1] != key.shape[1]
        outputs = []
        for q, k, v in zip(*(x.split(self.lengths, dim=2) for x in (query, key, value)), strict=True):
            mask = None
            if window is not None and q.shape[2] > window:
                place = torch.arange(q.shape[2], device=q.device)
                distance = place[:, None] - place
                mask = (distance >= 0) & (distance < window)
            output = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
            )
            outputs.append(output)
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def keys_values(self, number: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of one prompt by layer, each [heads, S, D]."""
        start = sum(self.lengths[:number])
        stop = start + self.lengths[number]
        return {i: (k[:, start:stop], v[:, start:stop]) for i, (k, v) in self.layers.items()}


def scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Scaled dot products.

    Args:
        query: float [B, M, D].
        key: float [B, N, D].
        bias: float [B, 1, N], added: 0, or -inf where a key does not count. None means that all count.
        scale: multiplies the dot products.

    Returns:
        [B, M, N]
    """
    added, beta = (query.new_zeros(1, 1, 1), 0) if bias is None else (bias, 1)
    return torch.baddbmm(added, query, key.transpose(1, 2), beta=beta, alpha=scale)
