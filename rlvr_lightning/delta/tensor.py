"""TensorDelta: the entries in which one tensor differs from another, with their exact bits. Pure torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type as wide as an entry of so many bytes."""
CPU_CHUNK = 1 << 19
"""Entries compared at a time on a CPU: few enough for the caches, enough to hide the calls."""
DEVICE_CHUNK = 1 << 26
"""Entries compared at a time on an accelerator, which bounds the mask and the positions (8 bytes each) found."""
SPARSE = 1 / 1000
"""Below this share of changed entries it is quicker to compare words of 8 bytes and to look inside the differing."""


def local(tensor: Tensor) -> Tensor:
    """The tensor itself without its autograd history; of a DTensor, this rank's shard."""
    to_local: Any = getattr(tensor, "to_local", None)
    with torch.no_grad():
        return (tensor if to_local is None else to_local()).detach()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its shards, which all ranks must ask for together; any other as it is."""
    full: Any = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def first_entry(tensor: Tensor) -> int:
    """Where this rank's shard begins in the whole tensor laid out in row-major order; 0 for any other tensor.

    A shard of rows follows on from there. One of columns does not: of it, this is the first entry alone.
    """
    if not hasattr(tensor, "placements"):
        return 0
    _, offset = _place(tensor)
    return sum(at * math.prod(tensor.shape[dim + 1 :]) for dim, at in enumerate(offset))


def box(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part, a view, of a tensor that is sharded as `like`, however that is."""
    if hasattr(like, "placements"):
        shape, offset = _place(like)
        for dim, (first, entries) in enumerate(zip(offset, shape, strict=True)):
            tensor = tensor.narrow(dim, min(first, tensor.shape[dim]), entries)
    return tensor


def _place(dtensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of this rank's shard, and where it begins in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(dtensor.shape, dtensor.device_mesh, dtensor.placements)


def bits(tensor: Tensor) -> Tensor:
    """The same memory seen as integers of the same width, so that NaN and -0.0 are patterns like any other.

    Raises:
        ValueError: entries are complex or of a width that no integer has.
    """
    if tensor.is_complex() or tensor.element_size() not in INTEGERS:
        raise ValueError(f"delta: tensors of {tensor.dtype} are not supported; use entries of 1, 2, 4 or 8 bytes")
    return tensor.view(INTEGERS[tensor.element_size()])


def flat_bits(tensor: Tensor) -> Tensor:
    """Integers [numel] in row-major order: a view if the tensor is contiguous, else a copy."""
    return bits(local(tensor)).reshape(-1)


def index_dtype(numel: int) -> torch.dtype:
    """Of positions in a tensor of so many entries."""
    return torch.int32 if numel < 2**31 else torch.int64


@dataclass(frozen=True, eq=False)
class TensorDelta:
    """What turns one tensor (or local shard) into another: absolute values, so that nothing ever drifts.

    Example:
        >>> old, new = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 5.0, 3.0])
        >>> delta = TensorDelta.between(old, new)
        >>> delta.indices.tolist(), delta.values.tolist(), delta.numel
        ([1], [5.0], 3)
        >>> delta.apply_(old)
        >>> old.tolist()
        [1.0, 5.0, 3.0]
    """

    indices: Tensor
    """int32 [K] (int64 if numel >= 2**31), strictly ascending positions in the tensor laid out in row-major order."""
    values: Tensor
    """[K] contiguous, in the tensor's dtype: the entries of the target at those positions."""
    numel: int
    """Entries of the tensor."""

    def __post_init__(self) -> None:
        if self.indices.dim() != 1 or self.values.shape != self.indices.shape or len(self.indices) > self.numel:
            raise ValueError(
                f"delta: indices {list(self.indices.shape)} and values {list(self.values.shape)} must be two lists of"
                f" one length of at most numel = {self.numel}"
            )
        if self.indices.dtype != index_dtype(self.numel):
            raise ValueError(f"delta: indices must be {index_dtype(self.numel)}, got {self.indices.dtype}")

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def nbytes(self) -> int:
        """Of indices and values."""
        return self.indices.nbytes + self.values.nbytes

    @property
    def density(self) -> float:
        """Share of the tensor's entries that differ, 0..1."""
        return len(self) / self.numel if self.numel else 0.0

    @staticmethod
    def between(old: Tensor, new: Tensor) -> TensorDelta:
        """The delta that turns `old` into `new`; entries differ if their bits do.

        Args:
            old: any shape; a copy of it is made for the time of the call if it is not contiguous, as for `new`.
            new: of the same shape, dtype and device.
        """
        old, new = local(old), local(new)
        if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
            raise ValueError(f"delta: cannot compare {describe(old)} with {describe(new)}")
        before, after = flat_bits(old), flat_bits(new)
        on_cpu = before.is_cpu
        indices = (
            torch.from_numpy(positions_cpu(before.numpy(), after.numpy())) if on_cpu else _positions(before, after)
        )
        return TensorDelta(indices, after[indices].view(new.dtype), new.numel())

    @torch.no_grad()
    def apply_(self, tensor: Tensor) -> None:
        """Write the values into a tensor in place; also into a Parameter, or this rank's shard of a DTensor."""
        flat, where = self._entries(tensor)
        flat[where] = bits(self.values)

    @torch.no_grad()
    def swap_(self, tensor: Tensor) -> None:
        """Exchange the values with the tensor's: both change, and a second call restores both bit for bit.

        Autograd counts it as a change in place: graphs made before the call cannot be run backward through after it.
        """
        flat, where = self._entries(tensor)
        theirs = flat[where]
        flat[where] = bits(self.values)
        bits(self.values).copy_(theirs)

    @torch.no_grad()
    def invert(self, base: Tensor) -> TensorDelta:
        """The way back from the target to `base`: the same indices (shared, not copied) and the base's values."""
        flat, where = self._entries(base, writes=False)
        return TensorDelta(self.indices, flat[where].view(base.dtype), self.numel)

    def then(self, later: TensorDelta) -> TensorDelta:
        """This from a to b and `later` from b to c make one from a to c, in memory in proportion to their sizes.

        Entries that c has back at a's value are kept; see `without_returned`.
        """
        if (self.numel, self.values.dtype) != (later.numel, later.values.dtype):
            raise ValueError(
                f"delta: cannot follow a delta of {self.numel} entries of {self.values.dtype} by one of"
                f" {later.numel} of {later.values.dtype}"
            )
        first, second = self.indices, later.indices
        slots = torch.searchsorted(second, first)
        replaced = second[slots.clamp(max=len(second) - 1)] == first if len(second) else torch.zeros_like(slots).bool()
        kept = first[~replaced]
        # Both are sorted and share no index: each one's place is its rank among its own plus among the others.
        to_first = torch.arange(len(kept), device=kept.device) + slots[~replaced]
        to_second = torch.arange(len(second), device=second.device) + torch.searchsorted(kept, second)
        indices = first.new_empty(len(kept) + len(second))
        values = bits(self.values).new_empty(len(indices))
        indices[to_first], indices[to_second] = kept, second
        values[to_first], values[to_second] = bits(self.values)[~replaced], bits(later.values)
        return TensorDelta(indices, values.view(self.values.dtype), self.numel)

    def without_returned(self, base: Tensor) -> TensorDelta:
        """Without the entries whose value is the one that `base` has there."""
        changed = bits(self.values) != bits(self.invert(base).values)
        return TensorDelta(self.indices[changed], bits(self.values)[changed].view(self.values.dtype), self.numel)

    def _entries(self, tensor: Tensor, writes: bool = True) -> tuple[Tensor, Any]:
        """Integers and an index into them, such that `integers[index]` are this delta's entries of the tensor."""
        tensor = local(tensor)
        if (tensor.numel(), tensor.dtype) != (self.numel, self.values.dtype):
            raise ValueError(f"delta: of {self.numel} entries of {self.values.dtype}, given {describe(tensor)}")
        if tensor.is_contiguous():
            return bits(tensor).view(-1), self.indices
        if writes and any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"delta: cannot write into an expanded tensor ({describe(tensor)}); pass a .clone() of it")
        return bits(tensor), torch.unravel_index(self.indices.long(), tensor.shape)


