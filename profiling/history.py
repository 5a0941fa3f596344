"""What a step held over its allocations, in bounded memory: of neighbouring moments the fullest is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

POINTS = 2000
"""Moments kept at most; of so many a stacked chart of a dozen owners is still drawn at once."""
MARKS = 500
"""Beginnings of phases kept at most."""


@dataclass
class Moment:
    """After one event."""

    event: int
    """Number of the allocation, release or change of size, from 0."""
    seconds: float
    """Since the start of the step; counting slows it down."""
    total: int
    owners: dict[str, int]


@dataclass
class Mark:
    """Where a phase begins."""

    phase: str
    event: int
    seconds: float
    peak: int = 0
    """The most that was held from here to the next."""


@dataclass
class History:
    """Fed by `AllocationCounter.on_change`.

    When there are too many moments, each two neighbours become one, the fuller: the peak stays exact, and what gets
    lost are moments that held less than one next to them.

    Example:
        >>> history = History(most=4)
        >>> for size in (1, 5, 2, 3, 9, 4, 6):
        ...     history.add(size, {"work": size})
        >>> [(moment.event, moment.total) for moment in history.moments], history.every, history.dropped
        ([(1, 5), (3, 3), (4, 9), (6, 6)], 2, 3)
    """

    most: int = POINTS
    """Moments kept; even."""
    clock: Callable[[], float] = time.perf_counter
    every: int = 1
    """Events that a moment stands for."""
    events: int = 0
    moments: list[Moment] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    marks_dropped: int = 0

    def __post_init__(self) -> None:
        self._start = self.clock()
        self._end: float | None = None

    def close(self) -> None:
        """The step has ended."""
        self._end = self._now()

    def _now(self) -> float:
        return self.clock() - self._start

    def add(self, total: int, owners: Mapping[str, int]) -> None:
        """Something was made, or went."""
        fresh = self.events % self.every == 0
        if fresh or total > self.moments[-1].total:
            held = {owner: size for owner, size in owners.items() if size}
            moment = Moment(self.events, self._now(), total, held)
            self.moments[-1 if not fresh else len(self.moments) :] = [moment]
        if self.marks and total > self.marks[-1].peak:
            self.marks[-1].peak = total
        self.events += 1
        if len(self.moments) == self.most and self.events % self.every == 0:
            pairs = zip(self.moments[::2], self.moments[1::2], strict=True)
            self.moments = [max(pair, key=lambda moment: moment.total) for pair in pairs]
            self.every *= 2

    def enter(self, phase: str) -> None:
        """A phase begins; "" is none."""
        if len(self.marks) < MARKS:
            self.marks.append(Mark(phase, self.events, self._now()))
        else:
            self.marks_dropped += 1

    @property
    def dropped(self) -> int:
        """Events that are not shown, for a fuller moment beside them is."""
        return self.events - len(self.moments)

    @property
    def peak(self) -> Moment:
        """The first of the fullest."""
        return max(self.moments, key=lambda moment: moment.total)

    def owners(self) -> list[str]:
        """All that held something, in the order of what they held on average, most first."""
        sums: dict[str, int] = {}
        for moment in self.moments:
            for owner, size in moment.owners.items():
                sums[owner] = sums.get(owner, 0) + size
        return sorted(sums, key=lambda owner: -sums[owner])

    def phases(self) -> list[dict[str, Any]]:
        """Each phase from its beginning to the next: events, seconds, and the most it held."""
        ends = [*self.marks[1:], Mark("", self.events, self._now() if self._end is None else self._end)]
        found = []
        for mark, end in zip(self.marks, ends, strict=True):
            found.append(
                {
                    "phase": mark.phase or "between",
                    "first_event": mark.event,
                    "first_s": mark.seconds,
                    "events": end.event - mark.event,
                    "seconds": end.seconds - mark.seconds,
                    "peak_bytes": mark.peak,
                }
            )
        return found

    def record(self) -> dict[str, Any]:
        """As JSON, columns by name."""
        names = self.owners()
        return {
            "events": self.events,
            "events_per_moment": self.every,
            "events_not_shown": self.dropped,
            "marks_not_shown": self.marks_dropped,
            "peak": {"event": self.peak.event, "bytes": self.peak.total, "owners_bytes": self.peak.owners},
            "phases": self.phases(),
            "event": [moment.event for moment in self.moments],
            "seconds": [round(moment.seconds, 6) for moment in self.moments],
            "owners_bytes": {name: [moment.owners.get(name, 0) for moment in self.moments] for name in names},
        }
