"""What was found of benchmarks, as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlvr_lightning.metrics import Estimate

Results = dict[str, dict[str, Estimate]]
"""Benchmark -> name of what is measured -> estimate."""


def as_json(results: Results) -> dict[str, Any]:
    """The same in types that JSON knows."""
    return {name: {what: each._asdict() for what, each in found.items()} for name, found in results.items()}


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first to the left and the others to the right.

    >>> print(aligned([["", "a"], ["long", "1.5"]]))
            a
    long  1.5
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if k else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def spread(estimate: Estimate) -> str:
    """A share in per cent with its interval.

    >>> spread(Estimate(0.5, 0.4, 0.625, 9))
    '50.0 [40, 62]'
    """
    low, high = (f"{100 * bound:.0f}" for bound in (estimate.low, estimate.high))
    return f"{100 * estimate.mean:.1f} [{low}, {high}]"


def table(results: Results) -> str:
    """A row for each benchmark; accuracies in per cent, with their 95 % intervals."""
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    names.sort(key=lambda name: "@" not in name)  # lengths last
    rows = [["", "problems", *(HEADINGS.get(name, name) for name in names)]]
    for benchmark, found in results.items():
        cells = [cell(name, found[name]) if name in found else "-" for name in names]
        rows.append([benchmark, str(next(iter(found.values())).problems), *cells])
    notes = [NOTE] + [SURE] * any(each.low == each.high for found in results.values() for each in rates(found))
    return "\n".join([aligned(rows), *notes])


HEADINGS = {"greedy_pass@1": "greedy", "length_mean": "tokens", "truncated_frac": "cut"}
NOTE = "in per cent but for tokens; in brackets 95 % intervals, by bootstrap over the problems"
SURE = (
    "an interval of one number says that no problem differed: the truth may still be 3 / problems away"  # rule of three
)


def rates(found: dict[str, Estimate]) -> list[Estimate]:
    """The accuracies among what was measured."""
    return [each for name, each in found.items() if "@" in name]


def cell(name: str, estimate: Estimate) -> str:
    """One entry of the table."""
    if name == "length_mean":
        return f"{estimate.mean:.1f}"
    return f"{100 * estimate.mean:.1f}" if name == "truncated_frac" else spread(estimate)
