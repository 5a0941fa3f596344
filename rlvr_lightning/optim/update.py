"""One SGD step of one tensor, w <- w - step_size * g, for each way of storing w; pure functions on flat chunks.

This is the definition. Where a faster version runs (`triton_update`), it must give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlvr_lightning.delta import TensorDelta
from rlvr_lightning.optim.bits import dice, join, rounded, rounded_by_dice

CHUNK_ENTRIES = {"cpu": 1 << 16, "cuda": 1 << 24}
"""On a CPU a chunk and its temporaries stay in the cache; on a GPU they are small beside any model."""


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


def update_chunk(at: Storage, grad: Tensor, step_size: float, start: int) -> tuple[Tensor, Tensor]:
    """Step a chunk of a tensor in place.

    Args:
        at: the chunk's storage, every tensor [n].
        grad: [n], any float dtype; computed with in fp32.
        step_size: learning rate times the scale of the gradient.
        start: position of the chunk in its tensor.

    Returns:
        bool [n], where the weight's bits changed; and [n] the weights as they were.
    """
    weight, old = at.weight, at.weight.clone()
    if at.low is not None:
        low = at.low.to(weight.device, non_blocking=True)
        whole = join(weight, low).add_(grad, alpha=-step_size)
        bits = whole.view(torch.int32)
        weight.copy_(rounded(bits))
        at.low.copy_(bits)  # keeps the lowest 16 bits, which are the remainder
    elif at.master is not None:
        at.master.add_(grad, alpha=-step_size)
        weight.copy_(rounded(at.master.view(torch.int32)))
    elif at.key is not None:
        bits = weight.float().add_(grad, alpha=-step_size).view(torch.int32)
        weight.copy_(rounded_by_dice(bits, dice(start, len(weight), at.key, weight.device)))
    elif weight.dtype in (torch.float32, torch.float64):
        weight.add_(grad, alpha=-step_size)
    else:
        weight.copy_(weight.float().add_(grad, alpha=-step_size))
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return old.view(integer) != weight.view(integer), old


def chunks(at: Storage, grad: Tensor) -> Iterator[tuple[int, Storage, Tensor]]:
    """Cut a tensor's storage and gradient into chunks: (position, storage, gradient)."""
    size = CHUNK_ENTRIES.get(at.weight.device.type, CHUNK_ENTRIES["cuda"])
    for start in range(0, len(grad), size):
        part = slice(start, start + size)
        low = None if at.low is None else at.low[part]
        master = None if at.master is None else at.master[part]
        yield start, Storage(at.weight[part], low, master, at.key), grad[part]


def update(at: Storage, grad: Tensor, step_size: float, emit: bool = False) -> tuple[Tensor, TensorDelta | None]:
    """Step a whole tensor in place.

    Args:
        at: its storage, every tensor flat.
        grad: flat.
        step_size: learning rate times the scale of the gradient.
        emit: also say what changed.

    Returns:
        int64 scalar, on the weight's device: entries whose bits changed; and the way back: the changed entries with the
        values they had (None unless `emit`).
    """
    changed = torch.zeros((), dtype=torch.int64, device=at.weight.device)
    index_dtype = torch.int32 if len(grad) < 1 << 31 else torch.int64
    indices, values = [], []
    for start, chunk, part in chunks(at, grad):
        mask, old = update_chunk(chunk, part, step_size, start)
        changed += mask.count_nonzero()
        if emit:
            where = mask.nonzero()[:, 0]
            values.append(old[where])
            indices.append((where + start).to(index_dtype))
    if not emit or not indices:
        return changed, _nothing(at.weight, index_dtype) if emit else None
    return changed, TensorDelta(torch.cat(indices), torch.cat(values), len(grad))


def _nothing(weight: Tensor, index_dtype: torch.dtype) -> TensorDelta:
    return TensorDelta(torch.empty(0, dtype=index_dtype, device=weight.device), weight[:0].clone(), len(weight))
