"""The processes that share some work, and the few things they tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Processes that call each of these methods together, in the same order; by default this one alone.

    Example:
        >>> alone = Ranks()
        >>> alone.most(3), alone.any(False), alone.gather("x"), alone.sum(torch.tensor([2.0])).tolist()
        (3, False, ['x'], [2.0])
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    """A process group of torch, where size is above 1."""
    copies: int = 1
    """Of the ranks, how many hold each part of a tensor that is not split between tensor-parallel ranks."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the group's tensors live."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Of all ranks' tensors, which are of one shape and dtype; a new one, on the tensor's device."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def copies_of(self, tensor: Tensor) -> int:
        """How many of the ranks hold each part of a tensor."""
        if self.copies == 1:
            return 1
        mesh, placements = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", ())
        names = () if mesh is None else mesh.mesh_dim_names
        split = any(name == "tensor" and place.is_shard() for name, place in zip(names, placements, strict=False))
        return 1 if split else self.copies

    def most(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        return number if self.size == 1 else int(self._reduced(torch.tensor(number), dist.ReduceOp.MAX))

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.most(int(flag)))

    def gather(self, value: Value) -> list[Value]:
        """All ranks' values, in the order of ranks; of anything that pickles, so nothing large."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, value: Value) -> Value:
        """The first rank's value, on all; of anything that pickles."""
        return self.gather(value)[0]

    def same_(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor, of one shape on all ranks, with the first rank's; returns it."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        if self.size == 1:
            return tensor
        there = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(there, op=how, group=self.group)
        return there.to(tensor.device)


ALONE = Ranks()
