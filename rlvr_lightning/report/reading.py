"""What a run left in its folder, a resumed one together with what it went on from. Damaged lines are counted."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlvr_lightning.study.records import Curve, measured_rows

FILES = ("metrics.csv", "config.yaml", "memory.json", "sparsity.jsonl", "completions.jsonl")
"""What `fit` writes into a run's folder, and this reads."""


@dataclass
class Run:
    """One run, whatever of it was found."""

    name: str
    folder: Path
    group: str = ""
    """Runs that differ in the seed alone share it, and are drawn alike; of others the name."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """Metric: [(batches of rollouts done, value), ...]; rising steps, each once; values may be NaN or infinite."""
    memory: dict[str, Any] = field(default_factory=dict)
    """As in `memory.json`."""
    sparsity: list[dict[str, Any]] = field(default_factory=list)
    """Lines of `sparsity.jsonl` of the first optimizer; rising `step`, in optimizer steps, each once."""
    why: list[dict[str, Any]] = field(default_factory=list)
    """The same of `why_sparse.jsonl`, which only runs with that callback have."""
    curvature: list[dict[str, float]] = field(default_factory=list)
    """Eigenvalues in `curvature.json`, if the command of that name was told to write it there."""
    completions: list[dict[str, Any]] = field(default_factory=list)
    """Samples of the first step kept and of the last; `step` is the number of batches done when they were written."""
    config: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    """Where the numbers come from: command, versions, what it was resumed from."""
    missing: list[str] = field(default_factory=list)
    """A sentence for everything that is not there, was unreadable or is not shown."""

    def __post_init__(self) -> None:
        self.group = self.group or self.name

    def last(self, metric: str) -> float | None:
        """The value at the end; None if it was not recorded."""
        return self.curves[metric][-1][1] if self.curves.get(metric) else None

    def highest(self, metric: str) -> float | None:
        """The highest finite value; None if there is none."""
        return max((value for _, value in self.curves.get(metric, []) if math.isfinite(value)), default=None)


def is_run(folder: Path) -> bool:
    """Whether a folder holds any file of a run."""
    return any((folder / name).is_file() for name in FILES)


def merged(said: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Each text once, with the names of the runs that it is said of.

    >>> merged([("a", "no config"), ("b", "no config")])
    {'no config': 'a, b'}
    """
    found: dict[str, str] = {}
    for name, text in said:
        found[text] = f"{found[text]}, {name}" if text in found else name
    return found


def notes(said: Iterable[tuple[str, str]]) -> list[str]:
    """The same as lines."""
    return [f"{names}: {text}" for text, names in merged(said).items()]


def read_run(name: str, folder: Path) -> Run:
    """Read a folder, and before it those of the runs that it was resumed from.

    A step that was run again after a crash is shown as it was run last: of an earlier run counts what came before the
    checkpoint.

    Raises:
        ValueError: a file is not what its name says.
    """
    run = _read_folder(name, folder)
    seen, begins = {folder.resolve()}, run
    while earlier := _resumed_from(begins):
        run.origin["resumed from"] = ", ".join(filter(None, [run.origin.get("resumed from"), str(earlier)]))
        if not is_run(earlier):
            run.missing.append(f"what it was resumed from is not at {earlier}: curves begin there")
            break
        if earlier.resolve() in seen:
            break
        seen.add(earlier.resolve())
        begins = _read_folder(str(earlier), earlier)
        _prepend(run, begins)
    _remark(run)
    return run


def _read_folder(name: str, folder: Path) -> Run:
    run = Run(name, folder)
    for file in FILES:
        path = folder / file
        if not path.is_file():
            run.missing.append(f"no {file}")
            continue
        {
            "metrics.csv": _read_metrics,
            "config.yaml": _read_config,
            "memory.json": _read_memory,
            "sparsity.jsonl": _read_sparsity,
            "completions.jsonl": _read_completions,
        }[file](run, path)
    if (folder / "why_sparse.jsonl").is_file():
        run.why = _measured(run, folder / "why_sparse.jsonl", _watched)
    if (folder / "curvature.json").is_file():
        _read_curvature(run, folder / "curvature.json")
    return run


def _damaged(run: Run, path: Path, number: int) -> None:
    if number:
        run.missing.append(f"{path.name}: {number:,} damaged line{'s' * (number > 1)} left out")


def _read_metrics(run: Run, path: Path) -> None:
    points: dict[str, dict[int, float]] = {}
    damaged = 0
    try:
        for row in measured_rows(path):
            damaged += row is None
            step, values = row or (0, {})
            for name, value in values.items():
                points.setdefault(name, {})[step] = value
    except csv.Error as error:
        raise ValueError(f"report: {path} is not CSV: {error}") from None
    run.curves = {name: sorted(curve.items()) for name, curve in points.items()}
    _damaged(run, path, damaged)


def _read_config(run: Run, path: Path) -> None:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict):
        run.missing.append("config.yaml is damaged")
        return
    run.config = config
    if text.startswith("# "):
        run.origin["written by"] = text.splitlines()[0].removeprefix("# ")


def _read_memory(run: Run, path: Path) -> None:
    try:
        memory = json.loads(path.read_bytes())
    except ValueError:
        memory = None
    if not isinstance(memory, dict) or not _sizes(memory.get("phase_peak_bytes"), memory.get("peak_bytes")):
        run.missing.append("memory.json is damaged")
        return
    run.memory = memory


