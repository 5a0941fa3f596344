"""Deltas on disk: one safetensors file, checked as a whole before anything of it is used, written all or not at all.

Every tensor of the model is a uint8 tensor of the same name: its segments (see `delta/codec.py`), one after the other.
The metadata hold `format`, `version`, `tensors` (JSON: name to dtype, shape, changed entries, entries stored raw),
`aliases` (JSON), `base_digest`, `result_digest`, `needs_base`, and `checksum`: SHA-256 of the header with an empty
checksum, followed by the SHA-256 of the rest. The header is padded with spaces.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from rlvr_lightning.delta.codec import HEAD, SEGMENT, SIGNED, decode, encode, length
from rlvr_lightning.delta.digest import combine, digest_state, tensor_digest
from rlvr_lightning.delta.sparse import SparseDelta, check_digest, check_state
from rlvr_lightning.delta.tensor import TensorDelta, bits, flat_bits, index_dtype, local
from rlvr_lightning.delta.writer import FORMAT, VERSION, DeltaWriter, canonical

_CHUNK_BYTES = 1 << 22
_HEADER_BYTES = 100_000_000  # the most that safetensors allows


@dataclass(frozen=True)
class Stored:
    """One tensor of a delta file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    changed: int
    """Entries that differ."""
    raw: int
    """Entries of segments that are stored whole, because nothing else was smaller."""
    start: int
    """First byte in the file."""
    end: int
    """After the last byte."""

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        return int(np.prod(self.shape, dtype=object)) if self.shape else 1


def save_delta(path: str | Path, delta: SparseDelta, base: Mapping[str, Tensor] | None = None) -> None:
    """Write a delta to a file.

    Args:
        path: of the file; an existing one is replaced, at once.
        delta: what to write.
        base: the state it starts from. With it the file is less than half as large, and can only be read with it.

    Raises:
        ValueError: the base does not fit, or there is no base and the delta does not know its digests.
    """
    specs = {name: (entries.values.dtype, delta.shapes[name]) for name, entries in delta.items()}
    if base is not None:
        check_state(base, specs, delta.aliases)
    base_digest, result_digest = _digests(delta, base)
    with DeltaWriter(Path(path), specs, delta.aliases, base is not None) as writer:
        for name, entries in delta.items():
            for blob, changed, numel in _encoded(entries, None if base is None else base[name]):
                writer.write(name, blob, changed, numel)
        writer.finish(base_digest, result_digest)


def load_delta(path: str | Path) -> DeltaFile:
    """Open a delta file, after checking all of its bytes; see `DeltaFile.load` and `DeltaFile.apply_`.

    Raises:
        ValueError: it is no delta file, of another version, truncated or altered.
    """
    return DeltaFile(Path(path))


