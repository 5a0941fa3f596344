"""Tensors of a checkpoint: coded as a delta against the base, or whole, and back, one tensor at a time."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlvr_lightning.checkpoint.codec import pack, unpack
from rlvr_lightning.checkpoint.file import Container
from rlvr_lightning.delta.codec import SEGMENT, decode, encode
from rlvr_lightning.delta.file import signed
from rlvr_lightning.delta.tensor import flat_bits
from rlvr_lightning.heap import give_back

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


class Reader:
    """Decodes the tensors of a checkpoint.

    Args:
        path: of the checkpoint.

    Raises:
        ValueError: it is damaged, or claims sizes that no checkpoint has.
    """

    def __init__(self, path: Path) -> None:
        self.file = Container(path)
        try:
            self.about: dict[str, Any] = dict(self.file.metadata["about"])
            self.aliases: dict[str, str] = dict(self.file.metadata["aliases"])
            self.specs = {name: _spec(*spec) for name, spec in self.file.metadata["entries"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self.file.damaged("its list of tensors is malformed") from None
        weights = {name.removeprefix("weights/") for name in self.specs if name.startswith("weights/")}
        if {*self.specs, "rest"} != set(self.file.places) or not set(self.aliases.values()) <= weights:
            raise self.file.damaged("its list of tensors is malformed")
        self.weights = sorted(weights)
        sizes = {name: math.prod(shape) for name, (_, _, shape) in self.specs.items()}
        of_weights = [sizes[f"weights/{name}"] for name in self.weights]
        state = [size for name, size in sizes.items() if name.startswith("optimizer/")]
        if max(state, default=0) > max(of_weights, default=0) or sum(state) > MOST_STATE * sum(of_weights):
            raise self.file.damaged("its optimizer state is larger than its weights allow")

    def write_(self, name: str, flat: np.ndarray, dtype: torch.dtype) -> None:
        """Decode a tensor in place.

        Args:
            name: in the file.
            flat: signed integers [numel] as wide as an entry: the base's bits, if it is a delta.
            dtype: of the tensor.
        """
        blobs = self.file.blobs(name)
        coding = self.specs[name][0]
        for first in range(0, len(flat), SEGMENT):
            piece = flat[first : first + SEGMENT]
            try:
                blob = next(blobs)
                if coding == DELTA:
                    positions, values = decode(blob, piece, len(piece), dtype)
                    piece[positions] = values
                else:
                    piece[:] = unpack(blob, len(piece), piece.itemsize).view(piece.dtype)
            except (StopIteration, ValueError) as error:
                raise self.file.damaged(f"{name!r}: {error}") from None

    def whole(self, name: str) -> Tensor:
        """A tensor that is no delta, on the CPU."""
        coding, dtype, shape = self.specs[name]
        if coding != WHOLE:
            raise ValueError(
                f"checkpoint: {self.file.path} holds changes of {self.about.get('model')!r}, which only the modules of "
                "rlvr_lightning load; turn it into a model's folder with: python -m rlvr_lightning export"
            )
        tensor = torch.empty(shape, dtype=dtype)
        self.write_(name, signed(flat_bits(tensor)), dtype)
        return tensor


def _spec(coding: str, dtype: str, shape: list[int]) -> tuple[str, torch.dtype, tuple[int, ...]]:
    kind = getattr(torch, dtype)
    if coding not in (DELTA, WHOLE) or not isinstance(kind, torch.dtype) or kind.itemsize not in (1, 2, 4, 8):
        raise ValueError(coding, dtype)
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(shape)
    return coding, kind, tuple(shape)


class StoredWeights(Mapping[str, Tensor]):
    """The `state_dict` of a checkpoint, decoded when asked for: whole tensors only, for deltas need the start."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, name: str) -> Tensor:
        first = self.reader.aliases.get(name, name)
        if f"weights/{first}" not in self.reader.specs:
            raise KeyError(name)
        return self.reader.whole(f"weights/{first}")

    def __iter__(self) -> Iterator[str]:
        yield from self.reader.weights
        yield from self.reader.aliases

    def __len__(self) -> int:
        return len(self.reader.weights) + len(self.reader.aliases)


class StoredState(Mapping[int, dict[str, Any]]):
    """The `state` of an optimizer's state dict: each parameter's is decoded when asked for, and not kept here.

    Args:
        reader: of the checkpoint.
        index: of the optimizer.
        small: what is not stored as tensors of their own.
    """

    def __init__(self, reader: Reader, index: int, small: Mapping[int, dict[str, Any]]) -> None:
        self.reader, self.small = reader, small
        self.names: dict[int, dict[str, str]] = {key: {} for key in small}
        for name in reader.specs:
            part, *place = name.split("/", 3)
            if part == "optimizer" and place[0] == str(index):
                self.names.setdefault(int(place[1]), {})[place[2]] = name

    def __getitem__(self, key: int) -> dict[str, Any]:
        give_back()  # what the parameter before was decoded into
        large = {name: self.reader.whole(entry) for name, entry in self.names[key].items()}
        return {**self.small.get(key, {}), **large}

    def __iter__(self) -> Iterator[int]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
