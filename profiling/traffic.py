"""How many bytes a process receives for one optimizer step of a sharded model: closed forms. Pure.

Notation: n processes in a group of shards, r replicas of it; a unit is a decoder layer, or what is around them, the
`rest`; g bytes an entry of gathered weights (the dtype of arithmetic), q bytes an entry of reduced gradients. A process
receives (n - 1) / n of what an all-gather or a reduce-scatter carries, twice that in an all-reduce. W is all units.

=============================  ======================================================================================
rollout, `once`                every unit once: W
rollout, `layers`              every layer in every forward pass, the rest once
reference                      W for every micro-batch of prompts
forward                        W for every micro-batch
backward                       every layer again; the rest is still there
gradients                      every unit once for every micro-batch, q bytes an entry
gradients between replicas     an all-reduce of the shard, over r
=============================  ======================================================================================

The optimizer sends nothing: each process steps its own shards. Rows of a weight are dealt out in equal numbers, so the
last ones are filled up, and the filling travels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Shapes = Sequence[tuple[int, ...]]


def padded_entries(shapes: Shapes, processes: int) -> int:
    """Entries of some tensors whose first dimension is filled up to a multiple of the processes.

    >>> padded_entries([(5, 3), (4,)], 4)  # 8 rows of 3, and 4
    28
    """
    return sum(math.prod((-(-shape[0] // processes) * processes, *shape[1:])) for shape in shapes)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step."""

    units: Sequence[Shapes]
    """Shapes of the weights in each decoder layer; those around them last."""
    shards: int
    replicas: int = 1
    gathered_bytes: int = 2
    """Of an entry of weights."""
    reduced_bytes: int = 4
    """Of an entry of gradients."""
    micro_batches: int = 1
    """Forward and backward passes of a process."""
    reference_passes: int = 0
    rollout_passes: int | None = None
    """Forward passes of the rollout if it gathers `layers`; None gathers `once`."""

    def received_bytes(self) -> dict[str, int]:
        """What a process receives, by purpose."""
        *layers, rest = (padded_entries(unit, self.shards) for unit in self.units)
        share = (self.shards - 1) * self.gathered_bytes
        whole, inner = (sum(layers) + rest) * share // self.shards, sum(layers) * share // self.shards
        reduced = (sum(layers) + rest) * self.reduced_bytes // self.shards
        found = {
            "weights, rollout": whole if self.rollout_passes is None else whole + inner * (self.rollout_passes - 1),
            "weights, reference": whole * self.reference_passes,
            "weights, forward": whole * self.micro_batches,
            "weights, backward": inner * self.micro_batches,
            "gradients": reduced * (self.shards - 1) * self.micro_batches,
            "gradients between replicas": 2 * reduced * (self.replicas - 1) // self.replicas * self.micro_batches,
        }
        return {name: size for name, size in found.items() if size}
