"""The state of an optimizer in closed form, key by key, from the shapes that a process holds. Standard library only.

=================  =====================  =============================================================
name               optimizer              beside the weights
=================  =====================  =============================================================
`sgd`              torch.optim.SGD        nothing
`momentum`         the same, momentum     a buffer in the weights' dtype
`rmsprop`          torch.optim.RMSprop    mean squares in the weights' dtype
`adamw`            torch.optim.AdamW      two moments in the weights' dtype
`adafactor`        torch.optim.Adafactor  a row and a column of mean squares for each matrix
`muon`             torch.optim.Muon       a momentum for the layers' matrices, AdamW's moments for the rest
`sgd_split`        rlvr_lightning.optim   the low halves of fp32 masters of bf16 weights, 16 bits each
`sgd_fp32`         the same               fp32 masters of bf16 weights
`sgd_bf16`         the same               nothing; bf16 weights rounded to nearest
`sgd_stochastic`   the same               nothing; bf16 weights rounded up or down by chance
`adamw8bit`        bitsandbytes           two moments in 8 bits and a scale for every 256 entries
`flashadamw`       flashoptim             8 bits for each moment and for what bf16 weights lack, and scales
=================  =====================  =============================================================

The last two are as their makers describe them; all others are held against counted bytes by the tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]
CHUNK_CPU = 1 << 17
"""Entries that our SGD steps at a time: that of `rlvr_lightning.optim.update`, which would load torch."""
STEP = 4
"""Bytes of torch's own count of steps, a tensor of fp32 for each parameter."""


@dataclass(frozen=True)
class Rule:
    """What an optimizer keeps of one tensor."""

    class_path: str
    state: Callable[[Shape, int, bool], dict[str, int]]
    """(shape, bytes of an entry of the weight, whether it is a matrix inside a layer) -> bytes by key."""
    workspace: Callable[[int, int, int, bool], int] = lambda total, largest, width, gpu: 0
    """(entries of all weights, of the largest, bytes of one, whether on a GPU) -> temporaries of a step."""
    settings: str = ""
    """Besides the learning rate, as YAML."""


def _moments(*names: str) -> Callable[[Shape, int, bool], dict[str, int]]:
    return lambda shape, width, inner: {name: prod(shape) * width for name in names} | {"step": STEP}


def _adafactor(shape: Shape, width: int, inner: bool) -> dict[str, int]:
    if len(shape) < 2:
        return {"variance": prod(shape) * width, "step": STEP}
    row, column = prod(shape[:-1]), prod(shape) // shape[-2] if shape[-2] else 0
    return {"row_var": row * width, "col_var": column * width, "step": STEP}


def _muon(shape: Shape, width: int, inner: bool) -> dict[str, int]:
    if inner and len(shape) == 2:
        return {"momentum_buffer": prod(shape) * width}
    return _moments("exp_avg", "exp_avg_sq")(shape, width, inner)


def _master(key: str, bytes_each: int) -> Callable[[Shape, int, bool], dict[str, int]]:
    return lambda shape, width, inner: {key: prod(shape) * bytes_each} if width == 2 else {}


def _adamw8bit(shape: Shape, width: int, inner: bool) -> dict[str, int]:
    entries = prod(shape)
    if entries < 4096:
        return {"state1": 4 * entries, "state2": 4 * entries}
    blocks = -(-entries // 256)
    return {"state1": entries, "state2": entries, "absmax1": 4 * blocks, "absmax2": 4 * blocks}


def _flash(shape: Shape, width: int, inner: bool) -> dict[str, int]:
    entries = prod(shape)
    scales = 2 * -(-entries // 32)
    low = {"ecc": entries} if width == 2 else {}
    return low | {"exp_avg": entries + scales, "exp_avg_sq": entries + scales}


def _adam_workspace(total: int, largest: int, width: int, gpu: bool) -> int:
    """Roots of the second moments: of all weights on a GPU, where they are stepped together, else two of one."""
    return (total if gpu else 2 * largest) * width


def _few(number: int) -> Callable[[int, int, int, bool], int]:
    return lambda total, largest, width, gpu: number * largest * width


def _chunk(bytes_each: int) -> Callable[[int, int, int, bool], int]:
    """Old weights, bits and a mask (and dice) of a chunk; on a GPU the kernel needs none of them."""
    return lambda total, largest, width, gpu: 0 if gpu else min(largest, CHUNK_CPU) * bytes_each


TORCH, OURS = "torch.optim.", "rlvr_lightning.optim.SGD"
RULES: dict[str, Rule] = {
    "sgd": Rule(TORCH + "SGD", lambda shape, width, inner: {}),
    "momentum": Rule(
        TORCH + "SGD",
        lambda shape, width, inner: {"momentum_buffer": prod(shape) * width},
        settings="momentum: 0.9",
    ),
    "rmsprop": Rule(TORCH + "RMSprop", _moments("square_avg"), _adam_workspace),
    "adamw": Rule(TORCH + "AdamW", _moments("exp_avg", "exp_avg_sq"), _adam_workspace),
    "adafactor": Rule(TORCH + "Adafactor", _adafactor, _few(2)),
    "muon": Rule(TORCH + "Muon", _muon, _few(3)),
    "sgd_split": Rule(OURS, _master("low", 2), _chunk(7), settings="master: split"),
    "sgd_fp32": Rule(OURS, _master("master", 4), _chunk(7), settings="master: fp32"),
    "sgd_bf16": Rule(OURS, lambda shape, width, inner: {}, _chunk(7), settings="master: none"),
    "sgd_stochastic": Rule(
        OURS, lambda shape, width, inner: {}, _chunk(15), settings="master: none, rounding: stochastic"
    ),
    "adamw8bit": Rule("bitsandbytes.optim.AdamW8bit", _adamw8bit),
    "flashadamw": Rule("flashoptim.FlashAdamW", _flash),
}
RELEASING = frozenset(name for name, rule in RULES.items() if rule.class_path == OURS)
"""Those that can update during the backward pass."""


def state_bytes(name: str, tensors: Iterable[tuple[Shape, int, bool, int]]) -> dict[str, int]:
    """Bytes of an optimizer's state by key.

    Args:
        name: one of `RULES`.
        tensors: (shape that the process holds, bytes of an entry, whether it is a matrix of a layer, how many such).

    Example:
        >>> state_bytes("adamw", [((5, 7), 4, True, 1)])
        {'exp_avg': 140, 'exp_avg_sq': 140, 'step': 4}
        >>> state_bytes("adafactor", [((5, 7), 4, True, 2)])  # of each matrix 5 and 7
        {'row_var': 40, 'col_var': 56, 'step': 8}
    """
    totals: Counter[str] = Counter()
    for shape, width, inner, copies in tensors:
        for key, size in RULES[name].state(shape, width, inner).items():
            totals[key] += size * copies
    return dict(totals)
