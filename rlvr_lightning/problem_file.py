"""What an evaluation found of each problem: a line of JSON each, written as it goes, from which a rerun goes on.

    problems_val.jsonl   {"id", "benchmark", "index", "record", "pass_rate", "greedy": {...}, "sampled": {...}}
    problems_val.json    {"digest", "settings", "results"}: what was measured how, and at the end the table

`id` names the prompt (`data.identity.problem_id`), `record` all that the data set says of the problem. `pass_rate` is
the share of sampled completions that are right; of the greedy one where none are sampled. `greedy` and `sampled` hold
lists, an entry for each completion: `correct`, `lengths` (tokens), `truncated`, `answers`, and, if asked for,
`completions`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlvr_lightning.data.identity import problem_id
from rlvr_lightning.metrics import Attempts
from rlvr_lightning.rewards.score import Scores
from rlvr_lightning.schema import Rollouts

Row = dict[str, Any]
Key = tuple[str, int, str, str]
MODES = ("greedy", "sampled")
ADDED = ("prompt_ids", "index", "benchmark")


def digest(value: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a value as JSON; what JSON does not know counts as its text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def key_of(record: Mapping[str, Any]) -> Key:
    """What is the same problem of the same benchmark, asked and answered as before."""
    stated = {name: value for name, value in record.items() if name not in ADDED}
    return record["benchmark"], record["index"], problem_id(record["prompt"]), digest(stated)


def new_row(record: Mapping[str, Any]) -> Row:
    """A row of which nothing is known but the problem."""
    benchmark, index, name, stated = key_of(record)
    return {"id": name, "benchmark": benchmark, "index": index, "record": stated}


def add_attempts(rows: Sequence[Row], mode: str, rollouts: Rollouts, scores: Scores, texts: Sequence[str] = ()) -> None:
    """Put completions into the rows of their problems, in place, and the rate of those that are right.

    Args:
        rows: P.
        mode: `greedy` or `sampled`.
        rollouts: of the P problems.
        scores: by the verifier alone; full marks are right.
        texts: R decoded completions to keep, or none.
    """
    [marks] = scores.parts.values()
    columns = {
        "correct": (marks >= 1.0).tolist(),
        "lengths": rollouts.lengths.tolist(),
        "truncated": rollouts.truncated.tolist(),
        "answers": scores.answers,
        "completions": texts,
    }
    for p, row in enumerate(rows):
        group = slice(p * rollouts.group, (p + 1) * rollouts.group)
        row[mode] = {name: list(column[group]) for name, column in columns.items() if column}
        row["pass_rate"] = sum(row[mode]["correct"]) / rollouts.group


def attempts(row: Row) -> dict[str, Attempts]:
    """What metrics need of a row, by mode."""
    return {
        mode: Attempts(**{name: values for name, values in row[mode].items() if name != "completions"})
        for mode in MODES
        if mode in row
    }


def key_of_row(row: Row) -> Key:
    """The same of a row."""
    return row["benchmark"], row["index"], row["id"], row["record"]


@dataclass
class ProblemFile:
    """The rows of an evaluation in a run's folder."""

    path: Path
    settings: Mapping[str, Any]
    rows: dict[Key, Row] = field(default_factory=dict)
    """Of an earlier evaluation with the same settings, without texts."""
    kept: int = 0
    """Rows in the file."""
    told: str = ""
    """How it begins, in a line for people."""

    def start(self) -> None:
        """Take over what was found before, and write the files."""
        earlier, now = earlier_files(self.path), digest(self.settings)
        same = [path for path in earlier if about(path).get("digest") == now]
        self.told = f"problems are kept in {self.path} as they are done; the same command goes on from there"
        if same:
            rows, damaged = read_rows(same[0])
            self.rows = {key_of_row(row): row for row in rows}
            lost = f" (damaged lines: {damaged}, left out)" if damaged else ""
            self.told = f"{len(rows)} problems are done already, in {same[0]}{lost}; {self.told}"
        elif earlier:
            changed = differences(about(earlier[0]).get("settings") or {}, self.settings)
            self.told = f"measuring anew: since {earlier[0]}, {changed}; {self.told}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(map(line, self.rows.values())), encoding="utf-8")
        os.replace(part, self.path)
        self.kept = len(self.rows)
        for row in self.rows.values():
            for mode in MODES:
                row.get(mode, {}).pop("completions", None)
        self.describe()

    def describe(self, results: Mapping[str, Any] | None = None) -> None:
        """Write down the settings, and what was found in all, once it is known."""
        known = {"digest": digest(self.settings), "settings": self.settings}
        known |= {} if results is None else {"results": results}
        path = self.path.with_suffix(".json")
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(known, indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(part, path)

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows so that a kill from here on does not lose them."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(line, rows)))
            file.flush()
            os.fsync(file.fileno())
        self.kept += len(rows)


def line(row: Row) -> str:
    """A row as it is in the file."""
    return json.dumps(row) + "\n"


def earlier_files(path: Path) -> list[Path]:
    """Of this run and its siblings `version_K`, newest first."""
    folder = path.parent
    found = {path, *(folder.parent.glob(f"version_*/{path.name}") if folder.name.startswith("version_") else ())}
    return sorted((file for file in found if file.is_file()), key=lambda file: file.stat().st_mtime_ns, reverse=True)


def about(path: Path) -> dict[str, Any]:
    """What is known of how a file was made; nothing where that cannot be read."""
    try:
        known = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What changed, by name.

    >>> differences({"seed": 0, "stop": [], "weights": "ab"}, {"seed": 1, "stop": [], "weights": "cd"})
    'seed changed from 0 to 1, weights changed from "ab" to "cd"'
    """
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    said = [f"{name} changed from {json.dumps(then.get(name))} to {json.dumps(now.get(name))}" for name in changed]
    return ", ".join(said) or "how it was measured is not known"


def read_rows(path: Path) -> tuple[list[Row], int]:
    """The rows of a file, and how many of its lines are damaged, as the last one is by a kill."""
    rows = list(_rows(path.read_bytes().splitlines()))
    return [row for row in rows if row is not None], rows.count(None)


def _rows(lines: Sequence[bytes]) -> Iterator[Row | None]:
    for text in lines:
        try:
            row = json.loads(text)
            key_of_row(row)
            correct = [row[mode]["correct"] for mode in MODES if mode in row]
        except (ValueError, KeyError, TypeError):
            yield None
            continue
        yield row if correct and all(isinstance(each, list) and each for each in correct) else None
