"""Bytes by owner in one process, at the instants of a training step when there may be most. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes alive at once, by owner."""

    weights: int = 0
    """Stored, this process's share."""
    compute_copy: int = 0
    """Of weights in the dtype of the arithmetic, where a whole copy is alive."""
    gradients: int = 0
    optimizer_state: int = 0
    """A master or its low half included."""
    optimizer_workspace: int = 0
    """Temporaries of the optimizer step."""
    reference: int = 0
    subnetwork: int = 0
    """A mask of the entries that are trained."""
    gathered: int = 0
    """Weights of other processes, and the buffers that they arrive in."""
    reducing: int = 0
    """Whole gradients on the way to their shards, and the buffers that they leave from."""
    activations: int = 0
    logits: int = 0
    """The slices of logits of a loss, or the logits and probabilities of a token's sampling."""
    kv_cache: int = 0
    rollout_workspace: int = 0
    """Activations while prompts are read or tokens decoded."""
    other: int = 0
    """Of tensors: token ids, rewards, the loss."""
    overhead: int = 0
    """What the framework holds outside of its tensors."""

    @property
    def total(self) -> int:
        """Of all owners.

        >>> Held(weights=4, gradients=3).total
        7
        """
        return sum(self.owners().values())

    def owners(self) -> dict[str, int]:
        """Those that hold something."""
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: size for name, size in sizes.items() if size}


@dataclass(frozen=True, kw_only=True)
class Instant:
    """A moment of a step."""

    name: str
    phase: Literal["rollout", "training"]
    held: Held


@dataclass(frozen=True)
class Ledger:
    """A step of one process.

    Example:
        >>> sampling = Instant(name="the last token", phase="rollout", held=Held(weights=4, kv_cache=9))
        >>> updating = Instant(name="the update", phase="training", held=Held(weights=4, gradients=4))
        >>> ledger = Ledger([sampling, updating])
        >>> ledger.peak.name, ledger.peak_bytes, ledger.phase_bytes("training")  # not 4 + 9 + 4
        ('the last token', 13, 8)
    """

    instants: Iterable[Instant]

    def __post_init__(self) -> None:
        object.__setattr__(self, "instants", tuple(self.instants))
        if not self.instants:
            raise ValueError("a ledger needs at least one instant")

    @property
    def peak(self) -> Instant:
        """The instant with most; the first of equals."""
        return max(self.instants, key=lambda instant: instant.held.total)

    @property
    def peak_bytes(self) -> int:
        """At once, not in sum."""
        return self.peak.held.total

    def phase_bytes(self, phase: Literal["rollout", "training"]) -> int:
        """The most at once in a phase; 0 if it has no instants."""
        return max((instant.held.total for instant in self.instants if instant.phase == phase), default=0)


PHASES = ("rollout", "reference", "forward", "backward", "optimizer")
"""Of a step of a GRPO module, those that have an owner for what is made in them."""


def of_phases(peaks: Mapping[str, Mapping[str, int]]) -> Ledger:
    """A ledger of what was held when there was most in each phase of a step; others than `PHASES` are left out.

    Args:
        peaks: phase -> owner, as of `Held` -> bytes.

    >>> of_phases({"": {"weights": 99}, "rollout": {"weights": 4, "kv_cache": 9}, "forward": {"weights": 4}}).peak.phase
    'rollout'
    """
    return Ledger(
        Instant(name=name, phase="rollout" if name == "rollout" else "training", held=Held(**held))
        for name, held in peaks.items()
        if name in PHASES
    )
