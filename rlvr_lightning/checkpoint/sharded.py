"""Checkpoints of a model that is spread over processes: a folder that all write, or one file that the first writes.

Lightning's own are not used: for optimizer states torch takes a step with a full set of zero gradients (a real one to
optimizers that count, or tell what they change), and states of plain SGD cannot be read back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rlvr_lightning.checkpoint.contents import Contents, Written, report, write_container
from rlvr_lightning.checkpoint.dcp import save_tensors
from rlvr_lightning.checkpoint.file import sweep, temporary_name
from rlvr_lightning.checkpoint.folder import agree, remove_whole, tried, write_folder
from rlvr_lightning.checkpoint.io import DeltaCheckpointIO, is_ours, read, read_file
from rlvr_lightning.checkpoint.rest import to_bytes
from rlvr_lightning.checkpoint.restore import restore_
from rlvr_lightning.checkpoint.start import first_names
from rlvr_lightning.checkpoint.stored import everything
from rlvr_lightning.delta.writer import sync_folder
from rlvr_lightning.ranks import Ranks

Record = dict[str, Any]


class ShardedCheckpoints(ModelParallelStrategy):
    """Saves and loads; `Sharded` is this and the sharding itself.

    What was saved by any number of processes, sharded or not, is loaded by any other.
    """

    reads_folders = True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning calls `load_optimizer_state_dict`."""
        return True

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """The trainer's plugin that says what checkpoints hold; ours, or none."""
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        if not isinstance(io, DeltaCheckpointIO):
            raise ValueError(
                f"trainer.plugins: {type(io).__name__} is not for a sharded model; leave it out, or set it to "
                "rlvr_lightning.checkpoint.DeltaCheckpointIO"
            )
        if not self._save_distributed_checkpoint:
            raise ValueError("trainer.strategy.checkpoints: consolidated is not for DeltaCheckpointIO; leave it out")
        if getattr(self, "tensor", 1) > 1:
            raise ValueError("trainer.strategy.tensor: above 1 is not for DeltaCheckpointIO; leave trainer.plugins out")
        self._checkpoint_io = io

    def _group(self, axis: str | None = None) -> Ranks:
        """All processes, or those along an axis of the mesh."""
        if axis is None:
            return Ranks(rank=self.global_rank, size=self.world_size, group=dist.group.WORLD, device=self.root_device)
        mesh = self.device_mesh[axis]
        return Ranks(rank=mesh.get_local_rank(), size=mesh.size(), group=mesh.get_group(), device=self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The live weights, as shards."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The live state, as shards."""
        return (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    def save_checkpoint(self, checkpoint: Record, filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, all ranks together: it is there whole when this returns.

        Raises:
            ValueError: on all ranks: one cannot write.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options; leave them out")
        path, world = Path(self.broadcast(filepath)), self._group()
        delta = isinstance(self.checkpoint_io, DeltaCheckpointIO)
        if delta:
            self._save_delta(Contents.of(checkpoint), path, world)
        elif self._save_distributed_checkpoint:
            self._save_shards(Contents.of(checkpoint), path, world)
        else:
            collected = gathered(checkpoint, keep=world.rank == 0)
            agree(world, tried(lambda: save_file(collected, path))[1] if world.rank == 0 else None)

    def _save_delta(self, contents: Contents, path: Path, world: Ranks) -> None:
        began, shards = time.perf_counter(), self._group("shard")
        made: list[Written] = []

        def write(folder: Path) -> dict[str, str]:
            if self.device_mesh["replicate"].get_local_rank():  # another has the same
                return {}
            file = folder / f"shard-{shards.rank:05d}.safetensors"
            made.append(write_container(file, contents, shards))
            return {file.name: made[-1].checksum}

        write_folder(path, world, write, _manifest("delta", contents))
        written = [one for some in world.gather(made) for one in some]
        rank_zero_info(report(path, written, time.perf_counter() - began))

    def _save_shards(self, contents: Contents, path: Path, world: Ranks) -> None:
        began = time.perf_counter()
        last = to_bytes(contents.rest)
        write_folder(
            path, world, lambda folder: save_tensors(folder, contents.tensors, last, world), _manifest("dcp", contents)
        )
        rank_zero_info(f"checkpoint {path.name}: in {time.perf_counter() - began:.1f} s by {world.size} processes")

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> Record:
        """Lightning's checkpoint, whose tensors are read when `load_model_state_dict` and the like ask for them.

        Raises:
            ValueError: it is damaged.
        """
        path, world = Path(self.broadcast(checkpoint_path)), self._group()
        if world.rank == 0 and path.parent.is_dir():
            sweep(path.parent)
        agree(world, None if path.exists() else f"checkpoint: there is no {path}")
        return read(path, world) if is_ours(path) else read_file(path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give the module its weights, one tensor at a time."""
        module: Any = self.lightning_module
        start, reference = getattr(module, "start", None), getattr(module, "reference", None)
        restore_(module, checkpoint["state_dict"].reader, start, reference, self._group("shard"))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give the optimizers their state, sharded as the parameters are."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            keys = chain.from_iterable(group["params"] for group in saved["param_groups"])
            parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
            saved["state"].for_parameters(dict(zip(keys, parameters, strict=False)))
            optimizer.load_state_dict(saved)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a checkpoint: a kill leaves it whole or gone."""
        if self.is_global_zero:
            remove_whole(Path(filepath))


def _manifest(kind: str, contents: Contents) -> Any:
    return lambda: {"kind": kind, "about": contents.about, "aliases": contents.aliases}


def gathered(checkpoint: Record, keep: bool) -> Record:
    """A checkpoint as a single process would have made it; all ranks together.

    Args:
        checkpoint: with shards.
        keep: whether this rank wants it; the others only help.
    """
    names, aliases = first_names(checkpoint["state_dict"])

    def collect(tensor: Tensor) -> Tensor | None:
        found = everything(tensor)
        return found.cpu() if keep else None

    found = {name: collect(checkpoint["state_dict"][name]) for name in names}
    states = [
        {
            **optimizer,
            "state": {
                key: {name: collect(value) if isinstance(value, DTensor) else value for name, value in values.items()}
                for key, values in optimizer["state"].items()
            },
        }
        for optimizer in checkpoint.get("optimizer_states", [])
    ]
    weights = {name: found[aliases.get(name, name)] for name in checkpoint["state_dict"]}
    return {**checkpoint, "state_dict": weights, **({"optimizer_states": states} if states else {})}


def save_file(checkpoint: Record, path: Path) -> None:
    """Write what `torch.load` and Lightning read; it is there whole when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    temporary = path.parent / temporary_name(path)
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir():
            remove_whole(path)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
