"""What sharding costs: the bytes of gathered weights and unreduced gradients, and what goes between processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rlvr_lightning.profiling.allocations import AllocationCounter

GATHERED, REDUCING = "gathered", "reducing"


class ShardingCounter(AllocationCounter):
    """Counts bytes by owner, and bytes that a process receives, both by phase.

    Owners that it finds by itself: `gathered`, weights of all processes and the buffers they arrive in; `reducing`,
    gradients of whole layers on the way to their shards, and the buffers they leave from.
    """

    def __init__(self, default: str = "other", classify: Callable[[str, int], str] | None = None) -> None:
        super().__init__(default, classify)
        self.phase = ""
        """Of the step, as whoever counts it says."""
        self.most: Counter[tuple[str, str]] = Counter()
        """(phase, owner) -> the most bytes that the owner had at once, of `gathered` and `reducing`."""
        self.traffic: Counter[tuple[str, str]] = Counter()
        """(phase, collective) -> bytes received by this process; see `received_bytes`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; look at those of FSDP and of process groups."""
        if func.namespace == "c10d":
            self.traffic[self.phase, func._opname] += received_bytes(func._opname, args)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "fsdp":
            given = (kwargs or {}).get("out", [])
            if func._opname == "chunk_cat":  # whole gradients into the buffer that is reduced
                self.own(REDUCING, [*args[0], given])
            else:  # shards into the buffer that is gathered; or from it into whole weights
                self.own(GATHERED, [args[0] if given else args[1], *given])
        for owner in (GATHERED, REDUCING):
            held = self._by_owner[owner]
            if held > self.most[self.phase, owner]:
                self.most[self.phase, owner] = held
        return out


def received_bytes(collective: str, args: Any) -> int:
    """Bytes that a process receives in a collective, if each part comes straight from its owner, or goes in a ring.

    An all-gather or reduce-scatter of S bytes among n processes brings S (n - 1) / n to each, and takes as much from
    it; an all-reduce is one of each.

    Args:
        collective: name of an operation of torch's `c10d`.
        args: its arguments, tensors and group among them.

    Raises:
        ValueError: it is not known here, so its bytes would be missing.
    """
    size = _group_size(args)
    first, second = ([t for t in tree_leaves(arg) if isinstance(t, Tensor)] for arg in (*args, (), ())[:2])
    whole = sum(t.nbytes for t in first)
    if collective in ("_allgather_base_", "allgather_"):
        return whole * (size - 1) // size
    if collective == "_reduce_scatter_base_":
        return sum(t.nbytes for t in second) * (size - 1) // size
    if collective == "allreduce_":
        return 2 * whole * (size - 1) // size
    if collective in ("broadcast_", "gather_"):
        return whole
    if collective == "barrier":
        return 0
    raise ValueError(f"traffic: how many bytes c10d::{collective} brings is not known; add it to received_bytes")


def _group_size(args: Any) -> int:
    for arg in args:
        if type(arg).__name__ == "ScriptObject":
            try:
                return int(dist.ProcessGroup.unbox(arg).size())
            except RuntimeError:  # another object, such as the operation of a reduction
                continue
    return 1