def describe(tensor: Tensor) -> str:
    """Dtype, shape and device, for error messages.

    >>> describe(torch.zeros(2, 3))
    'float32 [2, 3] on cpu'
    """
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _positions(old: Tensor, new: Tensor) -> Tensor:
    """Where two flat integer tensors on an accelerator differ."""
    found = [torch.empty(0, dtype=index_dtype(len(old)), device=old.device)]
    for start in range(0, len(old), DEVICE_CHUNK):
        differ = old[start : start + DEVICE_CHUNK] != new[start : start + DEVICE_CHUNK]
        found.append(differ.nonzero().squeeze(1).add_(start).to(found[0].dtype))
    return torch.cat(found)


def positions_cpu(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The same in numpy, int32 or int64: it compares, counts and finds several times faster than torch on a CPU."""
    dtype = np.int32 if len(before) < 2**31 else np.int64
    found, share = [np.empty(0, dtype)], 0.0
    for start in range(0, len(before), CPU_CHUNK):
        x, y = before[start : start + CPU_CHUNK], after[start : start + CPU_CHUNK]
        hits = _sparse_hits(x, y) if share < SPARSE else _dense_hits(x, y)
        share = len(hits) / len(x)
        if len(hits):
            hits += start
            found.append(hits.astype(dtype))
    return np.concatenate(found)


def _dense_hits(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """As `_sparse_hits`, looking for the differing among 8 entries at a time after all have been compared."""
    differ = x != y
    if len(x) % 8:
        return np.flatnonzero(differ)
    eights = differ.view(np.int64)
    some = np.flatnonzero(eights != 0)
    inside = np.flatnonzero(eights[some].view(np.bool_))
    return (some[inside >> 3] << 3) + (inside & 7)


def _sparse_hits(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Positions, int64, where two arrays of integers differ: words of 8 bytes first, then inside those that differ."""
    per_word = 8 // x.itemsize
    if per_word == 1 or len(x) % per_word:
        return np.flatnonzero(x != y)
    words = np.flatnonzero(x.view(np.int64) != y.view(np.int64))
    inside = np.flatnonzero(x.reshape(-1, per_word)[words] != y.reshape(-1, per_word)[words])
    return words[inside // per_word] * per_word + inside % per_word
