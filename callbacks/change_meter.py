"""Counts what one optimizer's steps change; knows tensors and files, no Lightning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlvr_lightning.callbacks.change_counts import count_changed
from rlvr_lightning.callbacks.snapshots import Snapshot
from rlvr_lightning.callbacks.tensors import distinct, first_copy


@contextmanager
def one_thread() -> Iterator[None]:
    """Without torch's own threads: chunks are small, and where cores are busy threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class ChangeMeter:
    """Compares an optimizer's parameters with what they were before a step and at the start.

    Args:
        optimizer: its distinct parameters are counted; the frozen ones as entries that do not change, those of groups
            that are marked as a `critic` not at all.
        names: the name of a parameter by its id().
        definitions: which definitions of "changed".
        folder: where the old values wait.
        total: also compare with the values of now, the start.
        first_rank: whether this process counts parameters that all processes hold alike.

    Raises:
        OSError: the files cannot be kept.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: Mapping[int, str],
        definitions: Sequence[str],
        folder: Path,
        total: bool = True,
        first_rank: bool = True,
    ) -> None:
        groups = [group for group in optimizer.param_groups if not group.get("critic")]
        parameters = distinct(p for group in groups for p in group["params"])
        self.names = [names.get(id(p), "") for p in parameters]
        self.frozen = {row: p.numel() for row, p in enumerate(parameters) if not p.requires_grad}
        self.definitions = list(definitions)
        # Plain parameters are the same in all processes (DDP): the first counts them. Of shards, each counts its own.
        self._here = [row for row, p in enumerate(parameters) if row not in self.frozen and first_copy(p, first_rank)]
        live = [parameters[row] for row in self._here]
        self._before = Snapshot(folder, live)
        self._start = Snapshot(folder, live) if total else None
        if self._start:
            self._start.write()

    def before_step(self) -> None:
        """Keep the values of now; OSError if that fails."""
        self._before.write()

    def empty(self) -> Tensor:
        """Zeros of the shape that `counts` returns."""
        return torch.zeros(1 + bool(self._start), len(self.names), 1 + len(self.definitions), 2, dtype=torch.int64)

    def counts(self) -> Tensor:
        """What changed, as counted by this process; summed over processes it is the whole.

        Returns:
            int64 [1 or 2, parameters, 1 + definitions, 2]: since `before_step`, and since the start; the rest as in
            `count_changed`. Frozen parameters are left at 0.

        Raises:
            OSError: a file cannot be read.
        """
        counts = self.empty()
        snapshots = [self._before] + ([self._start] if self._start else [])
        with one_thread():
            for part, snapshot in zip(counts, snapshots, strict=True):
                for index, old, new in snapshot.compare():
                    part[self._here[index]] += count_changed(old, new, self.definitions)
        return counts

    def close(self) -> None:
        """Give the disk back."""
        self._before.close()
        if self._start:
            self._start.close()
