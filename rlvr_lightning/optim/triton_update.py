"""The update of `update.update_chunk` in one pass over a GPU's memory: step, rounding, count and changed entries.

The plain version is the definition; this one must give the same bits. It needs triton, which torch for CUDA brings.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
SPLIT, MASTER, NEAREST, DICE = 0, 1, 2, 3


@triton.jit
def _hash(position, key):  # type: ignore[no-untyped-def]
    """See `bits.dice`; in unsigned arithmetic."""
    x = (position.to(tl.uint32) * 0x9E3779B1) ^ key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return ((x ^ (x >> 16)) & 0xFFFF).to(tl.int32)


@triton.jit(do_not_specialize=["key", "start"])
def _step(  # type: ignore[no-untyped-def]  # noqa: PLR0913 (a kernel has no objects)
    weight, low, master, grad, changed, indices, old_values, step_size, start, key, n, MODE: tl.constexpr,
    EMIT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One block of a chunk. `weight`, `low` and `old_values` are int16; `changed` counts and hands out places."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = at < n
    old = tl.load(weight + at, mask=inside, other=0)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    bits = old.to(tl.int32) << 16
    if MODE == 0:  # SPLIT
        bits += tl.load(low + at, mask=inside, other=0).to(tl.int32)
        w = bits.to(tl.float32, bitcast=True)
    elif MODE == 1:  # MASTER
        w = tl.load(master + at, mask=inside, other=0.0)
    else:
        w = bits.to(tl.float32, bitcast=True)
    w = tl.math.fma(g, -step_size, w)  # torch fuses, too
    bits = tl.where(w != w, 0x7FC00000, w.to(tl.int32, bitcast=True))  # see `bits`: 0x7FFFFFFF would round to -0.0
    if MODE == 0:
        tl.store(low + at, bits.to(tl.int16), mask=inside)
    if MODE == 1:
        tl.store(master + at, w, mask=inside)
    if MODE == 3:  # DICE
        high = (bits + _hash(start + at, key)) >> 16
    elif MODE == 2:  # NEAREST, ties to even as torch rounds
        high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    else:  # ties away from zero: the low half is the remainder
        high = (bits + 0x8000) >> 16
    new = high.to(tl.int16)
    tl.store(weight + at, new, mask=inside)
    differs = ((new != old) & inside).to(tl.int32)
    count = tl.sum(differs, axis=0)
    base = tl.atomic_add(changed, count)
    if EMIT:
        place = base + tl.cumsum(differs, axis=0) - 1
        tl.store(indices + place, at, mask=differs == 1)
        tl.store(old_values + place, old, mask=differs == 1)


def fused_chunk(
    weight: Tensor,
    low: Tensor | None,
    master: Tensor | None,
    key: int | None,
    grad: Tensor,
    step_size: float,
    start: int,
    emit: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Step a chunk of a bfloat16 tensor in place.

    Args:
        weight: bfloat16 [n], contiguous, n < 2**31.
        low: int16 [n] on the weight's device, for a split master.
        master: float32 [n], for a whole one.
        key: of stochastic rounding; None rounds to nearest.
        grad: [n].
        step_size: learning rate times the scale of the gradient.
        start: position of the chunk in its tensor.
        emit: also return what changed.

    Returns:
        int32 scalar, entries whose bits changed; and, ascending, their positions in the chunk (int64) and old values.
    """
    n, device = len(weight), weight.device
    changed = torch.zeros((), dtype=torch.int32, device=device)
    room = n if emit else 1
    indices = torch.empty(room, dtype=torch.int32, device=device)
    old_values = torch.empty(room, dtype=torch.int16, device=device)
    mode = SPLIT if low is not None else MASTER if master is not None else NEAREST if key is None else DICE
    nothing = changed  # a pointer that is never used
    halves = (nothing if low is None else low, nothing if master is None else master)
    numbers = (step_size, start, key or 0, n)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # triton launches on the current one
        _step[(triton.cdiv(n, BLOCK),)](
            weight.view(torch.int16), *halves, grad, changed, indices, old_values, *numbers,
            MODE=mode, EMIT=emit, SIZE=BLOCK,
        )  # fmt: skip
    if not emit:
        return changed, None, None
    count = int(changed)
    places, order = indices[:count].sort()  # blocks took their places in no order
    return changed, places.long(), old_values[:count][order].view(torch.bfloat16)
