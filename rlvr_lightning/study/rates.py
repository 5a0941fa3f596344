"""Which learning rates work: grids over decades, the band of rates that are stable, and which one to take.

A rate is judged by where a metric settles: the mean over the last tenth of its curve (one value, where the curve has
fewer than twenty). A rate is *stable* if all of its runs ended well and the mean over seeds keeps `KEPT` of what the
best rate gained over the start. The band is the run of stable rates around the best. What is suggested is the middle
of the band on the logarithmic axis, not the best rate: between neighbours the difference is noise, the distance to
where a run collapses is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from rlvr_lightning.study.records import Cell, lower_is_better

KEPT = 0.9


def parse_rates(text: str, per_decade: int = 2) -> list[float]:
    """A grid over decades, both ends included, rounded to two digits.

    Args:
        text: `LOW..HIGH`, or rates with commas between them.
        per_decade: steps from a rate to ten times as much.

    Raises:
        ValueError: it is neither, or `per_decade` is below 1.

    Example:
        >>> parse_rates("1e-3..0.1"), parse_rates("1e-3..0.1", per_decade=1), parse_rates("0.5,2")
        ([0.001, 0.0032, 0.01, 0.032, 0.1], [0.001, 0.01, 0.1], [0.5, 2.0])
    """
    if per_decade < 1:
        raise ValueError(f"--per_decade must be at least 1, got {per_decade}")
    try:
        ends = [float(part) for part in re.split(r"\.\.|,", text)]
    except ValueError:
        ends = []
    if not ends or min(ends) <= 0 or (".." in text and (len(ends) != 2 or ends[0] >= ends[1])):
        raise ValueError(f"--lr must be LOW..HIGH with 0 < LOW < HIGH, or rates with commas between, got {text!r}")
    if ".." not in text:
        return ends
    steps = max(1, round(math.log10(ends[1] / ends[0]) * per_decade))
    grid = [float(f"{ends[0] * (ends[1] / ends[0]) ** (i / steps):.1e}") for i in range(steps + 1)]
    return list(dict.fromkeys(grid))  # rounding makes near ones the same


def swept(cell: Cell) -> str | None:
    """The setting that is a learning rate, if one was swept; a rate of 0 is a model that is not trained."""
    rates = {key: rate for key, rate in cell.point.items() if key.rpartition(".")[2] in ("lr", "learning_rate")}
    return next((key for key, rate in rates.items() if isinstance(rate, int | float) and rate > 0), None)


def settled(curve: Sequence[Sequence[Any]]) -> float | None:
    """Mean of the last tenth of a curve [[step, value or None], ...]; None where one of them is not a number.

    >>> settled([[step, float(step)] for step in range(40)]), settled([[0, 1.0], [9, 3.0]]), settled([[0, None]])
    (37.5, 3.0, None)
    """
    last = [value for _, value in curve[-max(1, len(curve) // 10) :]]
    return None if None in last else mean(last)


@dataclass(frozen=True)
class Point:
    """One rate and its runs."""

    rate: float
    values: list[float]
    """Where the metric settled, one for each seed that ended well."""
    failed: int
    """Runs that ended in an error or whose metric was no number."""


@dataclass(frozen=True)
class Line:
    """The rates of one label with all else equal, in ascending order."""

    name: str
    points: list[Point]
    start: float | None
    """Mean of the metric's first values: before training, or in the first batch, which is drawn before any step."""
    lower: bool = False
    """Whether less is better."""

    def band(self) -> list[Point]:
        """The stable rates around the best one; empty if no rate gained anything."""
        sign = -1 if self.lower else 1
        score = [sign * mean(point.values) if point.values and not point.failed else -math.inf for point in self.points]
        best = max(score, default=-math.inf)
        start = -math.inf if self.start is None else sign * self.start
        if best == -math.inf or best <= start:
            return []
        least = best if start == -math.inf else start + KEPT * (best - start)
        low = high = score.index(best)
        while low > 0 and score[low - 1] >= least:
            low -= 1
        while high + 1 < len(score) and score[high + 1] >= least:
            high += 1
        return self.points[low : high + 1]

    def suggestion(self) -> float | None:
        """The middle of the band, the lower one of two."""
        band = self.band()
        return band[(len(band) - 1) // 2].rate if band else None

    def advice(self) -> str:
        """The same in words.

        >>> points = [Point(0.1, [0.5], 0), Point(1.0, [0.9], 0), Point(10.0, [], 1)]
        >>> Line("sgd", points, 0.4).advice()
        'sgd: stable at 1; take 1'
        >>> Line("sgd", points[:2], 0.4).advice()
        'sgd: stable at 1, the highest rate swept: widen --lr; take 1'
        >>> Line("sgd", points[:1], 0.6).advice()
        'sgd: no rate gained on the start (0.6)'
        """
        band = self.band()
        if not band:
            return f"{self.name}: no rate " + ("ran" if self.start is None else f"gained on the start ({self.start:g})")
        rates = f"at {band[0].rate:g}" if len(band) == 1 else f"from {band[0].rate:g} to {band[-1].rate:g}"
        ends = {"highest": band[-1] is self.points[-1], "lowest": band[0] is self.points[0]}
        open_ends = " and the ".join(end for end, reached in ends.items() if reached)
        widen = f", the {open_ends} rate swept: widen --lr" if open_ends else ""
        return f"{self.name}: stable {rates}{widen}; take {self.suggestion():g}"


def lines(found: Iterable[Cell], metric: str) -> list[Line]:
    """The swept rates of each label and remaining settings; cells without a rate are left out."""
    groups: dict[str, list[tuple[float, Cell]]] = {}
    for cell in found:
        if (setting := swept(cell)) is not None:
            rest = {key: value for key, value in cell.point.items() if key != setting}
            groups.setdefault(Cell(cell.label, rest, []).name, []).append((cell.point[setting], cell))
    return [_line(name, sorted(group, key=lambda pair: pair[0]), metric) for name, group in groups.items()]


def _line(name: str, group: Sequence[tuple[float, Cell]], metric: str) -> Line:
    points, starts = [], []
    for rate, cell in group:
        curves = [record["metrics"][metric]["curve"] for record in cell.good if metric in record["metrics"]]
        ends = [settled(curve) for curve in curves]
        values = [value for value in ends if value is not None]
        points.append(Point(rate, values, len(cell.records) - len(values)))
        starts += [curve[0][1] for curve in curves if curve[0][1] is not None]
    return Line(name, points, mean(starts) if starts else None, lower_is_better(metric))
