"""`dissect SWEEP --base BASE`: what every run of a sweep did to the weights, and which runs changed the same ones.

Of each run that kept a checkpoint: the shares of changed entries (`sparsity`), the ranks of the change (`rank`) and the
shift of the spectrum (`spectrum`). Of each two runs that differ in the seed alone, or in all but the seed: `overlap`.
Each is a record in SWEEP/changes and SWEEP/overlaps; what has one is not computed again unless the run was. Tables of
means over seeds are printed; `plots` fills them into Markdown, at `<!-- changes:NAME -->`, `<!-- overlaps:NAME -->`.
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
from rlvr_lightning.analysis.weights import Weights
from rlvr_lightning.change_tables import change_rows, overlap_rows
from rlvr_lightning.records import load_records

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
    """Of two runs: overlaps of all weights and by kind of matrix."""
    counts = overlap_command.count(match(base, first, second))
    groups = groupings(counts)
    return {
        grouping: {group: summarise([counts[name] for name in names]) for group, names in groups[grouping].items()}
        for grouping in ("parts", "kinds")
    }


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


def kept(path: Path, runs: list[Record], compute: Callable[[], Record]) -> bool:
    """Whether a record had to be made: it is, unless there is one of these very runs."""
    started = [run["started"] for run in runs]
    if path.is_file() and json.loads(path.read_text())["started"] == started:
        return False
    who = [{name: run[name] for name in ("label", "point", "seed")} for run in runs]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"runs": who, "started": started} | compute(), indent=1) + "\n")
    return True


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
    options = made.parse_args(argv)
    try:
        _work(options.sweep, options.base)
    except (ValueError, OSError) as error:
        print(f"error: dissect: {error}", file=sys.stderr)
        return 2
    return 0


def _work(folder: Path, base_name: str) -> None:
    from tqdm import tqdm

    base = open_weights("--base", base_name)
    records = with_checkpoints(folder)

    def weights(key: str) -> Weights:
        return open_weights(key, str(folder / "runs" / key), base)

    made = 0
    for key in tqdm(records, desc="changes", disable=None, leave=False):
        where = folder / "changes" / f"{key}.json"
        made += kept(where, [records[key]], lambda key=key: changes(base, weights(key)))  # type: ignore[misc]
    for first, second in tqdm(list(pairs(records)), desc="overlaps", disable=None, leave=False):
        where, runs = folder / "overlaps" / f"{first}+{second}.json", [records[first], records[second]]
        made += kept(where, runs, lambda a=first, b=second: overlap(base, weights(a), weights(b)))  # type: ignore[misc]
    print(f"{len(records)} runs, {len(list(pairs(records)))} pairs; {made} records made in {folder}")
    for title, make in (("what the runs changed", change_rows), ("which changed the same", overlap_rows)):
        heading, *rows = make(folder)
        print_table(f"{title}; mean (lowest to highest)", heading, rows)
