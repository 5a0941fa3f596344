"""Checkpoints that cost what changed: the weights as a delta against the model that the run started from.

In the YAML, with Lightning's stock `ModelCheckpoint` and this project's `SaveOnInterrupt`:

    trainer: {plugins: rlvr_lightning.checkpoint.DeltaCheckpointIO}

A checkpoint is one safetensors file (`checkpoint/file.py`) with

    weights/NAME               16-bit weights: which entries differ from the start, and by how many units in the last
                               place (`delta/codec.py`); float32 weights and adapters: whole (`checkpoint/codec.py`)
    optimizer/I/PARAMETER/KEY  tensors of the optimizers' state, whole (`checkpoint/codec.py`)
    rest                       everything else of Lightning's checkpoint, which `torch.load(weights_only=True)` reads

and metadata: `about` (step, model, dtype, LoRA, digest of the start), `entries` (coding, dtype, shape), `aliases` (tied
weights), `bytes` by part, `counts` of changed entries. Together with the start, the checksum over the file fixes every
bit, so no digest of the result is taken. Nothing in it is executed, and nothing is allocated that is larger than the
model's own tensors. Neither saving nor loading makes more than one tensor at a time.

The start must be at hand to resume: the model that the YAML names, which is checked by its digest.

Under `rlvr_lightning.strategy.Sharded` a checkpoint is a folder (`checkpoint/folder.py`) of such files, one for each
process that holds a share of the model, of what it holds. No process ever sees more. It can be read by any number of
processes, which have one tensor at a time whole if they are not as many.
"""

from __future__ import annotations

import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from rlvr_lightning.checkpoint.contents import Contents, SinceStart, report, write_container
from rlvr_lightning.checkpoint.dcp import DcpReader
from rlvr_lightning.checkpoint.file import metadata_of, sweep
from rlvr_lightning.checkpoint.folder import read_manifest
from rlvr_lightning.checkpoint.rest import from_bytes, lift_state
from rlvr_lightning.checkpoint.state import Reader
from rlvr_lightning.checkpoint.stored import InMemory, Source, StoredState, StoredWeights
from rlvr_lightning.ranks import ALONE, Ranks

Record = dict[str, Any]

__all__ = ["DeltaCheckpointIO", "SinceStart", "check_readable", "is_ours", "read", "read_file", "source"]


class DeltaCheckpointIO(TorchCheckpointIO):
    """Writes and reads delta checkpoints; also reads Lightning's ordinary ones and those of sharded runs.

    Of modules other than this project's it stores all weights whole.
    """

    def save_checkpoint(self, checkpoint: Record, path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint: it is there whole when this returns, and not at all if it raises.

        Raises:
            ValueError: the disk is full; something cannot be stored without pickling code.
        """
        if storage_options is not None:
            raise TypeError("DeltaCheckpointIO takes no storage_options; leave them out")
        if "state_dict" not in checkpoint:  # the launcher of forked processes sends bare weights home in a file
            super().save_checkpoint(checkpoint, path)
            return
        began, path = time.perf_counter(), Path(path)
        if path.parent.is_dir():
            sweep(path.parent)
        written = write_container(path, Contents.of(checkpoint))
        rank_zero_info(report(path, [written], time.perf_counter() - began))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> Record:
        """Lightning's checkpoint, with `StoredWeights` and `StoredState` in place of large dicts.

        Raises:
            ValueError: the file is damaged.
        """
        path = Path(path)
        if path.parent.is_dir():
            sweep(path.parent)
        if not path.exists():
            raise FileNotFoundError(f"checkpoint: there is no file {path}")
        if not is_ours(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read(path)


def is_ours(path: Path) -> bool:
    """Whether it is anything but a file that torch wrote."""
    return path.is_dir() or metadata_of(path) is not None or not zipfile.is_zipfile(path)


def source(path: Path, ranks: Ranks = ALONE) -> Source:
    """The tensors of a checkpoint of ours, after a check of all its bytes by all ranks together.

    Raises:
        ValueError: it is damaged.
    """
    if path.is_dir() and read_manifest(path)["kind"] == "dcp":
        return DcpReader(path, ranks)
    return Reader(path, ranks)


def read(path: Path, ranks: Ranks = ALONE) -> Record:
    """A checkpoint of ours in the form that Lightning knows; tensors are decoded when they are asked for."""
    reader = source(path, ranks)
    checkpoint = from_bytes(reader)
    checkpoint["state_dict"] = StoredWeights(reader)
    for index, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        optimizer["state"] = StoredState(reader, index, optimizer["state"])
    return checkpoint


def read_file(path: Path) -> Record:
    """A checkpoint that torch wrote, its tensors left on disk until they are used."""
    try:
        checkpoint: Record = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        optimizers, state = lift_state(checkpoint.get("optimizer_states", []))
        reader = InMemory(path, checkpoint["state_dict"], state)
    except Exception as error:  # torch raises half a dozen kinds
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"checkpoint: {path} cannot be read as one: {reason}") from None
    checkpoint["state_dict"] = StoredWeights(reader)
    for index, optimizer in enumerate(optimizers):
        optimizer["state"] = StoredState(reader, index, optimizer["state"])
    return checkpoint | ({"optimizer_states": optimizers} if optimizers else {})


def check_readable(path: str | Path | None, trainer: Trainer) -> None:
    """Raise ValueError if a path is a checkpoint that the trainer cannot read without `DeltaCheckpointIO`."""
    reads_folders = hasattr(trainer.strategy, "reads_folders")
    if not path or not Path(path).exists() or isinstance(trainer.strategy.checkpoint_io, DeltaCheckpointIO):
        return
    if Path(path).is_dir() and not reads_folders:
        raise ValueError(
            f"checkpoint: {path} is a folder of a sharded run; to read it in one process set trainer.plugins: "
            "rlvr_lightning.checkpoint.DeltaCheckpointIO"
        )
    if Path(path).is_file() and metadata_of(Path(path)) is not None:
        raise ValueError(
            f"checkpoint: {path} holds what changed since the start; to read it set trainer.plugins: "
            "rlvr_lightning.checkpoint.DeltaCheckpointIO"
        )
