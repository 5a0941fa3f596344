"""Writing a delta file segment by segment, whatever its size, so that it appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from rlvr_lightning.delta.codec import RAW, SEGMENT

FORMAT, VERSION = "rlvr_lightning.delta", "1"
Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape by name."""


class DeltaWriter:
    """Writes a delta file segment by segment; the file appears under its name when `finish` has succeeded.

    Args:
        path: of the file; an existing one is replaced.
        specs: dtype and shape of every tensor; segments must come in this order.
        aliases: see `SparseDelta`.
        needs_base: whether segments were encoded against the base.
    """

    def __init__(self, path: Path, specs: Specs, aliases: Mapping[str, str], needs_base: bool) -> None:
        self.path = path
        self.specs = specs
        self.fixed = {"aliases": json.dumps(dict(aliases)), "needs_base": json.dumps(needs_base)}
        self.sizes = {name: [0, 0, 0] for name in specs}
        self.hash = hashlib.sha256()
        empty = "0" * 64
        wide = {name: [_most_bytes(*spec), prod(spec[1]), prod(spec[1])] for name, spec in specs.items()}
        self.reserved = -(-len(self._header(wide, empty, empty, empty)) // 8) * 8

    def __enter__(self) -> DeltaWriter:
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}-", dir=self.path.parent)
        self.temporary = Path(name)
        self.file = os.fdopen(handle, "wb")
        self.file.seek(8 + self.reserved)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    def write(self, name: str, blob: bytes, changed: int, entries: int) -> None:
        """Add the next segment of a tensor, of so many entries."""
        size = self.sizes[name]
        size[0] += len(blob)
        size[1] += changed
        size[2] += entries if blob[0] == RAW else 0
        self.hash.update(blob)
        self.file.write(blob)

    def finish(self, base_digest: str, result_digest: str) -> None:
        """Write the header, make everything durable, and give the file its name."""
        unsigned = self._header(self.sizes, base_digest, result_digest, "")
        checksum = hashlib.sha256(unsigned + self.hash.digest()).hexdigest()
        header = self._header(self.sizes, base_digest, result_digest, checksum).ljust(self.reserved)
        assert len(header) == self.reserved, "the room left for the header was too small"
        self.file.seek(0)
        self.file.write(len(header).to_bytes(8, "little") + header)
        self.file.flush()
        os.fsync(self.file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        self.temporary.chmod(0o666 & ~mask)  # mkstemp's are private
        self.temporary.replace(self.path)
        sync_folder(self.path.parent)

    def _header(self, sizes: Mapping[str, list[int]], base: str, result: str, checksum: str) -> bytes:
        known = {
            name: [str(dtype).removeprefix("torch."), list(shape), *sizes[name][1:]]
            for name, (dtype, shape) in self.specs.items()
        }
        metadata = {"format": FORMAT, "version": VERSION, "tensors": json.dumps(known), **self.fixed}
        metadata |= {"base_digest": base, "result_digest": result, "checksum": checksum}
        header: dict[str, Any] = {"__metadata__": metadata}
        at = 0
        for name in self.specs:
            header[name] = {"dtype": "U8", "shape": [sizes[name][0]], "data_offsets": [at, at + sizes[name][0]]}
            at += sizes[name][0]
        return canonical(header)


def _most_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """No tensor takes more in a file: positions and values hardly compressed, and the heads of segments."""
    entries = prod(shape)
    return entries * (dtype.itemsize + 8) + (1 + entries // SEGMENT) * 64


def canonical(header: Any) -> bytes:
    """The only spelling of a header that is accepted."""
    return json.dumps(header, separators=(",", ":")).encode()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
