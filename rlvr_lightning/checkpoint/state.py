"""Tensors of a checkpoint: coded as a delta against the base, or whole, and back, one tensor at a time."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlvr_lightning.checkpoint.codec import pack, unpack
from rlvr_lightning.checkpoint.file import Container
from rlvr_lightning.checkpoint.folder import agree, damaged, read_manifest
from rlvr_lightning.checkpoint.start import by_rows
from rlvr_lightning.delta.codec import SEGMENT, decode, encode
from rlvr_lightning.delta.file import signed
from rlvr_lightning.delta.tensor import box, first_entry, flat_bits, local
from rlvr_lightning.ranks import ALONE, Ranks

DELTA, WHOLE = "delta", "whole"
WORKERS = max(1, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
"""Segments coded at once: numpy and zlib let other threads run, and each takes up to 100 MB."""
MOST_STATE = 8
"""An optimizer may keep so many times as many entries as there are weights; more is taken for an attack."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map`, a few at a time.

    >>> list(in_order(abs, [-1, 2, -3]))
    [1, 2, 3]
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def delta_blobs(base: Tensor, now: Tensor) -> Iterator[tuple[bytes, int]]:
    """Segments (see `delta/codec.py`) of what changed, and how many entries did."""
    old, new = signed(flat_bits(base)), signed(flat_bits(now))

    def segment(first: int) -> tuple[bytes, int]:
        before, after = old[first : first + SEGMENT], new[first : first + SEGMENT]
        positions = np.flatnonzero(before != after)
        return encode(positions, after[positions], before, len(before), now.dtype), len(positions)

    return in_order(segment, range(0, len(new), SEGMENT))


def whole_blobs(tensor: Tensor) -> Iterator[bytes]:
    """Segments of a tensor as it is (see `checkpoint/codec.py`)."""
    flat = signed(flat_bits(tensor))
    return in_order(lambda first: pack(flat[first : first + SEGMENT]), range(0, len(flat), SEGMENT))