def _read_curvature(run: Run, path: Path) -> None:
    try:
        found = json.loads(path.read_bytes())["eigenvalues"]
        run.curvature = [{key: float(one[key]) for key in ("value", "residual")} for one in found]
    except (ValueError, KeyError, TypeError):
        run.missing.append("curvature.json is damaged")


def _sizes(phases: Any, peak: Any) -> bool:
    return isinstance(phases, dict) and all(isinstance(size, int) for size in (peak, *phases.values()))


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSON Lines file, one at a time; None for a line that is none."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            yield value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


def _read_sparsity(run: Run, path: Path) -> None:
    run.sparsity = _measured(run, path, _compared)


def _measured(run: Run, path: Path, whole: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Measurements of the first optimizer, a line each."""
    found: dict[int, dict[str, Any]] = {}
    damaged = others = 0
    for line in _lines(path):
        if line is None or not whole(line):
            damaged += 1
        elif line.get("optimizer"):
            others += 1
        else:
            found[line["step"]] = line
    _damaged(run, path, damaged)
    if others:
        run.missing.append(f"{path.name}: {others:,} lines of further optimizers are not shown")
    return [found[step] for step in sorted(found)]


def _compared(line: dict[str, Any]) -> bool:
    """Whether it is a line of `UpdateSparsity`."""
    return _counted(line.get("last_step")) and (not line.get("total") or _counted(line["total"]))


def _watched(line: dict[str, Any]) -> bool:
    """Whether it is a line of `WhySparse`, as far as it is read."""
    parts = line.get("kinds"), line.get("layers")
    if not all(isinstance(part, dict) for part in parts):
        return False
    rows = [line.get("all"), *line["kinds"].values(), *line["layers"].values()]
    whole = rows[: 1 + len(line["kinds"])]
    return all(isinstance(row, dict) for row in rows) and all(
        isinstance(row.get(key), wanted)
        for row in whole
        for key, wanted in (("update", dict), ("sqrt_v", dict | None), ("sqrt_v_own", dict | None))
    )


def _counted(record: Any) -> bool:
    """Whether it is what `UpdateSparsity` writes of a step, or of all since the start."""
    return isinstance(record, dict) and all(isinstance(record.get(key), dict) for key in ("changed", "kinds", "layers"))


def fraction(record: Any, definition: str) -> float | None:
    """Changed entries over all of a part of the weights; None if that was not measured.

    >>> fraction({"entries": 8, "changed": {"bf16": 2}}, "bf16")
    0.25
    """
    try:
        return record["changed"][definition] / record["entries"]
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def _read_completions(run: Run, path: Path) -> None:
    first: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []
    damaged = 0
    for line in _lines(path):  # only those of two steps are held
        if line is None:
            damaged += 1
        elif not first or line["step"] == first[0]["step"]:
            first.append(line)
        elif not last or line["step"] == last[0]["step"]:
            last.append(line)
        elif line["step"] > last[0]["step"]:
            last = [line]
    run.completions = first + last
    _damaged(run, path, damaged)


def _resumed_from(run: Run) -> Path | None:
    """The folder of the run whose checkpoint a run began with."""
    path = run.config.get("ckpt_path")
    if not isinstance(path, str) or not path.endswith(".ckpt"):
        return None
    holder = Path(path).parent
    folder = holder.parent if holder.name == "checkpoints" else holder
    beginnings = [above / folder for above in (Path(), *run.folder.resolve().parents)]
    return next(
        filter(is_run, beginnings), folder
    )  # relative to where the command was typed: above runs/NAME/version_K


def _prepend(run: Run, earlier: Run) -> None:
    """Put what was measured before the checkpoint in front."""
    begin = min((curve[0][0] for curve in run.curves.values()), default=None)
    for name, curve in earlier.curves.items():
        kept = [point for point in curve if begin is None or point[0] < begin]
        run.curves[name] = kept + run.curves.get(name, [])
    run.curves = {name: curve for name, curve in run.curves.items() if curve}
    since = run.sparsity[0].get("since_step") if run.sparsity else None
    run.sparsity = [line for line in earlier.sparsity if since is None or line["step"] <= since] + run.sparsity
    since = run.why[0].get("since_step") if run.why else None
    run.why = [line for line in earlier.why if since is None or line["step"] <= since] + run.why
    if earlier.completions:
        first, last = earlier.completions[0]["step"], (run.completions or earlier.completions)[-1]["step"]
        run.completions = [line for line in earlier.completions if line["step"] == first] + [
            line for line in run.completions or earlier.completions if line["step"] == last != first
        ]
    run.memory = _highest(run.memory, earlier.memory)
    run.missing += [f"{text}, in {earlier.folder}" for text in earlier.missing]


def _highest(memory: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Peaks of both parts of a run; the rest as the later one says."""
    if not memory or not earlier:
        return memory or earlier
    phases = [part.get("phase_peak_bytes") or {} for part in (memory, earlier)]
    peaks = {name: max(part.get(name, 0) for part in phases) for part in phases for name in part}
    return memory | {"peak_bytes": max(memory["peak_bytes"], earlier["peak_bytes"]), "phase_peak_bytes": peaks}


def _remark(run: Run) -> None:
    for name, curve in run.curves.items():
        if number := sum(not math.isfinite(value) for _, value in curve):
            run.missing.append(f"{name}: {number:,} value{'s' * (number > 1)} not finite, a gap in the curve")
