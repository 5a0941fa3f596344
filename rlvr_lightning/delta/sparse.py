"""SparseDelta: the difference between two states of a model's weights, exact on bits and small when few changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from rlvr_lightning.delta.digest import digest_state, ties
from rlvr_lightning.delta.tensor import TensorDelta, describe, flat_bits, local

__all__ = ["SparseDelta", "TensorDelta", "digest_state"]


class SparseDelta(Mapping[str, TensorDelta]):
    """What turns one state dict into another: a TensorDelta for each tensor, also for those that did not change.

    Tied weights are held once, under their first name; `aliases` has the others. Of DTensors the local shard counts.

    Args:
        tensors: the deltas.
        shapes: of the tensors.
        aliases: other name of a tensor: its name in `tensors`.
        base_digest: `digest_state` of the state it starts from, if known.
        result_digest: `digest_state` of the state it leads to, if known.

    Example:
        >>> base, target = {"w": torch.zeros(4)}, {"w": torch.tensor([0.0, 1.0, 0.0, 0.0])}
        >>> delta = SparseDelta.capture(base, target)
        >>> delta.counts(), delta.density
        ({'w': 1}, 0.25)
        >>> delta.apply_(base)
        >>> base["w"].tolist()
        [0.0, 1.0, 0.0, 0.0]
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorDelta],
        shapes: Mapping[str, tuple[int, ...]],
        aliases: Mapping[str, str] | None = None,
        base_digest: str | None = None,
        result_digest: str | None = None,
    ) -> None:
        self.tensors = dict(tensors)
        self.shapes = {name: tuple(shapes[name]) for name in self.tensors}
        self.aliases = dict(aliases or {})
        self.base_digest = base_digest
        self.result_digest = result_digest

    def __getitem__(self, name: str) -> TensorDelta:
        return self.tensors[self.aliases.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors or name in self.aliases

    @classmethod
    def capture(cls, base: Mapping[str, Tensor], target: Mapping[str, Tensor], *, digests: bool = False) -> SparseDelta:
        """The delta from `base` to `target`, compared tensor by tensor.

        Args:
            base: names and tensors.
            target: the same names, shapes, dtypes and devices; a name may be missing where it is tied to another.
            digests: also note the digests of both states, one more pass over each.

        Raises:
            ValueError: names, shapes, dtypes or devices differ.
        """
        aliases = _shared_ties(base, target)
        tensors, shapes = {}, {}
        for name in {**base, **target}:
            if name in aliases:
                continue
            old, new = _pick(base, name, "base"), _pick(target, name, "target")
            if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
                raise ValueError(f"delta: {name!r} is {describe(old)} in the base and {describe(new)} in the target")
            tensors[name], shapes[name] = TensorDelta.between(old, new), tuple(new.shape)
        delta = cls(tensors, shapes, aliases)
        if digests:
            delta.base_digest = digest_state({name: base[name] for name in tensors})
            delta.result_digest = digest_state({name: target[name] for name in tensors})
        return delta

    def apply_(self, state: Mapping[str, Tensor], *, check_digest: bool = False) -> None:
        """Write the target's values into a state that is the base; nothing is written if anything does not fit.

        Args:
            state: the base: tensors, Parameters, local shards of DTensors.
            check_digest: first make sure, by a pass over its memory, that it is the base.

        Raises:
            ValueError: names, shapes, dtypes or (if checked) the digest are not the base's.
        """
        self._each(state, TensorDelta.apply_, check_digest)

    def swap_(self, state: Mapping[str, Tensor]) -> None:
        """Exchange values with a state that is the base; afterwards this delta leads back. Twice changes nothing."""
        self._each(state, TensorDelta.swap_, False)
        self.base_digest, self.result_digest = self.result_digest, self.base_digest

    def invert(self, base: Mapping[str, Tensor]) -> SparseDelta:
        """The delta from the target back to the base; positions are shared with this one, not copied."""
        self._check(base)
        tensors = {name: delta.invert(base[name]) for name, delta in self.items()}
        return SparseDelta(tensors, self.shapes, self.aliases, self.result_digest, self.base_digest)

    def then(self, later: SparseDelta) -> SparseDelta:
        """This from a to b and `later` from b to c make one from a to c.

        Raises:
            ValueError: they are not of the same tensors, or `later` is known to start from another state than b.
        """
        if self.result_digest and later.base_digest and self.result_digest != later.base_digest:
            raise ValueError(
                f"delta: the later one starts from {later.base_digest[:12]}, but this one leads to"
                f" {self.result_digest[:12]}; compose deltas in the order they were made"
            )
        names = [*self.tensors, *self.aliases]
        unknown = set(names) ^ {*later.tensors, *later.aliases}
        if unknown:
            raise ValueError(f"delta: {min(unknown)!r} is in only one of the two deltas; they are of different models")
        first: dict[tuple[str, str], str] = {}
        tensors, aliases = {}, {}
        for name in names:
            pair = (self.aliases.get(name, name), later.aliases.get(name, name))
            if first.setdefault(pair, name) != name:
                aliases[name] = first[pair]
                continue
            _same_shape(name, self.shapes[pair[0]], later.shapes[pair[1]])
            tensors[name] = self[name].then(later[name])
        shapes = {name: self.shapes[self.aliases.get(name, name)] for name in tensors}
        return SparseDelta(tensors, shapes, aliases, self.base_digest, later.result_digest)

    def without_returned(self, base: Mapping[str, Tensor]) -> SparseDelta:
        """Without the entries that came back to the base's values."""
        self._check(base)
        tensors = {name: delta.without_returned(base[name]) for name, delta in self.items()}
        return SparseDelta(tensors, self.shapes, self.aliases, self.base_digest, self.result_digest)

    def counts(self) -> dict[str, int]:
        """Changed entries of each tensor."""
        return {name: len(delta) for name, delta in self.items()}

    @property
    def numel(self) -> int:
        """Entries of all tensors."""
        return sum(delta.numel for delta in self.values())

    @property
    def changed(self) -> int:
        """Changed entries of all tensors."""
        return sum(map(len, self.values()))

    @property
    def density(self) -> float:
        """Share of entries that differ, 0..1."""
        return self.changed / self.numel if self.numel else 0.0

    @property
    def nbytes(self) -> int:
        """Of indices and values."""
        return sum(delta.nbytes for delta in self.values())

    def _each(self, state: Mapping[str, Tensor], write: Callable[[TensorDelta, Tensor], None], check: bool) -> None:
        self._check(state)
        if check:
            if self.base_digest is None:
                raise ValueError("delta: it does not know its base's digest; capture it with digests=True")
            check_digest(state, self, self.aliases, self.base_digest)
        tied = ties(state)
        for name in state:
            if tied[name] == name:  # an alias with memory of its own is written like any other
                write(self[name], state[name])

    def _check(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless the state has this delta's tensors and no others."""
        check_state(
            state, {name: (delta.values.dtype, self.shapes[name]) for name, delta in self.items()}, self.aliases
        )
        for name, tensor in state.items():
            if tensor.device != self[name].values.device:
                raise ValueError(f"delta: {name!r} is {describe(tensor)}, the delta on {self[name].values.device}")


def check_state(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], aliases: Mapping[str, str]
) -> None:
    """Raise ValueError unless a state has these tensors (dtype and shape) and no others, tied as in `aliases`."""
    for name in expected:
        _pick(state, name, "state")
    for name, first in ties(state).items():
        own = aliases.get(name, name)
        if own not in expected:
            raise ValueError(f"delta: it knows no tensor {name!r}; give the state it was made from")
        if own != aliases.get(first, first):
            raise ValueError(f"delta: {name!r} and {first!r} share memory here, but are two tensors in the delta")
        tensor, (dtype, shape) = local(state[name]), expected[own]
        _same_shape(name, shape, tuple(tensor.shape))
        if tensor.dtype != dtype:
            raise ValueError(f"delta: {name!r} is {describe(tensor)}, not {dtype}")


def check_digest(state: Mapping[str, Tensor], names: Iterable[str], aliases: Mapping[str, str], expected: str) -> None:
    """Raise ValueError unless tensors of a state have this digest, and their aliases the same bits."""
    found = digest_state((name, state[name]) for name in names)
    if found != expected:
        raise ValueError(f"delta: it starts from {expected[:12]}, not from the given {found[:12]}")
    for name, first in aliases.items():
        if name in state and not _one(state, first, name):
            raise ValueError(f"delta: {name!r} and {first!r} are one tensor in its base, but differ in the given")


def _pick(state: Mapping[str, Tensor], name: str, which: str) -> Tensor:
    if name not in state:
        raise ValueError(f"delta: the {which} has no tensor {name!r}; both must be states of one model")
    return local(state[name])


def _same_shape(name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
    if tuple(expected) != tuple(found):
        raise ValueError(f"delta: {name!r} has shape {list(found)}, not {list(expected)}")


def _shared_ties(base: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    """Other name: first name, of tensors that are one in both states (tied in one and equal in the other will do)."""
    tied = ties(base), ties(target)
    first_with: tuple[dict[str, str], dict[str, str]] = {}, {}
    aliases: dict[str, str] = {}
    for name in {**base, **target}:
        for names, first in zip(tied, first_with, strict=True):
            known = first.get(names[name]) if name in names else None
            if known is not None and _one(base, known, name) and _one(target, known, name):
                aliases[name] = known
                break
        else:
            for names, first in zip(tied, first_with, strict=True):
                first.setdefault(names.get(name, name), name)
    return aliases


def _one(state: Mapping[str, Tensor], first: str, name: str) -> bool:
    """Whether a state has the same bits under both names, or does without the second."""
    if first not in state or name not in state:
        return first in state
    a, b = local(state[first]), local(state[name])
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride()) or torch.equal(flat_bits(a), flat_bits(b))
