"""`dissect SWEEP --base BASE`: what every run of a sweep did to the weights, and which runs changed the same ones.

Of each run that kept a checkpoint: the shares of changed entries (`sparsity`), the ranks of the change (`rank`) and the
shift of the spectrum (`spectrum`). Of each two runs that differ in the seed alone, or in all but the seed: `overlap`.
The records are in SWEEP/changes.json and SWEEP/overlaps.json; what has one is not computed again unless the run
was, or BASE is another, also where the checkpoint is gone. Records of runs that failed since or are gone are dropped.
Tables of means over seeds are printed; `plots` fills them into Markdown, at `<!-- changes:NAME -->` and
`<!-- overlaps:NAME -->`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlvr_lightning.analysis import overlap_command, rank_command, sparsity_command, spectrum_command
from rlvr_lightning.analysis.command import about, print_table
from rlvr_lightning.analysis.groups import groupings
from rlvr_lightning.analysis.matching import match
from rlvr_lightning.analysis.opening import open_weights
from rlvr_lightning.analysis.overlap import summarise
from rlvr_lightning.analysis.weights import Weights, digest
from rlvr_lightning.callbacks.run_files import write_json
from rlvr_lightning.study.change_tables import change_rows, overlap_rows
from rlvr_lightning.study.records import load_records

Record = dict[str, Any]


def changes(base: Weights, tuned: Weights) -> Record:
    """Of one run: counts by part and by kind of matrix, mean ranks, and the spectra's shift."""
    found = match(base, tuned)
    counts = sparsity_command.summarise(sparsity_command.compare(found))
    record = about(found) | {name: counts[name] for name in ("parts", "kinds")}
    if ranks := list(rank_command.analyse(found).values()):
        full = sum(one.full for one in ranks)
        record["matrices"] = len(ranks)
        for measure in rank_command.MEASURES:
            low, high = (sum(bound) / full for bound in zip(*(getattr(one, measure) for one in ranks), strict=True))
            record[f"{measure}_rank_frac"] = [low, high]
        record["spectrum"] = spectrum_command.summarise(list(spectrum_command.analyse(found, None).values()))
    return record


def overlap(base: Weights, first: Weights, second: Weights) -> Record:
    """Of two runs: overlaps of all weights, of those that are no norms, and of norms."""
    counts = overlap_command.count(match(base, first, second))
    groups = groupings(counts)["parts"]
    return {"parts": {group: summarise([counts[name] for name in names]) for group, names in groups.items()}}


def pairs(records: Mapping[str, Record]) -> Iterator[tuple[str, str]]:
    """Keys of runs that differ in the seed alone, or in all but the seed.

    >>> runs = {"a0": ("a", 0), "a1": ("a", 1), "b0": ("b", 0), "b1": ("b", 1)}
    >>> list(pairs({key: {"label": label, "point": {}, "seed": seed} for key, (label, seed) in runs.items()}))
    [('a0', 'a1'), ('a0', 'b0'), ('a1', 'b1'), ('b0', 'b1')]
    """
    for first, second in itertools.combinations(records, 2):
        one, other = records[first], records[second]
        alike = (one["label"], one["point"]) == (other["label"], other["point"])
        if alike != (one["seed"] == other["seed"]):
            yield first, second


class Kept:
    """Records in a file by name, each with the runs and the base that it is of.

    Args:
        path: JSON, written anew after each new record.
        base: `label` and `digest` of what the runs started from.
        runs: by name of a record, what it is to be of; records of others, of earlier runs, or of another base go.
    """

    def __init__(self, path: Path, base: Mapping[str, str | None], runs: Mapping[str, list[Record]]) -> None:
        self.path, self.base, self.runs, self.made = path, dict(base), runs, 0
        there: dict[str, Record] = json.loads(path.read_text()) if path.is_file() else {}
        self.records = {name: record for name, record in there.items() if self._fits(name, record)}
        if gone := len(there) - len(self.records):
            self._write()
            print(f"{path}: {gone} records are of other runs or of another base, and dropped", file=sys.stderr)

    def _fits(self, name: str, record: Record) -> bool:
        same_base = record.get("base", {}).get("digest") == self.base["digest"]
        return same_base and record["started"] == [run["started"] for run in self.runs.get(name, [])]

    def _write(self) -> None:
        write_json(self.path, dict(sorted(self.records.items())))

    def add(self, name: str, compute: Callable[[], Record]) -> None:
        """Compute a record, unless there is one."""
        if name in self.records:
            return
        runs = self.runs[name]
        who = [{field: run[field] for field in ("label", "point", "seed")} for run in runs]
        started = [run["started"] for run in runs]
        self.records[name] = {"runs": who, "started": started, "base": self.base} | compute()
        self.made += 1
        self._write()


def with_checkpoints(folder: Path) -> dict[str, Record]:
    """Records of the runs that ended well and kept a checkpoint; says how many did not.

    Raises:
        ValueError: there are none.
    """
    records = load_records(folder)
    found = {
        key: record
        for key, record in records.items()
        if record["status"] == "ok" and any((folder / "runs" / key).rglob("*.ckpt"))
    }
    if not found:
        raise ValueError(f"{folder} has no run with a checkpoint; sweep with keep_checkpoints: true")
    if len(found) < len(records):
        print(f"{len(records) - len(found)} of {len(records)} runs failed or kept no checkpoint", file=sys.stderr)
    return found


def main(argv: list[str]) -> int:
    """Analyse; returns the exit status."""
    made = argparse.ArgumentParser(
        prog="python -m rlvr_lightning dissect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("sweep", type=Path, help="a sweep's folder, such as results/tiny_seeds")
    made.add_argument("--base", required=True, help="what all of its runs started from")
    made.add_argument("--only_changes", action="store_true", help="compare no pairs of runs")
    options = made.parse_args(argv)
    try:
        _work(options.sweep, options.base, options.only_changes)
    except (ValueError, OSError) as error:
        print(f"error: dissect: {error}", file=sys.stderr)
        return 2
    return 0


def _work(folder: Path, base_name: str, only_changes: bool) -> None:
    from tqdm import tqdm

    base = open_weights("--base", base_name)
    records = with_checkpoints(folder)

    def weights(key: str) -> Weights:
        return open_weights(key, str(folder / "runs" / key), base)

    origin = {"label": base_name, "digest": digest(base, base.specs)}
    good = {key: record for key, record in load_records(folder).items() if record["status"] == "ok"}
    both = {f"{a}+{b}": (a, b) for a, b in pairs(good)}
    found = Kept(folder / "changes.json", origin, {key: [record] for key, record in good.items()})
    same = Kept(folder / "overlaps.json", origin, {name: [good[a], good[b]] for name, (a, b) in both.items()})
    for key in tqdm(records, desc="changes", disable=None, leave=False):
        found.add(key, lambda key=key: changes(base, weights(key)))  # type: ignore[misc]
    todo = {name: (a, b) for name, (a, b) in both.items() if not only_changes and a in records and b in records}
    for name, (a, b) in tqdm(todo.items(), desc="overlaps", disable=None, leave=False):
        same.add(name, lambda a=a, b=b: overlap(base, weights(a), weights(b)))  # type: ignore[misc]
    print(f"{len(records)} runs, {len(todo)} pairs; {found.made + same.made} records made in {folder}")
    heading, *rows = change_rows(folder, ranges=False)
    print_table("what the runs changed, means over seeds", heading, rows)
    if todo:
        heading, *rows = overlap_rows(folder)
        print_table("which changed the same, means over pairs of runs", heading, rows, left=(0, 1, 2))
