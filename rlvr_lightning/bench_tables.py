"""The benchmarks' block of a README, from the records `results/bench_*.json`.

<!-- bench -->
<!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlvr_lightning.tables import gib, markdown

BLOCK = re.compile(r"(<!-- bench -->\n).*?(<!-- end -->)", re.DOTALL)
HEADING = ["measured", "here", "peer", "ratio", "command"]


def shown(record: dict[str, Any]) -> str:
    """The command that measures it again, without what all of them begin with."""
    return f"`{record['command'].removeprefix('python -m rlvr_lightning.')}`"


def rollout_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    """Of a record of `profiling/bench_rollout.py`."""
    speed = record["median_tokens_per_s"]
    what = f"tokens/s, engine against `model.generate`, {record['model']}"
    yield [what, f"{speed['engine']:,.0f}", f"{speed['generate']:,.0f}", f"{record['ratio']:.2f}", shown(record)]


def trl_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    """Of a record of `profiling/bench_trl.py`."""
    ours, trl, ratio = record["median"]["ours"], record["median"]["trl"], record["ratio"]
    parts = {"step_s": "a step", "generate_s": "of it generating", "train_s": "of it forward and backward"}
    for key, label in parts.items():
        if key in ours and key in trl:
            what = f"seconds, {label}, against TRL, {record['model']}"
            yield [what, f"{ours[key]:.2f}", f"{trl[key]:.2f}", f"{ours[key] / trl[key]:.2f}", shown(record)]
    peaks = [gib(side["peak_bytes"]) for side in (ours, trl)]
    what = f"GiB, peak of the process, against TRL, {record['model']}"
    yield [what, *peaks, f"{ratio['peak_bytes']:.2f}", shown(record)]


def bench_table(results: Path) -> str:
    """All benchmark records as one Markdown table."""
    rows = [HEADING]
    for pattern, make in (("bench_rollout_*.json", rollout_rows), ("bench_trl_*.json", trl_rows)):
        for path in sorted(results.glob(pattern)):
            rows += make(json.loads(path.read_text()))
    return markdown(rows)


def fill_bench(text: str, results: Path) -> str:
    """A Markdown text with its benchmark block, if there is one, rendered from the records.

    Raises:
        ValueError: there is a block and no record.
    """
    if not BLOCK.search(text):
        return text
    if not list(results.glob("bench_*.json")):
        raise ValueError(f"the bench block: no records in {results}; run rlvr_lightning.profiling.bench_rollout")
    table = bench_table(results)
    return BLOCK.sub(lambda block: f"{block[1]}{table}\n{block[2]}", text)
