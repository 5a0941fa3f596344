"""One SGD step of one tensor, w <- w - step_size * g, for each way of storing w; pure functions on flat chunks.

This is the definition. Where a faster version runs (`triton_update`), it must give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlvr_lightning.delta import TensorDelta
from rlvr_lightning.heap import scratch
from rlvr_lightning.optim.bits import dice, join, round_by_dice_into, round_into

CHUNK_ENTRIES = {"cpu": 1 << 17, "cuda": 1 << 24}
"""On a CPU a chunk and its temporaries stay in the cache; on a GPU they are small beside any model."""

DENSE = 0.2
"""A tensor of which a larger share changes in one step is emitted whole: entries take three times as much each."""


@dataclass(frozen=True)
class Storage:
    """Where the exact value of a weight is kept."""

    weight: Tensor
    """The model computes with this: flat, contiguous."""
    low: Tensor | None = None
    """int16: the low half of a split fp32 master; may live in host memory."""
    master: Tensor | None = None
    """float32 master."""
    key: int | None = None
    """Round with dice from this key (bfloat16 without a master); None rounds to nearest."""
    offset: int = 0
    """Where `weight` begins in the tensor that it is a shard of, so that a shard throws the dice of the whole."""


def update_chunk(at: Storage, grad: Tensor, step_size: float, start: int) -> tuple[Tensor, Tensor]:
    """Step a chunk of a tensor in place.

    Args:
        at: the chunk's storage, every tensor [n].
        grad: [n], any float dtype; computed with in fp32.
        step_size: learning rate times the scale of the gradient.
        start: position of the chunk in its tensor.

    Returns:
        bool [n], where the weight's bits changed; and [n] the weights as they were. Both until the next call.
    """
    weight = at.weight
    old = _temporary("old", weight, weight.dtype).copy_(weight)
    if at.low is not None:
        low = at.low.to(weight.device, non_blocking=True)
        bits = join(weight, low, out=_temporary("bits", weight, torch.int32))
        bits.view(torch.float32).add_(grad, alpha=-step_size)
        at.low.copy_(bits)  # keeps the lowest 16 bits, which are the remainder
        round_into(weight, bits)
    elif at.master is not None:
        at.master.add_(grad, alpha=-step_size)
        round_into(weight, _temporary("bits", weight, torch.int32).copy_(at.master.view(torch.int32)))
    elif weight.dtype in (torch.float32, torch.float64):
        weight.add_(grad, alpha=-step_size)
    else:
        whole = _temporary("bits", weight, torch.int32).view(torch.float32).copy_(weight).add_(grad, alpha=-step_size)
        if at.key is None:
            weight.copy_(whole)
        else:
            round_by_dice_into(
                weight, whole.view(torch.int32), dice(at.offset + start, len(weight), at.key, weight.device)
            )
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    changed = _temporary("changed", weight, torch.bool)
    return torch.ne(old.view(integer), weight.view(integer), out=changed), old


def _temporary(use: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a chunk."""
    if like.device.type == "cpu":
        return scratch(f"update {use}", len(like), dtype)
    return torch.empty(len(like), dtype=dtype, device=like.device)


def chunks(at: Storage, grad: Tensor) -> Iterator[tuple[int, Storage, Tensor]]:
    """Cut a tensor's storage and gradient into chunks: (position, storage, gradient)."""
    size = CHUNK_ENTRIES.get(at.weight.device.type, CHUNK_ENTRIES["cuda"])
    for start in range(0, len(grad), size):
        part = slice(start, start + size)
        low = None if at.low is None else at.low[part]
        master = None if at.master is None else at.master[part]
        yield start, Storage(at.weight[part], low, master, at.key, at.offset), grad[part]


def update(
    at: Storage, grad: Tensor, step_size: float, emit: bool = False
) -> tuple[Tensor, TensorDelta | Tensor | None]:
    """Step a whole tensor in place.

    Args:
        at: its storage, every tensor flat.
        grad: flat.
        step_size: learning rate times the scale of the gradient.
        emit: also say what changed.

    Returns:
        int64 scalar, on the weight's device: entries whose bits changed; and the way back (None unless `emit`): the
        changed entries with the values they had or, where more than `DENSE` of the entries changed, all old values.
    """
    changed = torch.zeros((), dtype=torch.int64, device=at.weight.device)
    found = _Found(at.weight) if emit else None
    for start, chunk, part in chunks(at, grad):
        if found is not None and found.dense is not None:  # `found` has a copy of what is still to come
            changed += _step(chunk, part, step_size, start, emit=False)[0]
            continue
        count, where, old = _step(chunk, part, step_size, start, emit)
        changed += count
        if found is not None and where is not None and old is not None:
            found.add(where + start, old)
    return changed, None if found is None else found.undo()


class _Found:
    """Changed entries of a tensor as its chunks are stepped; all of its old values as soon as that is less."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.index_dtype = torch.int32 if len(weight) < 1 << 31 else torch.int64
        self.indices = [torch.empty(0, dtype=self.index_dtype, device=weight.device)]
        self.values = [weight[:0].clone()]
        self.count = 0
        self.dense: Tensor | None = None

    def add(self, where: Tensor, old: Tensor) -> None:
        """Positions in the tensor, ascending from call to call, and what was there."""
        self.indices.append(where.to(self.index_dtype))
        self.values.append(old)
        self.count += len(where)
        if self.count > DENSE * len(self.weight):
            self.dense = self.weight.clone()
            for indices, values in zip(self.indices, self.values, strict=True):
                self.dense[indices.long()] = values
            self.indices, self.values = [], []

    def undo(self) -> TensorDelta | Tensor:
        """The way back."""
        if self.dense is not None:
            return self.dense
        return TensorDelta(torch.cat(self.indices), torch.cat(self.values), len(self.weight))


def _step(
    at: Storage, grad: Tensor, step_size: float, start: int, emit: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Step a chunk the fastest way: entries changed; if asked for, where (ascending, int64) and what they were."""
    fused = _fused() if at.weight.is_cuda and at.weight.dtype == torch.bfloat16 else None
    if fused is None:
        mask, old = update_chunk(at, grad, step_size, start)
        where = mask.nonzero()[:, 0] if emit else None
        return mask.count_nonzero(), where, None if where is None else old[where]
    low = None if at.low is None else at.low.to(at.weight.device, non_blocking=True)
    result = fused(at.weight, low, at.master, at.key, grad, step_size, at.offset + start, emit)
    if at.low is not None and low is not None and low is not at.low:
        at.low.copy_(low)
    return result


@cache
def _fused() -> Any:
    """The kernel; None without triton."""
    try:
        from rlvr_lightning.optim.triton_update import fused_chunk
    except ImportError:
        return None
    return fused_chunk
