"""What the page of claims reads from records: values by seed, intervals over seeds, text. Standard library only."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rlvr_lightning.study.records import load_records

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t: 97.5 % lie below, by degrees of freedom."""
Record = Mapping[str, Any]
BySeed = dict[int, float]


@cache
def records(folder: Path) -> dict[str, Record]:
    """Those of a sweep; ValueError if there are none."""
    found = load_records(folder)
    if not found:
        raise ValueError(f"claims: no records in {folder}; run its sweep first")
    return dict(found)


@cache
def dissected(folder: Path, what: str) -> dict[str, Record]:
    """`changes` or `overlaps` of a sweep; ValueError if it was not dissected."""
    path = folder / f"{what}.json"
    if not path.is_file():
        raise ValueError(f"claims: no {path}; python -m rlvr_lightning dissect makes it")
    return dict(json.loads(path.read_text()))


def final(folder: Path, label: str, metric: str, **point: Any) -> BySeed:
    """The last value of a metric by seed, of the runs of a label that ended well.

    Args:
        folder: of the sweep.
        label: of the sweep's configs.
        metric: that the records keep.
        point: values of swept settings, by the last part of their names; others are not looked at.
    """
    return {seed: curve[-1] for seed, curve in _curves(folder, label, metric, point).items()}


def first(folder: Path, label: str, metric: str) -> BySeed:
    """The first value of a metric by seed, of the runs of a label that ended well."""
    return {seed: curve[0] for seed, curve in _curves(folder, label, metric, {}).items()}


def measurements(folder: Path, label: str, metric: str) -> int:
    """How often a metric was measured in a run, at least: loggers repeat a value until the next one."""
    found = _curves(folder, label, metric, {}).values()
    return min(sum(a != b for a, b in itertools.pairwise([None, *curve])) for curve in found)


def average(folder: Path, label: str, metric: str) -> BySeed:
    """The mean of a metric over its whole curve, by seed, of the runs of a label that ended well."""
    return {seed: mean(curve) for seed, curve in _curves(folder, label, metric, {}).items()}


def _curves(folder: Path, label: str, metric: str, point: Mapping[str, Any]) -> dict[int, list[float]]:
    """Values of a metric by seed; ValueError if there are none, two runs of a seed, or one that is not finite."""
    found: dict[int, list[float]] = {}
    for key, record in records(folder).items():
        if record["label"] != label or record["status"] != "ok" or not at(record, point):
            continue
        if record["seed"] in found:
            raise ValueError(
                f"claims: {folder} has two runs of {label} with seed {record['seed']}; name their settings"
            )
        curve = [value for _, value in record["metrics"].get(metric, {"curve": []})["curve"]]
        if not curve or None in curve:
            raise ValueError(f"claims: {folder}/records/{key}.json has no finite {metric}")
        found[record["seed"]] = curve
    if not found:
        raise ValueError(f"claims: {folder} has no good run of {label} {dict(point) or ''}".rstrip())
    return found


def at(record: Record, point: Mapping[str, Any]) -> bool:
    """Whether a record is of a run at a point."""
    settings = {name.rpartition(".")[2]: value for name, value in record["point"].items()}
    return all(settings.get(name) == value for name, value in point.items())


def changed(folder: Path, label: str, of: Callable[[Record], Any], **point: Any) -> BySeed:
    """Something of the changes of a label's runs, by seed."""
    found: BySeed = {}
    for one in dissected(folder, "changes").values():
        run = one["runs"][0]
        if run["label"] == label and at(run, point):
            if run["seed"] in found:
                raise ValueError(f"claims: {folder}/changes.json has two runs of {label} with seed {run['seed']}")
            found[run["seed"]] = of(one)
    if not found:
        raise ValueError(f"claims: {folder}/changes.json has nothing of {label} {point or ''}".rstrip())
    return found


def shared(folder: Path, first: str, second: str, of: Callable[[Record], Any]) -> list[Any]:
    """Something of the overlaps of two labels' runs of the same seed; of one label's of different seeds."""
    found = []
    for one in dissected(folder, "overlaps").values():
        a, b = one["runs"]
        if {a["label"], b["label"]} == {first, second} and (first == second) != (a["seed"] == b["seed"]):
            found.append(of(one))
    if not found:
        raise ValueError(f"claims: {folder}/overlaps.json has no pair of {first} and {second}")
    return found


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of Student's t, of 2 to 10 values; ValueError for fewer or more.

    >>> [round(x, 3) for x in interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    if len(values) - 1 not in T_975:
        raise ValueError(f"claims: an interval needs 2 to {max(T_975) + 1} seeds, there are {len(values)}")
    middle = mean(values)
    half = T_975[len(values) - 1] * stdev(values) / len(values) ** 0.5
    return middle, middle - half, middle + half


def difference(first: BySeed, second: BySeed) -> tuple[float, float, float]:
    """Of first minus second over the seeds that both have: mean and 95 % interval.

    >>> [round(x, 3) for x in difference({0: 2.0, 1: 3.0, 2: 4.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 9.0})]
    [2.0, -0.484, 4.484]
    """
    return interval([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def shown(values: BySeed | Sequence[float], text: str = "{:.3f}", times: float = 1.0) -> str:
    """Mean and range.

    >>> shown({0: 0.5, 1: 0.75}), shown([0.1, 0.4], "{:.1f} %", 100)
    ('0.625 (0.500 to 0.750)', '25.0 % (10.0 % to 40.0 %)')
    """
    found = [times * value for value in (values.values() if isinstance(values, dict) else values)]
    low, middle, high = (text.format(x) for x in (min(found), mean(found), max(found)))
    return middle if low == high else f"{middle} ({low} to {high})"


def percent(values: BySeed | Sequence[float]) -> str:
    """Shares: mean and range.

    >>> percent([0.5, 0.25]), percent([0.00012])
    ('37.5 % (25 % to 50 %)', '0.012 %')
    """
    return shown(values, "{:.3g} %", 100)


def signed(interval: tuple[float, float, float], digits: int = 3) -> str:
    """A difference and its interval.

    >>> signed((-0.008, -0.02, 0.004))
    '-0.008 (95 %: -0.020 to +0.004)'
    """
    middle, low, high = (f"{value:+.{digits}f}" for value in interval)
    return f"{middle} (95 %: {low} to {high})"
