"""How many bytes the optimizer keeps beside the weights, counted rather than inferred from the optimizer's name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rlvr_lightning.callbacks.run_files import exact
from rlvr_lightning.callbacks.tensors import ByteCounter, first_copy, held_bytes


@dataclass(frozen=True)
class StateEntry:
    """What one key of the optimizer's state holds in one dtype, summed over the parameters."""

    key: str
    """The name in `optimizer.state[parameter]`, for example `exp_avg`."""
    dtype: str
    """For example `float32`."""
    local_bytes: int
    """Bytes in this process."""
    owned_bytes: int
    """Bytes of which this rank holds the first copy; their sum over ranks is what one process alone would hold."""


def _tensors(value: Any, first_rank: bool) -> Iterator[tuple[Tensor, bool]]:
    """Plain tensors in a value of a state, local parts of sharded ones; and whether this rank's is the first copy."""
    if isinstance(value, DTensor):
        yield from _tensors(value.to_local(), first_copy(value))
    elif is_traceable_wrapper_subclass(value):  # quantised states: codes and scales
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors(getattr(value, name), first_rank)
    elif isinstance(value, Tensor):
        yield value, first_rank
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, first_rank)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item, first_rank)


def count_state(optimizer: Optimizer, counter: ByteCounter | None = None, first_rank: bool = True) -> list[StateEntry]:
    """The bytes of an optimizer's state by key and dtype; every tensor found by walking `optimizer.state`.

    A storage seen twice counts once. Of a replicated DTensor one rank owns the copy; plain tensors, such as counts of
    steps, are taken to be the same in all processes, of which the first owns them.

    Args:
        optimizer: any torch optimizer.
        counter: shared between calls when several optimizers may share storages.
        first_rank: whether this is the first process.

    >>> weight = torch.nn.Parameter(torch.zeros(5, 7))
    >>> adamw = torch.optim.AdamW([weight])
    >>> weight.grad = torch.ones(5, 7)
    >>> adamw.step()
    >>> [(entry.key, entry.dtype, entry.local_bytes) for entry in count_state(adamw)]
    [('exp_avg', 'float32', 140), ('exp_avg_sq', 'float32', 140), ('step', 'float32', 4)]
    """
    counter = counter or ByteCounter()
    totals: dict[tuple[str, str], list[int]] = {}
    for state in optimizer.state.values():
        for key, value in state.items() if isinstance(state, dict) else [("state", state)]:
            for tensor, first in _tensors(value, first_rank):
                size = counter.add(tensor)
                total = totals.setdefault((str(key), str(tensor.dtype).removeprefix("torch.")), [0, 0])
                total[0] += size
                total[1] += size if first else 0
    return [StateEntry(key, dtype, *totals[key, dtype]) for key, dtype in sorted(totals)]


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of optimizer state in this process.

    >>> optimizer_state_bytes(torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))]))
    0
    """
    return sum(entry.local_bytes for entry in count_state(optimizer))


class OptimizerState(Callback):
    """Logs what the optimizer, the weights and the gradients hold, in bytes.

    =================================  ==================================================================
    logged key                         unit and meaning
    =================================  ==================================================================
    `memory/optimizer_state_bytes`     bytes of state tensors after the step, all optimizers
    `memory/weights_bytes`             bytes of the module's parameters, tied ones once
    `memory/gradients_bytes`           bytes of gradients just before the last optimizer step of the
                                       batch; 0 when none are kept, as with updates applied in the
                                       backward pass
    `memory/<any of them>_rank_bytes`  in several processes: the same in the one that holds most of it
    =================================  ==================================================================

    Figures without `rank` are of one copy of the model over all processes, shards added up and replicas counted once:
    what one process alone would hold. Rows that fill up uneven shards hold nothing and are not counted. Shards are
    known by being DTensors (FSDP2); plain tensors are taken to be the same in all processes, as they are under DDP.
    `summary` gives the state by key and dtype.
    """

    def __init__(self) -> None:
        self._gradients_bytes = (0, 0)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients are all there now, and may be gone after the step."""
        gradients = (p.grad for p in pl_module.parameters() if p.grad is not None)
        self._gradients_bytes = held_bytes(gradients, trainer.is_global_zero)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the figures of this batch."""
        entries = self._entries(trainer)
        held = {
            "optimizer_state": (sum(e.local_bytes for e in entries), sum(e.owned_bytes for e in entries)),
            "weights": held_bytes(pl_module.parameters(), trainer.is_global_zero),
            "gradients": self._gradients_bytes,
        }
        in_all = _reduced(trainer, [owned for _, owned in held.values()], "sum")
        figures = {f"memory/{name}_bytes": size for name, size in zip(held, in_all, strict=True)}
        if trainer.world_size > 1:
            most = _reduced(trainer, [local for local, _ in held.values()], "max")
            figures |= {f"memory/{name}_rank_bytes": size for name, size in zip(held, most, strict=True)}
        pl_module.log_dict(exact(figures))

    def summary(self, trainer: Trainer, reduce: bool = True) -> dict[str, Any]:
        """The state by key and dtype of this process, `local_bytes`, and of all, `global_bytes`.

        Args:
            trainer: the trainer, while its optimizers exist.
            reduce: sum over ranks; then every rank must call.
        """
        entries = self._entries(trainer)
        by_key: dict[str, dict[str, int]] = {}
        for entry in entries:
            by_key.setdefault(entry.key, {})[entry.dtype] = entry.local_bytes
        result: dict[str, Any] = {"local_bytes": sum(entry.local_bytes for entry in entries), "by_key_bytes": by_key}
        if reduce:
            (result["global_bytes"],) = _reduced(trainer, [sum(entry.owned_bytes for entry in entries)], "sum")
        return result

    @staticmethod
    def _entries(trainer: Trainer) -> list[StateEntry]:
        counter = ByteCounter()
        first = trainer.is_global_zero
        return [entry for optimizer in trainer.optimizers for entry in count_state(optimizer, counter, first)]


def _reduced(trainer: Trainer, sizes: list[int], how: str) -> list[int]:
    """Sums, or maxima, over all processes."""
    there = torch.tensor(sizes, device=trainer.strategy.root_device)
    return [int(size) for size in trainer.strategy.reduce(there, reduce_op=how).tolist()]