class DeltaFile:
    """A checked delta file: what is in it, and its tensors, decoded one at a time.

    Args:
        path: see `load_delta`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file_bytes = path.stat().st_size
        with path.open("rb") as file:
            try:
                self._open(file)
            except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError) as error:
                raise self._damaged(f"its header is malformed ({type(error).__name__})") from None

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"delta: {self.path} is no delta file, truncated or altered: {why}")

    def _open(self, file: BinaryIO) -> None:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 0 < header_bytes <= min(self.file_bytes - 8, _HEADER_BYTES):
            raise self._damaged("its header is cut")
        text = file.read(header_bytes)
        try:
            header = json.loads(text)
        except ValueError:
            raise self._damaged("its header is not JSON") from None
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise self._damaged(f"its format is {metadata['format']!r}")
        if metadata["version"] != VERSION:
            raise ValueError(f"delta: {self.path} has version {metadata['version']!r}, this program reads {VERSION!r}")
        checksum = metadata["checksum"]
        if canonical(header).ljust(header_bytes) != text:
            raise self._damaged("its header is altered")
        metadata["checksum"] = ""
        rest = hashlib.sha256()
        while piece := file.read(_CHUNK_BYTES):
            rest.update(piece)
        if hashlib.sha256(canonical(header) + rest.digest()).hexdigest() != checksum:
            raise self._damaged("its checksum differs")
        self._describe(header, metadata, 8 + header_bytes)

    def _describe(self, header: dict[str, Any], metadata: dict[str, str], at: int) -> None:
        self.base_digest, self.result_digest = metadata["base_digest"], metadata["result_digest"]
        self.aliases: dict[str, str] = json.loads(metadata["aliases"])
        self.needs_base: bool = json.loads(metadata["needs_base"])
        self.tensors: dict[str, Stored] = {}
        for name, (dtype, shape, changed, raw) in json.loads(metadata["tensors"]).items():
            kind = getattr(torch, dtype)
            if not isinstance(kind, torch.dtype) or not all(isinstance(n, int) and n >= 0 for n in shape):
                raise self._damaged(f"its tensor {name!r} is malformed")
            start, end = header[name]["data_offsets"]
            self.tensors[name] = Stored(kind, tuple(shape), changed, raw, at + start, at + end)
        if set(self.tensors) != set(header) - {"__metadata__"} or not set(self.aliases.values()) <= set(self.tensors):
            raise self._damaged("its list of tensors is malformed")

    @property
    def specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor."""
        return {name: (stored.dtype, stored.shape) for name, stored in self.tensors.items()}

    def segments(self, name: str) -> Iterator[tuple[int, int, bytes]]:
        """First entry, entries and bytes of the segments of a tensor."""
        stored = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(stored.start)
            for first in range(0, stored.numel, SEGMENT):
                head = file.read(min(1 + HEAD.size, stored.end - file.tell()))
                size = length(head)
                if size < len(head):
                    file.seek(size - len(head), os.SEEK_CUR)
                if size - len(head) > stored.end - file.tell():
                    raise self._damaged(f"a segment of {name!r} is cut")
                blob = head[:size] + file.read(max(size - len(head), 0))
                yield first, min(SEGMENT, stored.numel - first), blob
            if file.tell() != stored.end:
                raise self._damaged(f"{name!r} has more bytes than entries")

    def tensor(self, name: str, base: Tensor | None = None) -> TensorDelta:
        """The delta of one tensor.

        Args:
            name: of the tensor, not an alias.
            base: the tensor it starts from; the delta comes on its device. Not needed if `needs_base` is False.
        """
        stored = self.tensors[name]
        if self.needs_base and base is None:
            raise ValueError(f"delta: {self.path} was written against its base; give the state it starts from")
        old = flat_bits(base) if base is not None else None
        dtype = index_dtype(stored.numel)
        where, what = [torch.empty(0, dtype=dtype)], [torch.empty(0, dtype=stored.dtype)]
        for first, entries, blob in self.segments(name):
            piece = signed(old[first : first + entries]) if old is not None and self.needs_base else None
            positions, values = decode(blob, piece, entries, stored.dtype)
            where.append(torch.from_numpy(positions + first).to(dtype))
            what.append(torch.from_numpy(values).view(stored.dtype))
        device = base.device if base is not None else torch.device("cpu")
        after = torch.cat([bits(piece) for piece in what]).view(stored.dtype)
        return TensorDelta(torch.cat(where).to(device), after.to(device), stored.numel)

    def load(self, base: Mapping[str, Tensor] | None = None) -> SparseDelta:
        """All of it, in memory.

        Args:
            base: the state it starts from, which is checked by its digest; not needed if `needs_base` is False.

        Raises:
            ValueError: the state is another one.
        """
        if base is not None:
            check_state(base, self.specs, self.aliases)
            check_digest(base, self.tensors, self.aliases, self.base_digest)
        tensors = {name: self.tensor(name, None if base is None else base[name]) for name in self.tensors}
        shapes = {name: stored.shape for name, stored in self.tensors.items()}
        return SparseDelta(tensors, shapes, self.aliases, self.base_digest, self.result_digest)

    def apply_(self, state: Mapping[str, Tensor]) -> None:
        """Turn the base into the result, in place; if anything does not fit, nothing is written."""
        self.load(state).apply_(state)


def _digests(delta: SparseDelta, base: Mapping[str, Tensor] | None) -> tuple[str, str]:
    """Of base and result: those the delta knows, else by a pass over the base, with a copy of one tensor at a time."""
    if delta.base_digest and delta.result_digest:
        if base is not None:
            check_digest(base, delta, delta.aliases, delta.base_digest)
        return delta.base_digest, delta.result_digest
    if base is None:
        raise ValueError("delta: a file needs the digests; capture with digests=True, or give the base")
    before = digest_state((name, base[name]) for name in delta)
    if delta.base_digest not in (None, before):
        raise ValueError(f"delta: it starts from {delta.base_digest[:12]}, not from the given {before[:12]}")
    after = []
    for name, entries in delta.items():
        copy = local(base[name]).clone()
        entries.apply_(copy)
        after.append((name, tensor_digest(name, copy)))
    return before, combine(after)


def _encoded(delta: TensorDelta, base: Tensor | None) -> Iterator[tuple[bytes, int, int]]:
    """Bytes, changed entries and entries of each segment of a tensor."""
    old = flat_bits(base) if base is not None else None
    starts = list(range(0, delta.numel, SEGMENT))
    bounds = torch.tensor([*starts, delta.numel], dtype=delta.indices.dtype, device=delta.indices.device)
    cuts = torch.searchsorted(delta.indices, bounds).tolist()
    for first, low, high in zip(starts, cuts[:-1], cuts[1:], strict=True):
        entries = min(SEGMENT, delta.numel - first)
        positions = (delta.indices[low:high] - first).cpu().numpy()
        values = signed(bits(delta.values[low:high]))
        piece = signed(old[first : first + entries]) if old is not None else None
        yield encode(positions, values, piece, entries, delta.values.dtype), high - low, entries


def signed(flat: Tensor) -> np.ndarray:
    """A flat tensor of integers as the signed ones that the codec takes."""
    array = flat.cpu().numpy()
    return array.view(SIGNED[array.itemsize])
