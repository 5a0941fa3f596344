"""Counting the entries of a tensor that changed, under several definitions; and names of kinds and layers. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type as wide as an entry of so many bytes."""

KINDS = (
    ("norm", re.compile(r"norm|(^|\.)ln(_|\d|$)", re.IGNORECASE)),
    ("lm_head", re.compile(r"(^|\.)(lm_head|output_layer|embed_out)(\.|$)", re.IGNORECASE)),
    ("embedding", re.compile(r"embed|(^|\.)w[tp]e(\.|$)", re.IGNORECASE)),
    ("attention", re.compile(r"attn|attention|(^|\.)[qkvo]_proj(\.|$)", re.IGNORECASE)),
    (
        "mlp",
        re.compile(r"mlp|ffn|feed_?forward|expert|(^|\.)(gate|up|down)_proj(\.|$)|(^|\.)fc\d?(\.|$)", re.IGNORECASE),
    ),
)
LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)(?:\.|$)")


def kind_of(name: str) -> str:
    """What a parameter is part of, by its name; a norm inside attention is a norm.

    >>> kind_of("model.layers.3.self_attn.q_norm.weight"), kind_of("model.embed_tokens.weight"), kind_of("bias")
    ('norm', 'embedding', 'other')
    """
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "other")


def layer_of(name: str) -> str:
    """The number of the layer a parameter belongs to, or `none`.

    >>> layer_of("model.layers.12.mlp.up_proj.weight"), layer_of("lm_head.weight")
    ('12', 'none')
    """
    found = LAYER.search(name)
    return found[1] if found else "none"


def matrix_of(name: str) -> str:
    """Which matrix of a layer a tensor is; norms are all one kind.

    >>> matrix_of("model.layers.3.self_attn.q_proj.weight"), matrix_of("model.layers.0.mlp.experts.7.up_proj.weight")
    ('attention q_proj', 'mlp up_proj')
    >>> matrix_of("model.layers.3.self_attn.q_norm.weight"), matrix_of("h.0.attn.c_proj.bias")
    ('norm', 'attention c_proj bias')
    >>> matrix_of("model.layers.3.self_attn.q_proj.lora_A.default.weight")
    'attention q_proj'
    """
    layer, adapter, _ = name.partition(".lora_")
    name = f"{layer}.weight" if adapter else name
    kind = kind_of(name)
    if kind in ("norm", "embedding", "lm_head"):
        return kind
    *parts, last = [part for part in name.partition("[")[0].split(".") if not part.isdecimal()]
    if last == "weight" and parts:
        return f"{kind} {parts[-1]}"
    return f"{kind} {parts[-1]} bias" if last == "bias" and parts else f"{kind} {last}"


def bits(tensor: Tensor) -> Tensor:
    """The same memory seen as integers, so that comparing treats NaN like any other pattern."""
    return tensor.view(BITS[tensor.element_size()])


# On a CPU numpy compares, counts and finds several times faster than torch; the results are the same.
def _differ(old: Tensor, new: Tensor) -> Tensor:
    """Mask of entries whose bits differ; this makes -0.0 differ from 0.0, and a NaN equal to itself."""
    old, new = bits(old), bits(new)
    return torch.from_numpy(old.numpy() != new.numpy()) if old.is_cpu else old != new


def _count(mask: Tensor) -> int:
    return int(np.count_nonzero(mask.numpy())) if mask.is_cpu else int(torch.count_nonzero(mask))


def _where(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.is_cpu else mask.nonzero().squeeze(1)


def _beyond(old: Tensor, new: Tensor, bound: Tensor | float) -> Tensor:
    """Mask of entries not within |new - old| <= bound: also NaN, and an infinity where the other is not the same."""
    distance = (new - old).abs_()
    if isinstance(bound, Tensor):
        bound.clamp_(max=torch.finfo(bound.dtype).max)  # nothing is within an infinite bound
    if distance.is_cpu:
        within = distance.numpy() <= (bound.numpy() if isinstance(bound, Tensor) else np.float32(bound))
        return torch.from_numpy(np.logical_not(within, out=within))
    return (distance <= bound).logical_not_()


class Pair:
    """Values before and after, and what several definitions need of them."""

    def __init__(self, old: Tensor, new: Tensor) -> None:
        self.old, self.new = old, new

    @cached_property
    def half(self) -> tuple[Tensor, Tensor]:
        """The values rounded to bf16."""
        return self.old.to(torch.bfloat16), self.new.to(torch.bfloat16)

    @cached_property
    def half_differ(self) -> Tensor:
        """Mask of entries whose bf16 bits differ."""
        return _differ(*self.half)


def _bf16(pair: Pair) -> int:
    return _count(pair.half_differ)


def _tol(pair: Pair) -> int:
    old, new = pair.half
    if 8 * _count(pair.half_differ) > old.numel():
        return _count(_beyond(old.float(), new.float(), 1e-5).logical_and_(pair.half_differ))
    few = _where(pair.half_differ)
    return _count(_beyond(old[few].float(), new[few].float(), 1e-5))


def _rel(pair: Pair) -> int:
    wide = torch.promote_types(pair.old.dtype, torch.float32)
    old, new = pair.old.to(wide), pair.new.to(wide)
    bound = torch.maximum(old.abs(), new.abs()).mul_(1e-3)
    return _count(_beyond(old, new, bound).logical_and_(_differ(pair.old, pair.new)))


def _stored(pair: Pair) -> int:
    return _count(_differ(pair.old, pair.new))


DEFINITIONS: dict[str, Callable[[Pair], int]] = {
    "bf16": _bf16,
    "tol1e-5": _tol,
    "rel1e-3": _rel,
    "fp32": _stored,
}
"""How many entries changed, by name: see `count_changed`."""


def count_changed(old: Tensor, new: Tensor, definitions: Sequence[str]) -> Tensor:
    """How many entries changed, all of them and those that were exactly zero before.

    - `bf16`: the bits of the values rounded to bf16 differ;
    - `tol1e-5`: and those bf16 values are further apart than 1e-5;
    - `rel1e-3`: the stored values are further apart than 1e-3 * max(|old|, |new|);
    - `fp32`: the stored bits differ at all, whatever the stored type.

    Args:
        old: [n] values before.
        new: [n] values after, same dtype and device.
        definitions: names from the list above.

    Returns:
        int64 [1 + definitions, 2], on the host: first row the entries [all, zero before], then those of
        them that changed.

    >>> old, new = torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.tensor([1e-9, 1.0, 1.0001, 3.0])
    >>> count_changed(old, new, ["bf16", "tol1e-5", "rel1e-3", "fp32"]).tolist()
    [[4, 1], [2, 1], [1, 0], [2, 1], [3, 1]]
    """
    zero = _where(torch.from_numpy(bits(old).numpy() << 1 == 0) if old.is_cpu else old == 0)
    parts = [Pair(old, new), Pair(old[zero], new[zero])]
    counts = [[pair.old.numel() for pair in parts]]
    if torch.equal(bits(old), bits(new)):
        counts += [[0, 0] for _ in definitions]
    else:
        counts += [[DEFINITIONS[name](pair) for pair in parts] for name in definitions]
    return torch.tensor(counts)
