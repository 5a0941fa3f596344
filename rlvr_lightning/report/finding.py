"""From what is typed to runs: a run's folder, a folder of them, or a sweep's folder of records."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlvr_lightning.report.reading import FILES, Run, is_run, read_run
from rlvr_lightning.study.records import Cell, Curve


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs that some paths mean, in their order.

    Args:
        paths: each a run's folder (`runs/NAME/version_K`), a folder of such (`runs/NAME`; those that a later one was
            resumed from count as part of it), or a sweep's (`results/NAME`).

    Raises:
        ValueError: a path is none of these, or is named twice.
    """
    folders: list[Path] = []
    for path in paths:
        found = _folders(path)
        if twice := {f.resolve() for f in found} & {f.resolve() for f in folders}:
            raise ValueError(f"report: {sorted(twice)[0]} is named twice; give each run once")
        folders += found
    names = _names(folders)
    runs = [_read(name, folder) for name, folder in zip(names, folders, strict=True)]
    parts = {Path(text).resolve() for run in runs for text in run.origin.get("resumed from", "").split(", ") if text}
    return [run for run in runs if run.folder.resolve() not in parts or run.folder in paths]


def _folders(path: Path) -> list[Path]:
    if not path.exists():
        raise ValueError(f"report: there is no {path}; give a run's folder, such as runs/sgd/version_0")
    if is_run(path):
        return [path]
    records = sorted((path / "records").glob("*.json"))
    below = [path / "runs" / record.stem for record in records] or sorted(path.glob("version_*"), key=_version)
    found = [folder for folder in below if records or is_run(folder)]
    if not found:
        raise ValueError(f"report: {path} is no run's folder: it has none of {', '.join(FILES)}, nor runs or records")
    return found


def _version(folder: Path) -> tuple[int, str]:
    number = folder.name.removeprefix("version_")
    return (int(number) if number.isdigit() else -1, number)


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart; of `version_K` at least the name above.

    >>> _names([Path("runs/sgd/version_0"), Path("runs/adamw/version_0"), Path("a/x/y"), Path("b/x/y")])
    ['sgd/version_0', 'adamw/version_0', 'a/x/y', 'b/x/y']
    """
    names = []
    for folder in folders:
        parts = folder.resolve().parts
        others = [other.resolve().parts for other in folders if other is not folder]
        length = 1 + folder.name.startswith("version_")
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        names.append("/".join(parts[-length:]))
    return names


def _read(name: str, folder: Path) -> Run:
    path = folder.parent.parent / "records" / f"{folder.name}.json"
    record = _record(path) if folder.parent.name == "runs" and path.is_file() else None
    if not is_run(folder):
        run = Run(name, folder, missing=["only a sweep's record: curves of the metrics that the sweep kept"])
    else:
        run = read_run(name, folder)
    if record:
        _add(run, record)
    elif run.config:
        run.origin["run it again"] = f"python -m rlvr_lightning fit --config {folder / 'config.yaml'}"
    return run


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        curves = {name: _curve(summary) for name, summary in record["metrics"].items()}
        return record | {"curves": curves, "command": str(record["command"])}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"report: {path} is no record of a sweep; delete it and run the sweep again") from None


def _curve(summary: dict[str, Any]) -> Curve:
    return [(int(step), math.nan if value is None else float(value)) for step, value in summary["curve"]]


def _add(run: Run, record: dict[str, Any]) -> None:
    """What a sweep's record knows beside the run's own files, or instead of them."""
    if isinstance(record.get("point"), dict):
        run.group = Cell(str(record.get("label")), record["point"], []).name
    run.curves = run.curves or record["curves"]
    run.memory = run.memory or record.get("memory") or {}
    run.origin["run it again"] = record["command"]
    versions = record.get("environment") or {}
    run.origin["versions"] = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    run.origin["started"] = f"{record.get('started')}, {record.get('wall_s')} s, {record.get('status')}"
