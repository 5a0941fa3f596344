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
from rlvr_lightning.callbacks.tensors import ByteCounter, first_copy, total_bytes


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
    """Bytes of which this rank holds the first copy; their sum over ranks is the global figure."""


def _tensors(value: Any) -> Iterator[Tensor]:
    if is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor):  # quantised states: codes and scales
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item)


def count_state(optimizer: Optimizer, counter: ByteCounter | None = None) -> list[StateEntry]:
    """The bytes of an optimizer's state by key and dtype; every tensor found by walking `optimizer.state`.

    A storage seen twice counts once. Of a replicated DTensor only one rank owns the copy; plain tensors are owned by
    every rank, since each really holds them.

    Args:
        optimizer: any torch optimizer.
        counter: shared between calls when several optimizers may share storages.

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
            for tensor in _tensors(value):
                size = counter.add(tensor)
                total = totals.setdefault((str(key), str(tensor.dtype).removeprefix("torch.")), [0, 0])
                total[0] += size
                total[1] += size if first_copy(tensor) else 0
    return [StateEntry(key, dtype, *totals[key, dtype]) for key, dtype in sorted(totals)]


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of optimizer state in this process.

    >>> optimizer_state_bytes(torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))]))
    0
    """
    return sum(entry.local_bytes for entry in count_state(optimizer))


class OptimizerState(Callback):
    """Logs what the optimizer, the weights and the gradients hold, in bytes of this process.

    ===============================  ====================================================================
    logged key                       unit and meaning
    ===============================  ====================================================================
    `memory/optimizer_state_bytes`   bytes of state tensors after the step, all optimizers
    `memory/weights_bytes`           bytes of the module's parameters, tied ones once
    `memory/gradients_bytes`         bytes of gradients just before the last optimizer step of the batch;
                                     0 when none are kept, as with updates applied in the backward pass
    ===============================  ====================================================================

    Sharded parameters count as their local shard. `summary` gives the state by key and dtype, and the global total.
    """

    def __init__(self) -> None:
        self._gradients_bytes = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients are all there now, and may be gone after the step."""
        self._gradients_bytes = total_bytes(p.grad for p in pl_module.parameters() if p.grad is not None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the three figures of this batch."""
        state = sum(entry.local_bytes for entry in self._entries(trainer))
        pl_module.log_dict(
            exact(
                {
                    "memory/optimizer_state_bytes": state,
                    "memory/weights_bytes": total_bytes(pl_module.parameters()),
                    "memory/gradients_bytes": self._gradients_bytes,
                }
            )
        )

    def summary(self, trainer: Trainer, reduce: bool = True) -> dict[str, Any]:
        """The state by key and dtype, local and global.

        Args:
            trainer: the trainer, while its optimizers exist.
            reduce: sum over ranks; then every rank must call.
        """
        entries = self._entries(trainer)
        owned = torch.tensor(sum(entry.owned_bytes for entry in entries), device=trainer.strategy.root_device)
        by_key: dict[str, dict[str, int]] = {}
        for entry in entries:
            by_key.setdefault(entry.key, {})[entry.dtype] = entry.local_bytes
        result: dict[str, Any] = {"local_bytes": sum(entry.local_bytes for entry in entries), "by_key_bytes": by_key}
        if reduce:
            result["global_bytes"] = int(trainer.strategy.reduce(owned, reduce_op="sum"))
        return result

    @staticmethod
    def _entries(trainer: Trainer) -> list[StateEntry]:
        counter = ByteCounter()
        return [entry for optimizer in trainer.optimizers for entry in count_state(optimizer, counter)]
