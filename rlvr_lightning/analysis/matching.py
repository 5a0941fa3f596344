"""Which tensors of several models are the same tensor, and what of them cannot be compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod

import torch
from torch import Tensor

from rlvr_lightning.analysis.weights import Spec, Weights
from rlvr_lightning.callbacks.change_counts import kind_of, layer_of
from rlvr_lightning.delta.tensor import bits


@dataclass(frozen=True)
class LeftOut:
    """Entries of one model that have no counterpart."""

    tensor: str
    model: str
    """Label of the model that has them."""
    entries: int
    reason: str


@dataclass
class Matched:
    """Several models, tensor by tensor."""

    models: tuple[Weights, ...]
    tensors: dict[str, Spec] = field(default_factory=dict)
    """Common part of each tensor, leading rows; in a dtype to which that of every model widens exactly."""
    left_out: list[LeftOut] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    """Tensors that are another one in all models, and count once."""

    @property
    def entries(self) -> int:
        """Compared, of one model."""
        return sum(spec.entries for spec in self.tensors.values())

    def pieces(self, name: str) -> Iterator[tuple[Tensor, ...]]:
        """The common part of a tensor, of each model, in flat pieces of equal length."""
        spec, left = self.tensors[name], self.tensors[name].entries
        streams = [model.pieces(model.aliases.get(name, name)) for model in self.models]
        for group in zip(*streams, strict=False):
            size = min(left, *map(len, group))
            if size:
                yield tuple(piece[:size].to(spec.dtype) for piece in group)
            left -= size

    def whole(self, name: str) -> tuple[Tensor, ...]:
        """The common part of a tensor, of each model, in float32 (float64 if it is that)."""
        spec = self.tensors[name]
        dtype = torch.promote_types(spec.dtype, torch.float32)
        tensors = tuple(torch.empty(spec.entries, dtype=dtype) for _ in self.models)
        at = 0
        for group in self.pieces(name):
            for tensor, piece in zip(tensors, group, strict=True):
                tensor[at : at + len(piece)] = piece
            at += len(group[0])
        return tuple(tensor.view(spec.shape) for tensor in tensors)

    def difference(self, name: str) -> Tensor:
        """The last model's common part of a tensor minus the first's, computed and kept in float32 (float64 if wider).

        Raises:
            ValueError: it is not finite.
        """
        spec = self.tensors[name]
        change = torch.empty(spec.entries, dtype=torch.promote_types(spec.dtype, torch.float32))
        at = 0
        for old, *_, new in self.pieces(name):
            change[at : at + len(old)] = new.to(change.dtype) - old.to(change.dtype)
            at += len(old)
        if not change.isfinite().all():
            raise ValueError(f"{name!r} has entries that are infinite or NaN; `sparsity` counts them")
        return change.view(spec.shape)

    def dtypes(self) -> list[str]:
        """Of each model, those of the compared tensors."""
        found = []
        for model in self.models:
            names = {str(spec_of(model, name).dtype).removeprefix("torch.") for name in self.tensors}  # type: ignore[union-attr]
            found.append(" and ".join(sorted(names)))
        return found


def spec_of(model: Weights, name: str) -> Spec | None:
    """Of a tensor under any of its names."""
    return model.specs.get(model.aliases.get(name, name))


def match(*models: Weights) -> Matched:
    """Find the tensors that all models have.

    Vocabularies may be resized: leading rows are compared, the rest is left out, as are tensors outside of the layers
    that not all models have, and those of integers.

    Raises:
        ValueError: the models are of different architectures.
    """
    found = Matched(models)
    if not any(all(spec_of(model, name) for model in models) for name in models[0].specs):
        raise ValueError(f"{models[0].label} and {models[-1].label} have no tensor in common")
    for name in {name: None for model in models for name in model.specs}:
        specs = [spec_of(model, name) for model in models]
        known = [spec for spec in specs if spec is not None]
        if len(known) == len(specs):
            _add(found, name, known)
        elif layer_of(name) != "none":
            there, absent = (models[[spec is None for spec in specs].index(missing)] for missing in (False, True))
            raise ValueError(
                f"{name!r} is in {there.label}, not in {absent.label}; they are of different architectures, or a shard "
                "is missing"
            )
        else:
            for model, spec in zip(models, specs, strict=True):
                if spec is not None:
                    found.left_out.append(LeftOut(name, model.label, spec.entries, "only there"))
    if not found.entries:
        raise ValueError(f"{models[0].label} and {models[-1].label} have no weights in common that are numbers")
    _drop_tied(found)
    return found


def _add(found: Matched, name: str, specs: Sequence[Spec]) -> None:
    """One tensor that all models have."""
    first = specs[0]
    for model, spec in zip(found.models, specs, strict=True):
        if spec.shape[1:] != first.shape[1:] or len(spec.shape) != len(first.shape):
            raise ValueError(
                f"{name!r} is {list(first.shape)} in {found.models[0].label}, {list(spec.shape)} in {model.label}; "
                "they are of different architectures"
            )
        if not spec.dtype.is_floating_point:
            found.left_out.append(LeftOut(name, model.label, spec.entries, f"{spec.dtype}, no weights"))
    if not all(spec.dtype.is_floating_point for spec in specs):
        return
    rows = min((spec.shape[0] for spec in specs if spec.shape), default=0)
    shape = (rows, *first.shape[1:]) if first.shape else ()
    if first.shape and layer_of(name) != "none" and any(spec.shape[0] != rows for spec in specs):
        shapes = ", ".join(f"{list(s.shape)} in {m.label}" for m, s in zip(found.models, specs, strict=True))
        raise ValueError(f"{name!r} is {shapes}; they are of different architectures")
    for model, spec in zip(found.models, specs, strict=True):
        if spec.entries > prod(shape):
            found.left_out.append(LeftOut(name, model.label, spec.entries - prod(shape), "rows that only it has"))
    dtype = reduce(torch.promote_types, [spec.dtype for spec in specs])
    found.tensors[name] = Spec(dtype, shape)


def _drop_tied(found: Matched) -> None:
    """Count an output layer once that is the embedding, in all models: by name, or stored twice with equal bits."""
    heads = [name for name in found.tensors if kind_of(name) == "lm_head"]
    for head in heads:
        for name in [n for n in found.tensors if kind_of(n) == "embedding"]:
            if found.tensors[name] == found.tensors[head] and all(_one(m, name, head) for m in found.models):
                found.tied[head] = name
                del found.tensors[head]
                break


def _one(model: Weights, first: str, second: str) -> bool:
    names = [model.aliases.get(name, name) for name in (first, second)]
    if names[0] == names[1]:
        return True
    pairs = zip(*map(model.pieces, names), strict=True)
    return spec_of(model, first) == spec_of(model, second) and all(torch.equal(bits(a), bits(b)) for a, b in pairs)
