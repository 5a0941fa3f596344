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
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the group's tensors live."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Of all ranks' tensors, which are of one shape and dtype; a new one, on the tensor's device."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

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

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        if self.size == 1:
            return tensor
        there = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(there, op=how, group=self.group)
        return there.to(tensor.device)


ALONE = Ranks()
