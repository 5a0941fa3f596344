"""Records of runs: reading the CSV of a run, and grouping the runs of a sweep by cell. Standard library only."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Curve = list[tuple[int, float]]
LOWER_IS_BETTER = ("nll", "loss")


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better.

    >>> lower_is_better("sft/nll"), lower_is_better("reward/mean")
    (True, False)
    """
    return metric.rpartition("/")[2] in LOWER_IS_BETTER


def measured_rows(metrics_csv: Path) -> Iterator[tuple[int, dict[str, float]] | None]:
    """What each row of the `metrics.csv` of Lightning's CSVLogger holds; None for a row that is damaged.

    Its `step` column counts from 0 at the end of the first batch, and is also 0 for what was measured before training.
    Here the step is the number of batches done: 0 before training, 1 after the first batch.
    """
    training = False
    with metrics_csv.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            try:
                step = int(row["step"])
                values = {name: float(text) for name, text in row.items() if name not in INDEX and text != ""}
            except (KeyError, TypeError, ValueError):  # a row cut short, by a kill in the middle of writing
                yield None
                continue
            training |= any(not name.startswith("val/") for name in values)
            yield step + training, values


def curves(metrics_csv: Path, names: Sequence[str]) -> dict[str, Curve]:
    """Curves of some metrics from the `metrics.csv` of a run, by batches done (`measured_rows`).

    Returns:
        name: [(step, value), ...] in the order of the file; metrics that the file does not have are left out.
    """
    found: dict[str, Curve] = {}
    for row in measured_rows(metrics_csv) if metrics_csv.is_file() else []:
        step, values = row or (0, {})
        for name in names:
            if name in values:
                found.setdefault(name, []).append((step, values[name]))
    return found


INDEX = ("step", "epoch")


def summaries(found: Mapping[str, Curve]) -> dict[str, dict[str, Any]]:
    """First, last and highest value of each curve, and the curve; values that are not finite are None.

    >>> summaries({"m": [(0, 0.25), (5, 1.0), (10, 0.5)]})["m"]["best"]
    1.0
    """
    result = {}
    for name, curve in found.items():
        values = [value for _, value in curve]
        finite = [value for value in values if math.isfinite(value)]
        result[name] = {
            "start": _json_number(values[0]),
            "final": _json_number(values[-1]),
            "best": max(finite, default=None),
            "curve": [[step, _json_number(value)] for step, value in curve],
        }
    return result


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def load_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a sweep by key, in the order of their names."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "records").glob("*.json"))}


@dataclass(frozen=True)
class Cell:
    """The runs of a sweep that differ in the seed alone."""

    label: str
    point: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """Label and settings, for a legend."""
        settings = [f"{setting.rpartition('.')[2]} {value:g}" if isinstance(value, int | float) else f"{value}"
                    for setting, value in self.point.items()]  # fmt: skip
        return ", ".join([self.label, *settings])

    @property
    def good(self) -> list[dict[str, Any]]:
        """The runs that ended well."""
        return [record for record in self.records if record["status"] == "ok"]

    def values(self, metric: str, which: str = "final") -> list[float]:
        """`start`, `final` or `best` of a metric, over the good runs; what is missing or not finite is left out.

        Only what was measured before the first step is a `start`.
        """
        return [value for value in self._values(metric, which) if value is not None]

    def not_finite(self, metric: str, which: str = "final") -> int:
        """How many of the good runs have NaN or infinity there, and are left out of `values`."""
        return self._values(metric, which).count(None)

    def _values(self, metric: str, which: str) -> list[float | None]:
        kept = [record["metrics"][metric] for record in self.good if metric in record["metrics"]]
        return [summary[which] for summary in kept if which != "start" or summary["curve"][0][0] == 0]


def cells(records: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """Records grouped into cells, in the order of label and numbers."""
    groups: dict[str, Cell] = {}
    for record in records:
        key = json.dumps([record["label"], record["point"]], sort_keys=True)
        groups.setdefault(key, Cell(record["label"], dict(record["point"]), [])).records.append(dict(record))
    return sorted(groups.values(), key=lambda cell: (cell.label, [_sortable(v) for v in cell.point.values()]))


def _sortable(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, int | float)
    return (0, float(value), "") if number else (1, 0.0, str(value))


def best_cells(found: Iterable[Cell], metric: str) -> list[Cell]:
    """For each label the cell whose mean final value of a metric is best; one with NaN or failures only if all have."""
    best: dict[str, tuple[tuple[bool, float], Cell]] = {}
    sign = -1 if lower_is_better(metric) else 1
    for cell in found:
        values = cell.values(metric)
        mean = sign * sum(values) / len(values) if values else -math.inf
        rank = (len(values) == len(cell.records), mean)
        if cell.label not in best or rank > best[cell.label][0]:
            best[cell.label] = (rank, cell)
    return [cell for _, cell in best.values()]
