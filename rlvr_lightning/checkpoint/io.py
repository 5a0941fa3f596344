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
"""

from __future__ import annotations

import math
import time
import zipfile
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlvr_lightning.checkpoint.file import Writer, metadata_of, sweep
from rlvr_lightning.checkpoint.rest import from_bytes, lift_state, to_bytes
from rlvr_lightning.checkpoint.restore import restore_
from rlvr_lightning.checkpoint.start import Start, about_model, first_names
from rlvr_lightning.checkpoint.state import DELTA, WHOLE, Reader, StoredState, StoredWeights, delta_blobs, whole_blobs
from rlvr_lightning.delta.codec import SEGMENT, UNCHANGED
from rlvr_lightning.reference import Reference

Record = dict[str, Any]


class SinceStart(dict[str, Tensor]):
    """A state dict that knows of which model it is, and what it started from."""

    about: Record
    start: Start | None = None


class DeltaCheckpointIO(TorchCheckpointIO):
    """Writes and reads delta checkpoints; also reads Lightning's ordinary ones.

    Of modules other than this project's it stores all weights whole.
    """

    def save_checkpoint(self, checkpoint: Record, path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint: it is there whole when this returns, and not at all if it raises.

        Raises:
            ValueError: the disk is full; weights are sharded; something cannot be stored without pickling code.
        """
        if storage_options is not None:
            raise TypeError("DeltaCheckpointIO takes no storage_options; leave them out")
        if "state_dict" not in checkpoint:  # the launcher of forked processes sends bare weights home in a file
            super().save_checkpoint(checkpoint, path)
            return
        began, path = time.perf_counter(), Path(path)
        weights = checkpoint["state_dict"]
        start = weights.start if isinstance(weights, SinceStart) else None
        names, aliases = first_names(weights)
        known = set(start.names()) if start else set()
        entries = {f"weights/{name}": (DELTA if name in known else WHOLE, weights[name]) for name in names}
        optimizers, state = lift_state(checkpoint.get("optimizer_states", []))
        entries |= {name: (WHOLE, tensor) for name, tensor in state.items()}
        for name, (_, tensor) in entries.items():
            if isinstance(tensor, DTensor):
                raise ValueError(f"DeltaCheckpointIO: {name!r} is sharded; use the strategy's own checkpoints")
        rest = {name: value for name, value in checkpoint.items() if name != "state_dict"}
        if "optimizer_states" in rest:
            rest["optimizer_states"] = optimizers
        about = {"step": checkpoint.get("global_step"), **(weights.about if isinstance(weights, SinceStart) else {})}
        metadata = {"about": about, "entries": {n: _spec(*e) for n, e in entries.items()}, "aliases": aliases}
        last = to_bytes(rest)
        if path.parent.is_dir():
            sweep(path.parent)
        counts = {"changed": 0, "in_base": sum(weights[name].numel() for name in names if name in known)}
        with Writer(path, [*entries, "rest"], metadata) as writer:
            for name, (coding, tensor) in entries.items():
                if coding == DELTA and start is not None:
                    counts["changed"] += write_delta(writer, name, start, tensor)
                else:
                    for blob in whole_blobs(tensor.cpu()):
                        writer.write(name, blob)
            writer.write("rest", last)
            parts = bytes_by_part(writer.sizes, metadata["entries"])
            total = writer.finish(bytes=parts, counts=counts)
        rank_zero_info(report(path, total, parts, counts, time.perf_counter() - began))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> Record:
        """Lightning's checkpoint, with `StoredWeights` and `StoredState` in place of large dicts.

        Raises:
            ValueError: the file is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint: there is no file {path}")
        sweep(path.parent)
        if metadata_of(path) is None and not _looks_like_ours(path):
            return super().load_checkpoint(path, map_location, weights_only)
        reader = Reader(path)
        checkpoint = from_bytes(reader)
        checkpoint["state_dict"] = StoredWeights(reader)
        for index, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
            optimizer["state"] = StoredState(reader, index, optimizer["state"])
        return checkpoint


class DeltaCheckpoints(LightningModule):
    """What a module needs so that its checkpoints can be deltas: call `remember_start` when the weights are there."""

    start: Start | None = None
    counts: tuple[str, ...] = ()
    """Names of attributes, integers, that checkpoints hold as well."""

    def remember_start(self, reference: Reference | None = None) -> None:
        """The weights are now what the run starts from; nothing is done unless `DeltaCheckpointIO` will need it."""
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if isinstance(trainer.strategy.checkpoint_io, DeltaCheckpointIO):
            folder = Path(trainer.log_dir or trainer.default_root_dir)  # every rank must ask
            self.start = Start(self, reference, folder if trainer.is_global_zero else None)

    def on_save_checkpoint(self, checkpoint: Record) -> None:
        """Say what the weights started from, and keep the counts."""
        checkpoint |= {name: getattr(self, name) for name in self.counts}
        if isinstance(self.trainer.strategy.checkpoint_io, DeltaCheckpointIO):
            weights = checkpoint["state_dict"] = SinceStart(checkpoint["state_dict"])
            weights.about, weights.start = about_model(self), self.start
            if self.start is not None:
                weights.about["base_digest"] = self.start.digest

    def on_load_checkpoint(self, checkpoint: Record) -> None:
        """Put weights in place one tensor at a time, and let the reference follow, before they are overwritten."""
        reference: Reference | None = getattr(self, "reference", None)
        for name in self.counts:
            setattr(self, name, checkpoint.get(name, 0))
        weights = checkpoint["state_dict"]
        if isinstance(weights, StoredWeights):
            restore_(self, weights.reader, self.start, reference)
            checkpoint["state_dict"] = self.state_dict()
        elif reference is not None:
            reference.rebase({p: weights[name] for name, p in self.named_parameters() if name in weights})


def check_readable(path: str | Path | None, trainer: Trainer) -> None:
    """Raise ValueError if a path is a delta checkpoint and the trainer has no `DeltaCheckpointIO` to read it."""
    if not path or not Path(path).is_file() or isinstance(trainer.strategy.checkpoint_io, DeltaCheckpointIO):
        return
    if metadata_of(Path(path)) is not None:
        raise ValueError(
            f"checkpoint: {path} holds what changed since the start; to read it set trainer.plugins: "
            "rlvr_lightning.checkpoint.DeltaCheckpointIO"
        )


def write_delta(writer: Writer, name: str, start: Start, tensor: Tensor) -> int:
    """Write what changed of a parameter; returns how many entries."""
    base = start.value(name.removeprefix("weights/"))
    if base is None:  # frozen
        for _ in range(0, tensor.numel(), SEGMENT):
            writer.write(name, bytes([UNCHANGED]))
        return 0
    changed = 0
    for blob, count in delta_blobs(base.cpu(), tensor.cpu()):
        writer.write(name, blob)
        changed += count
    return changed


def _spec(coding: str, tensor: Tensor) -> list[Any]:
    return [coding, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _looks_like_ours(path: Path) -> bool:
    """Whether it is anything but the zip file that torch writes."""
    return not zipfile.is_zipfile(path)


def bytes_by_part(sizes: dict[str, int], specs: dict[str, list[Any]]) -> dict[str, int]:
    """Bytes of weights as deltas and whole, of each kind of optimizer state, and of the rest."""
    parts: dict[str, int] = {}
    for name, size in sizes.items():
        kind, *place = name.split("/")
        part = f"{kind} {specs[name][0]}" if kind == "weights" else f"{kind} {place[-1]}" if place else kind
        parts[part] = parts.get(part, 0) + size
    return parts


def report(path: Path, total: int, parts: dict[str, int], counts: dict[str, int], seconds: float) -> str:
    """One line about a checkpoint.

    Example:
        >>> counts = {"changed": 7, "in_base": 1000}
        >>> report(Path("runs/a/step=3.ckpt"), 2**21, {"weights delta": 2**20, "rest": 2**20}, counts, 0.25)
        'checkpoint step=3.ckpt: 2.00 MiB in 0.2 s (weights delta 1.00, rest 1.00); 0.70 % of the weights changed'
    """
    listed = ", ".join(f"{name} {size / 2**20:.2f}" for name, size in parts.items())
    changed = 100 * counts["changed"] / counts["in_base"] if counts["in_base"] else math.nan
    ending = f"; {changed:.2f} % of the weights changed" if counts["in_base"] else ""
    return f"checkpoint {path.name}: {total / 2**20:.2f} MiB in {seconds:.1f} s ({listed}){ending}"
