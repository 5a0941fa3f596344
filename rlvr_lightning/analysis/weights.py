"""The tensors of a checkpoint, whatever its form, as a stream of flat pieces: no model is ever in memory.

Every form gives pieces of the same length, 2**20 entries, so that those of several models fit each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from rlvr_lightning.delta.codec import SEGMENT, decode
from rlvr_lightning.delta.digest import combine, tensor_hash
from rlvr_lightning.delta.file import DeltaFile, signed
from rlvr_lightning.delta.folder import Place
from rlvr_lightning.delta.tensor import bits


@dataclass(frozen=True)
class Spec:
    """What a tensor is."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """How many."""
        return prod(self.shape)


class Weights(Protocol):
    """The tensors of one model, by the names they have in its transformers folder."""

    label: str
    """What the user called it."""
    specs: dict[str, Spec]
    """Of distinct tensors."""
    aliases: dict[str, str]
    """Other name of a tensor: its name in `specs`, where the checkpoint says so."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The entries of a tensor in row-major order: new flat CPU tensors of 2**20 entries, the last one shorter."""


class FolderWeights:
    """Safetensors of a folder.

    Args:
        label: what the user called it.
        places: as `find_tensors` finds them.
    """

    def __init__(self, label: str, places: Mapping[str, Place]) -> None:
        self.label, self.places = label, dict(places)
        self.specs = {name: Spec(place.dtype, place.shape) for name, place in places.items()}
        self.aliases = dict[str, str]()

    def pieces(self, name: str) -> Iterator[Tensor]:
        """See `Weights`."""
        place = self.places[name]
        for first, entries in place.segments():
            yield torch.from_numpy(place.read(first, entries)).view(place.dtype)


class DeltaWeights:
    """What a delta file makes of a base.

    Args:
        label: what the user called it.
        file: the delta.
        base: the model it starts from; its digest is compared, one pass over it.

    Raises:
        ValueError: the file starts from another model.
    """

    def __init__(self, label: str, file: DeltaFile, base: Weights) -> None:
        self.label, self.file, self.base, self.aliases = label, file, base, file.aliases
        self.specs = {name: Spec(stored.dtype, stored.shape) for name, stored in file.tensors.items()}
        if digest(base, self.specs) != file.base_digest:
            raise ValueError(f"{label} is a delta from another model than {base.label}; give the one it was made from")

    def pieces(self, name: str) -> Iterator[Tensor]:
        """See `Weights`."""
        dtype = self.specs[name].dtype
        for (_, entries, blob), before in zip(self.file.segments(name), self.base.pieces(name), strict=True):
            piece = before.to(dtype)
            array = signed(bits(piece))
            positions, values = decode(blob, array if self.file.needs_base else None, entries, dtype)
            array[positions] = values
            yield piece


def digest(base: Weights, specs: Mapping[str, Spec]) -> str | None:
    """`digest_state` of a model's tensors, cast to the given dtypes; None if they have other names or shapes."""
    digests = []
    for name, spec in specs.items():
        if name not in base.specs or base.specs[name].shape != spec.shape:
            return None
        state = tensor_hash(name, spec.dtype, spec.shape)
        for piece in base.pieces(name):
            state.update(bits(piece.to(spec.dtype)).numpy().data.cast("B"))
        digests.append((name, state.hexdigest()))
    return combine(digests)


def gather(weights: Weights, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor as a whole, flat, cast to a dtype."""
    whole = torch.empty(weights.specs[name].entries, dtype=dtype)
    at = 0
    for piece in weights.pieces(name):
        whole[at : at + len(piece)] = piece
        at += len(piece)
    return whole


def split(tensor: Tensor) -> Iterator[Tensor]:
    """Pieces of a tensor that is in memory."""
    flat = tensor.reshape(-1)
    for first in range(0, len(flat), SEGMENT):
        yield flat[first : first + SEGMENT].clone()
