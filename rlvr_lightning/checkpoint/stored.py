"""What can be asked of a checkpoint's tensors, whatever form they have: this rank's part of one, or all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlvr_lightning.checkpoint.start import first_names
from rlvr_lightning.checkpoint.state import WHOLE, Spec
from rlvr_lightning.delta.tensor import box, local, whole
from rlvr_lightning.heap import give_back


class Source(Protocol):
    """The tensors of a checkpoint, `weights/NAME` and `optimizer/I/PARAMETER/KEY`."""

    path: Path
    about: dict[str, Any]
    aliases: dict[str, str]
    specs: dict[str, Spec]
    weights: list[str]
    """Names of distinct tensors; `aliases` has the others."""

    def whole(self, name: str) -> Tensor:
        """A tensor, on the CPU."""

    def part(self, name: str, like: Tensor) -> Tensor:
        """This rank's part of a tensor that is sharded as `like`."""

    def rest(self) -> bytes:
        """What is not tensors."""

    def damaged(self, why: str) -> ValueError:
        """The error to raise when something is not as it was written."""


def leave_out_beside(source: Source, about: Mapping[str, Any]) -> None:
    """From now on a source has the model's tensors alone, without what was trained beside it (see `about_model`)."""
    beside = tuple(about.get("beside") or ())
    source.weights = [name for name in source.weights if not name.startswith(beside)]
    source.aliases = {name: first for name, first in source.aliases.items() if not name.startswith(beside)}


class InMemory:
    """The tensors of a checkpoint that torch has read.

    Args:
        path: where from.
        weights: Lightning's `state_dict`.
        state: tensors of the optimizers, by the name of their entry.
    """

    def __init__(self, path: Path, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        self.path, self.about = path, dict[str, Any]()
        self.weights, self.aliases = first_names(weights)
        self.tensors = {**{f"weights/{name}": weights[name] for name in self.weights}, **state}
        self.specs: dict[str, Spec] = {n: (WHOLE, t.dtype, tuple(t.shape)) for n, t in self.tensors.items()}

    def whole(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        return self.tensors[name]

    def part(self, name: str, like: Tensor) -> Tensor:
        """This rank's part of a tensor that is sharded as `like`."""
        return box(self.tensors[name], like)

    def rest(self) -> bytes:
        """Nothing: torch has read it already."""
        return b""

    def damaged(self, why: str) -> ValueError:
        """The error to raise when something is not as it was written."""
        return ValueError(f"checkpoint: {self.path} is damaged ({why}); resume from another one")


class StoredWeights(Mapping[str, Tensor]):
    """The `state_dict` of a checkpoint, decoded when asked for: whole tensors only, for deltas need the start."""

    def __init__(self, reader: Source) -> None:
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

    def __init__(self, reader: Source, index: int, small: Mapping[int, dict[str, Any]]) -> None:
        self.reader, self.small = reader, small
        self.parameters: dict[int, Tensor] = {}
        self.names: dict[int, dict[str, str]] = {key: {} for key in small}
        for name in reader.specs:
            part, *place = name.split("/", 3)
            if part == "optimizer" and place[0] == str(index):
                self.names.setdefault(int(place[1]), {})[place[2]] = name

    def for_parameters(self, parameters: Mapping[int, Tensor]) -> StoredState:
        """From now on tensors of a parameter's shape come sharded as it is."""
        self.parameters = dict(parameters)
        return self

    def __getitem__(self, key: int) -> dict[str, Any]:
        give_back()  # what the parameter before was decoded into
        large = {name: self._tensor(key, entry) for name, entry in self.names[key].items()}
        return {**self.small.get(key, {}), **large}

    def _tensor(self, key: int, entry: str) -> Tensor:
        like = self.parameters.get(key)
        if like is None or tuple(like.shape) != self.reader.specs[entry][2]:
            return self.reader.whole(entry)
        return sharded_as(like, self.reader.part(entry, like))

    def __iter__(self) -> Iterator[int]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def sharded_as(like: Tensor, part: Tensor) -> Tensor:
    """This rank's part of a tensor as what it is a part of; itself, if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return part
    with torch.no_grad():
        return DTensor.from_local(
            part.to(like.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )


def everything(tensor: Tensor) -> Tensor:
    """A tensor with all of its shards, which all ranks must ask for together; any other as it is."""
    if isinstance(tensor, DTensor) and tensor.dtype == torch.int16:  # which neither gloo nor NCCL carries
        return whole(sharded_as(tensor, local(tensor).view(torch.bfloat16))).view(torch.int16)
    return whole(tensor.detach())
