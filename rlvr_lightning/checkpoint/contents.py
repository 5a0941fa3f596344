"""Lightning's checkpoint taken apart into named tensors and a rest, and those written into a container."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from rlvr_lightning.checkpoint.file import Writer
from rlvr_lightning.checkpoint.rest import lift_state, to_bytes
from rlvr_lightning.checkpoint.start import Start, check_rows, first_names
from rlvr_lightning.checkpoint.state import DELTA, WHOLE, delta_blobs, whole_blobs
from rlvr_lightning.delta.codec import SEGMENT, UNCHANGED
from rlvr_lightning.delta.tensor import first_entry, local
from rlvr_lightning.ranks import Ranks

Record = dict[str, Any]


class SinceStart(dict[str, Tensor]):
    """A state dict that knows of which model it is, and what it started from."""

    about: Record
    start: Start | None = None


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a checkpoint holds."""

    tensors: dict[str, Tensor]
    """`weights/NAME` and `optimizer/I/PARAMETER/KEY`; tied weights once."""
    rest: Record
    """All that is not tensors."""
    aliases: dict[str, str]
    """Other name of a weight: its name in `tensors`."""
    about: Record
    start: Start | None
    """What weights can be stored as a delta against."""

    @staticmethod
    def of(checkpoint: Record) -> Contents:
        """Take a checkpoint apart; its tensors are not copied."""
        weights = checkpoint["state_dict"]
        names, aliases = first_names(weights)
        about = getattr(weights, "about", None) or checkpoint.get("about", {})
        optimizers, state = lift_state(checkpoint.get("optimizer_states", []))
        rest = {name: value for name, value in checkpoint.items() if name != "state_dict"}
        if "optimizer_states" in rest:
            rest["optimizer_states"] = optimizers
        return Contents(
            tensors={f"weights/{name}": weights[name] for name in names} | state,
            rest=rest,
            aliases=aliases,
            about={"step": checkpoint.get("global_step"), **about},
            start=getattr(weights, "start", None),
        )


@dataclass(frozen=True, kw_only=True)
class Written:
    """What became of a container."""

    checksum: str
    total_bytes: int
    part_bytes: dict[str, int]
    """By kind of tensor."""
    counts: dict[str, int]
    """`changed` entries, and entries stored as deltas (`in_base`)."""


def write_container(path: Path, contents: Contents, shards: Ranks | None = None) -> Written:
    """Write a container: all of a checkpoint, or what one rank has of it; see `checkpoint/file.py` for how.

    Args:
        path: of the file.
        contents: of the checkpoint.
        shards: ranks that write a file each, and hold the tensors between them; the first writes the rest, too.
    """
    first = shards is None or shards.rank == 0
    entries = {name: t for name, t in contents.tensors.items() if first or isinstance(t, DTensor)}
    for name, tensor in entries.items():
        check_rows(name, tensor)
    known = {f"weights/{name}" for name in contents.start.names()} if contents.start else set()
    specs = {n: _spec(DELTA if n in known else WHOLE, t, shards is not None) for n, t in entries.items()}
    metadata = {"about": contents.about, "entries": specs, "aliases": contents.aliases}
    counts = {"changed": 0, "in_base": sum(local(t).numel() for name, t in entries.items() if name in known)}
    last = [to_bytes(contents.rest)] if first else []
    with Writer(path, [*entries, *(["rest"] if first else [])], metadata) as writer:
        for name, tensor in entries.items():
            if name in known and contents.start is not None:
                counts["changed"] += write_delta(writer, name, contents.start, local(tensor))
            else:
                for blob in whole_blobs(local(tensor).cpu()):
                    writer.write(name, blob)
        for blob in last:
            writer.write("rest", blob)
        parts = bytes_by_part(writer.sizes, specs)
        total = writer.finish(bytes=parts, counts=counts)
    return Written(checksum=writer.checksum, total_bytes=total, part_bytes=parts, counts=counts)


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


def _spec(coding: str, tensor: Tensor, is_part: bool) -> list[Any]:
    where = [first_entry(tensor), local(tensor).numel()] if is_part else []
    return [coding, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), *where]


def bytes_by_part(sizes: Mapping[str, int], specs: Mapping[str, list[Any]]) -> dict[str, int]:
    """Bytes of weights as deltas and whole, of each kind of optimizer state, and of the rest."""
    parts: dict[str, int] = {}
    for name, size in sizes.items():
        kind, *place = name.split("/")
        part = f"{kind} {specs[name][0]}" if kind == "weights" else f"{kind} {place[-1]}" if place else kind
        parts[part] = parts.get(part, 0) + size
    return parts


def report(path: Path, written: list[Written], seconds: float) -> str:
    """One line about a checkpoint.

    Example:
        >>> counts, parts = {"changed": 7, "in_base": 1000}, {"weights delta": 2**20, "rest": 2**20}
        >>> one = Written(checksum="", total_bytes=2**21, part_bytes=parts, counts=counts)
        >>> report(Path("runs/a/step=3.ckpt"), [one], 0.25)
        'checkpoint step=3.ckpt: 2.00 MiB in 0.2 s (weights delta 1.00, rest 1.00); 0.70 % of the weights changed'
    """
    parts: dict[str, int] = {}
    for one in written:
        for name, size in one.part_bytes.items():
            parts[name] = parts.get(name, 0) + size
    listed = ", ".join(f"{name} {size / 2**20:.2f}" for name, size in parts.items())
    in_base = sum(one.counts["in_base"] for one in written)
    changed = 100 * sum(one.counts["changed"] for one in written) / in_base if in_base else math.nan
    ending = f"; {changed:.2f} % of the weights changed" if in_base else ""
    total = sum(one.total_bytes for one in written) / 2**20
    return f"checkpoint {path.name}: {total:.2f} MiB in {seconds:.1f} s ({listed}){ending}"
