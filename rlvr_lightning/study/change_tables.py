"""Tables of what the runs of a sweep did to the weights, from the records that `dissect` keeps.

<!-- changes:NAME -->     shares changed, ranks, spectra: of each cell of the sweep in results/NAME
<!-- overlaps:NAME -->    which runs changed the same entries
<!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rlvr_lightning.study.records import Cell, cells
from rlvr_lightning.study.tables import markdown

BLOCK = re.compile(r"(<!-- (?P<what>changes|overlaps):(?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Record = dict[str, Any]


def share(values: Iterable[float | None], ranges: bool = True) -> str:
    """Mean and range in per cent; what is none is left out.

    >>> share([0.25, 0.5, None]), share([0.00012]), share([None]), share([0.25, 0.5], ranges=False)
    ('37.5 (25.0 to 50.0)', '0.012', '-', '37.5')
    """
    found = [100 * value for value in values if value is not None]
    if not found:
        return "-"
    text = [f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}" for value in (mean(found), min(found), max(found))]
    return text[0] if not ranges or text[1] == text[2] else f"{text[0]} ({text[1]} to {text[2]})"


def load(folder: Path, what: str) -> list[Record]:
    """Records of `dissect`, in the order of their names."""
    path = folder / f"{what}.json"
    return list(json.loads(path.read_text()).values()) if path.is_file() else []


CHANGES: dict[str, Callable[[Record], float | None]] = {
    "changed %, bf16": lambda one: one["parts"]["all"]["changed_frac"]["bf16"],
    "tol1e-5": lambda one: one["parts"]["all"]["changed_frac"]["tol1e-5"],
    "fp32": lambda one: one["parts"]["all"]["changed_frac"]["fp32"],
    "norms, bf16": lambda one: one["parts"].get("norms", {}).get("changed_frac", {}).get("bf16"),
    "rank %, at least": lambda one: one["matrix_rank_frac"][0] if "spectrum" in one else None,
    "effective rank %, at most": lambda one: one["effective_rank_frac"][1] if "spectrum" in one else None,
    "spectral shift %": lambda one: one["spectrum"]["shift"] if "spectrum" in one else None,
    "among the smallest 30 %": lambda one: one["spectrum"]["low_frac"] if "spectrum" in one else None,
    "among the principal 30 %": lambda one: one["spectrum"]["principal_frac"] if "spectrum" in one else None,
}
OVERLAPS: dict[str, Callable[[Record], float | None]] = {
    "A changed %": lambda one: one["density_a"],
    "B changed %": lambda one: one["density_b"],
    "A in B %": lambda one: one["a_in_b"],
    "by chance": lambda one: one["a_in_b_by_chance"][1],
    "by chance, equal exponents": lambda one: one["a_in_b_equal"],
    "jaccard %": lambda one: one["jaccard"],
    "jaccard by chance": lambda one: one["jaccard_by_chance"][1],
    "jaccard by chance, equal exponents": lambda one: one["jaccard_equal"],
}


def change_rows(folder: Path, ranges: bool = True) -> list[list[str]]:
    """A heading, then a row for each cell of the sweep: means, and ranges if wanted, over seeds."""
    grouped = cells([one | one["runs"][0] for one in load(folder, "changes")])
    body = [
        [cell.name, str(len(cell.records)), *(share(map(of, cell.records), ranges) for of in CHANGES.values())]
        for cell in grouped
    ]
    return [["run", "seeds", *CHANGES], *body]


def overlap_rows(folder: Path) -> list[list[str]]:
    """A heading, then a row for each two cells: means over pairs of runs."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for one in load(folder, "overlaps"):
        first, second = (Cell(run["label"], run["point"], []).name for run in one["runs"])
        same = "same" if one["runs"][0]["seed"] == one["runs"][1]["seed"] else "other"
        groups.setdefault((first, second, same), []).append(one["parts"]["all"])
    body = [
        [*key, str(len(group)), *(share(map(of, group), ranges=False) for of in OVERLAPS.values())]
        for key, group in groups.items()
    ]
    return [["A", "B", "seed", "pairs", *OVERLAPS], *body]


def fill_changes(text: str, results: Path) -> str:
    """A Markdown text with each marked block replaced by its table.

    Raises:
        ValueError: a block names a sweep that was not dissected.
    """

    def filled(block: re.Match[str]) -> str:
        make = change_rows if block["what"] == "changes" else overlap_rows
        table: Sequence[Sequence[str]] = make(results / block["name"])
        if len(table) == 1:
            raise ValueError(
                f"{block['what']}:{block['name']}: no records; python -m rlvr_lightning dissect makes them"
            )
        return f"{block[1]}{markdown(table)}\n{block[4]}"

    return BLOCK.sub(filled, text)
