"""Local parts of tensors that may be sharded, and counting bytes without counting a storage twice."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds: the local shard of a DTensor, any other tensor as it is; detached."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def first_copy(tensor: Tensor, first_rank: bool = True) -> bool:
    """Whether this rank holds the first copy of its part; False on the other ranks a tensor is replicated over.

    Args:
        tensor: a DTensor says itself how it is spread; any other is taken to be the same in all processes.
        first_rank: whether this is the process that counts those others.
    """
    if not isinstance(tensor, DTensor):
        return first_rank
    mesh = tensor.device_mesh
    coordinate, names = mesh.get_coordinate(), mesh.mesh_dim_names or ()
    if coordinate is None:
        return False
    whole = mesh._get_root_mesh()  # of a mesh of more dimensions, tensors on some of them are the same along the others
    others = [name for name in whole.mesh_dim_names or () if name not in names] if names else []
    return all(whole.get_local_rank(name) == 0 for name in others) and all(
        at == 0 for at, place in zip(coordinate, tensor.placements, strict=True) if place.is_replicate()
    )


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors without those that alias an earlier one whole (tied weights)."""
    seen: set[object] = set()
    kept = []
    for tensor in tensors:
        part = local_part(tensor)
        key: object = (part.device, part.data_ptr(), part.numel()) if part.numel() and part.data_ptr() else id(tensor)
        if key not in seen:
            seen.add(key)
            kept.append(tensor)
    return kept


class ByteCounter:
    """Adds up bytes; a storage never counts for more than it holds, however many tensors look at it.

    >>> counter, weight = ByteCounter(), torch.zeros(3, 5)
    >>> counter.add(weight), counter.add(weight.t())
    (60, 0)
    """

    def __init__(self) -> None:
        self._left: dict[tuple[torch.device, int], int] = {}

    def add(self, tensor: Tensor) -> int:
        """Bytes that this tensor's local part holds and no earlier tensor has accounted for."""
        part = local_part(tensor)
        storage = part.untyped_storage()
        key = (part.device, storage.data_ptr())
        left = self._left.get(key, storage.nbytes())
        size = min(part.numel() * part.element_size(), left)
        self._left[key] = left - size
        return size


def held_bytes(tensors: Iterable[Tensor], first_rank: bool = True) -> tuple[int, int]:
    """Bytes of the local parts of some tensors, shared storages once; and of them those of a first copy.

    The second figures of all processes add up to what one process alone would hold.
    """
    counter = ByteCounter()
    held = owned = 0
    for tensor in tensors:
        size = counter.add(tensor)
        held += size
        owned += size if first_copy(tensor, first_rank) else 0
    return held, owned


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the local parts of some tensors, shared storages once."""
    return held_bytes(tensors)[0]