@dataclass(frozen=True)
class Piece:
    """A run of entries of a tensor, and the file that holds them."""

    file: Container
    first: int
    entries: int

    def segments(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Number, first entry and entries of those of its segments that hold some of the entries from first to end."""
        for number, at in enumerate(range(self.first, self.first + self.entries, SEGMENT)):
            length = min(SEGMENT, self.first + self.entries - at)
            if at < end and first < at + length:
                yield number, at, length


class Reader:
    """Decodes the tensors of a checkpoint: one container, or a folder of them.

    Args:
        path: of the checkpoint.
        ranks: that read it together; each checks its share of the files.

    Raises:
        ValueError: it is damaged, or claims sizes that no checkpoint has.
    """

    def __init__(self, path: Path, ranks: Ranks = ALONE) -> None:
        self.path = path
        self.files = open_files(path, ranks)
        self.specs: dict[str, Spec] = {}
        self.pieces: dict[str, list[Piece]] = {}
        try:
            self.about: dict[str, Any] = dict(self.files[0].metadata["about"])
            self.aliases: dict[str, str] = dict(self.files[0].metadata["aliases"])
            for file in self.files:
                self._list(file)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self.damaged("its list of tensors is malformed") from None
        weights = {name.removeprefix("weights/") for name in self.specs if name.startswith("weights/")}
        if not set(self.aliases.values()) <= weights or not all(map(self._complete, self.specs)):
            raise self.damaged("its list of tensors is malformed")
        self.weights = sorted(weights)
        sizes = {name: math.prod(shape) for name, (_, _, shape) in self.specs.items()}
        of_weights = [sizes[f"weights/{name}"] for name in self.weights]
        state = [size for name, size in sizes.items() if name.startswith("optimizer/")]
        if max(state, default=0) > max(of_weights, default=0) or sum(state) > MOST_STATE * sum(of_weights):
            raise self.damaged("its optimizer state is larger than its weights allow")

    def _list(self, file: Container) -> None:
        names = set()
        for name, (coding, dtype, shape, *where) in file.metadata["entries"].items():
            spec = _spec(coding, dtype, shape)
            first, entries = where or (0, math.prod(spec[2]))
            if self.specs.setdefault(name, spec) != spec or type(first) is not int or type(entries) is not int:
                raise ValueError(name)
            self.pieces.setdefault(name, []).append(Piece(file, first, entries))
            names.add(name)
        if names | ({"rest"} if file is self.files[0] else set()) != set(file.places):
            raise ValueError("entries")

    def _complete(self, name: str) -> bool:
        """Whether the pieces of a tensor follow on from each other and are all of it."""
        self.pieces[name] = sorted((p for p in self.pieces[name] if p.entries), key=lambda piece: piece.first)
        at = 0
        for piece in self.pieces[name]:
            if piece.first != at or piece.entries < 0:
                return False
            at += piece.entries
        return at == math.prod(self.specs[name][2])

    def damaged(self, why: str) -> ValueError:
        """The error to raise when something in it is not as it was written."""
        return damaged(self.path, why)

    def rest(self) -> bytes:
        """What is not tensors."""
        return b"".join(self.files[0].blobs("rest"))

    def cover(self, name: str, first: int, end: int) -> tuple[int, int]:
        """The fewest entries, from and to, that must be known of a delta's base to decode those from first to end."""
        found = [(at, at + n) for piece in self.pieces[name] for _, at, n in piece.segments(first, end)]
        if self.specs[name][0] != DELTA or not found:
            return first, end
        return found[0][0], found[-1][1]

    def write_(self, name: str, flat: np.ndarray, dtype: torch.dtype, first: int = 0) -> None:
        """Decode entries of a tensor in place.

        Args:
            name: in the file.
            flat: signed integers [entries] as wide as an entry: the base's bits, if it is a delta; then it must begin
                and end with a segment (see `cover`).
            dtype: of the tensor.
            first: where in the tensor they begin.
        """
        coding, end = self.specs[name][0], first + len(flat)
        for piece in self.pieces[name]:
            wanted = list(piece.segments(first, end))
            blobs = piece.file.blobs(name, wanted[0][0] if wanted else 0)
            for _, at, length in wanted:
                low, high = max(at, first), min(at + length, end)
                part = flat[low - first : high - first]
                try:
                    blob = next(blobs)
                    if coding == DELTA:
                        positions, values = decode(blob, part, length, dtype)
                        part[positions] = values
                    else:
                        part[:] = unpack(blob, length, part.itemsize).view(part.dtype)[low - at : high - at]
                except (StopIteration, ValueError) as error:
                    raise self.damaged(f"{name!r}: {error}") from None

    def whole(self, name: str) -> Tensor:
        """A tensor that is no delta, on the CPU."""
        return self.part(name, torch.empty(self.specs[name][2], device="meta"))

    def part(self, name: str, like: Tensor) -> Tensor:
        """This rank's part of a tensor that is no delta, on the CPU.

        Args:
            name: in the file.
            like: a tensor of the same shape, whose sharding says which part that is.
        """
        coding, dtype, _ = self.specs[name]
        if coding != WHOLE:
            raise ValueError(
                f"checkpoint: {self.path} holds changes of {self.about.get('model')!r}, which only the modules of "
                "rlvr_lightning load; turn it into a model's folder with: python -m rlvr_lightning export"
            )
        if not by_rows(like):
            return box(self.whole(name), like).contiguous()
        tensor = torch.empty(local(like).shape, dtype=dtype)
        self.write_(name, signed(flat_bits(tensor)), dtype, first_entry(like))
        return tensor


Spec = tuple[str, torch.dtype, tuple[int, ...]]
"""Coding, dtype and shape of a tensor."""


def open_files(path: Path, ranks: Ranks) -> list[Container]:
    """The containers of a checkpoint, each checked by one of the ranks.

    Raises:
        ValueError: on all ranks, if one of them is damaged or is not the one that the manifest knows.
    """
    files: list[Container] = []
    error = None
    try:
        known = read_manifest(path)["files"] if path.is_dir() else {path.name: None}
        for index, name in enumerate(sorted(known)):
            file = path / name if path.is_dir() else path
            if not file.is_file():
                raise damaged(path, f"{name} is missing")
            files.append(Container(file, check=index % ranks.size == ranks.rank))
            if known[name] not in (None, files[-1].checksum):
                raise damaged(path, f"{name} is of another checkpoint")
    except ValueError as found:
        error = str(found)
    agree(ranks, error)
    return files


def _spec(coding: str, dtype: str, shape: list[int]) -> Spec:
    kind = getattr(torch, dtype)
    if coding not in (DELTA, WHOLE) or not isinstance(kind, torch.dtype) or kind.itemsize not in (1, 2, 4, 8):
        raise ValueError(coding, dtype)
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(shape)
    return coding, kind, tuple(shape)
