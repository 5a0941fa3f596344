"""A fixed random sample of the entries of some tensors, kept beside a run at a bounded cost. Knows no Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rlvr_lightning.callbacks.tensors import local_part


class EntrySample:
    """Positions drawn from the local parts of some tensors, in proportion to their sizes but some of each.

    Args:
        tensors: parameters, sharded or not; all on one device.
        entries: how many positions in all; each tensor gets its share, at least `LEAST` or all it has.
        seed: of the drawing; the same for the same sizes gives the same positions.

    >>> sample = EntrySample([torch.zeros(3, 5), torch.zeros(7)], entries=1000)
    >>> [len(positions) for positions in sample.positions], sample.entries
    ([15, 7], 22)
    """

    LEAST = 64
    """Positions of a tensor that is small beside the others, such as a norm."""

    def __init__(self, tensors: Sequence[Tensor], entries: int, seed: int = 0) -> None:
        sizes = [local_part(tensor).numel() for tensor in tensors]
        total = max(sum(sizes), 1)
        counts = [min(size, max(self.LEAST, entries * size // total)) for size in sizes]
        generator = torch.Generator().manual_seed(seed)
        self.positions = [
            _draw(size, count, generator).to(tensor.device)
            for tensor, size, count in zip(tensors, sizes, counts, strict=True)
        ]
        ends = torch.tensor([0, *counts]).cumsum(0).tolist()
        self.places = [slice(start, end) for start, end in pairwise(ends)]
        self.entries = ends[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the positions."""
        return sum(positions.nbytes for positions in self.positions)

    def of(self, index: int, tensor: Tensor) -> Tensor:
        """The sampled entries of a tensor.

        Args:
            index: which of the tensors it goes with.
            tensor: of that one's shape, sharded as it is.

        Returns:
            [entries], its own dtype.
        """
        return local_part(tensor).reshape(-1)[self.positions[index]]


def _draw(size: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different positions below `size`, ascending; int64."""
    if count == size:
        return torch.arange(size)
    drawn = torch.randint(size, (count + count // 8 + 8,), generator=generator).unique()
    while len(drawn) < count:  # some fell on the same position
        drawn = torch.cat([drawn, torch.randint(size, (count,), generator=generator)]).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:count]].sort().values
