"""`overlap A B --base BASE`: whether two runs changed the same weights.

Changed are entries whose bf16 view differs from BASE's. `A in B` is the share of A's that B changed too, `B in A` the
other way round, `jaccard` the share of both in either. By chance A in B would be B's density; tensors that both change
much raise it, so beside each stands what chance gives with the counts of every tensor as they are: mean and 95 %
interval of the permutations of one mask within each tensor, computed exactly (hypergeometric laws, convolved), not
sampled. bf16 alone makes masks alike: any update changes the bits of small weights more easily. `equal` is what chance
gives among weights of equal exponent; only what is above that is more than rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from rlvr_lightning.analysis.command import about, hand_over, parser, percent, print_about, print_table, run
from rlvr_lightning.analysis.groups import groupings
from rlvr_lightning.analysis.matching import Matched, match
from rlvr_lightning.analysis.opening import open_weights
from rlvr_lightning.analysis.overlap import Counts, Tally, summarise

MEASURES = {"A in B": "a_in_b", "B in A": "b_in_a", "jaccard": "jaccard"}
COLUMNS = [title for measure in MEASURES for title in (f"{measure} %", "by chance", "equal")]
TITLES = {
    "parts": "overlap; by chance, in brackets 95 %; by chance among weights of equal exponent",
    "kinds": "by matrix",
    "layers": "by layer",
}


def count(found: Matched, progress: Callable[[int], object] = lambda entries: None) -> dict[str, Counts]:
    """Changed entries of each tensor of (base, A, B)."""
    result = {}
    for name in found.tensors:
        tally = Tally()
        for pieces in found.pieces(name):
            tally.add(*(piece.bfloat16().view(torch.int16).numpy() for piece in pieces))
            progress(len(pieces[0]))
        result[name] = tally.total()
    return result


def show(record: dict[str, Any]) -> None:
    """The tables."""
    print_about(record)
    heading = ["entries", "A %", "B %", "both", *COLUMNS]
    for grouping, title in TITLES.items():
        rows = []
        for group, row in record[grouping].items():
            cells = [f"{row['entries']:,}", percent(row["density_a"]), percent(row["density_b"]), f"{row['both']:,}"]
            for measure in MEASURES.values():
                low, expected, high = map(percent, row[f"{measure}_by_chance"])
                cells += [percent(row[measure]), f"{expected} [{low}, {high}]", percent(row[f"{measure}_equal"])]
            rows.append([group, *cells])
        print_table(title, ["", *heading], rows)


def main(argv: list[str]) -> int:
    """Compare; returns the exit status."""
    made = parser("overlap", __doc__, [("A", "what one run led to"), ("B", "what another led to")])
    made.add_argument("--base", required=True, metavar="BASE", help="what both started from")
    return run("overlap", _work, made.parse_args(argv))


def _work(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    base = open_weights("--base", options.base)
    found = match(base, open_weights("A", options.a, base), open_weights("B", options.b, base))
    with tqdm(total=found.entries, unit=" entries", unit_scale=True, desc="overlap", disable=None, leave=False) as bar:
        counts = count(found, bar.update)
    for role, name, changed in (
        ("A", options.a, sum(one.first for one in counts.values())),
        ("B", options.b, sum(one.second for one in counts.values())),
    ):
        if not changed:
            raise ValueError(f"{role}: {name} changes no entry of {options.base} in the bf16 view: nothing can overlap")
    record = about(found)
    for grouping, groups in groupings(counts).items():
        record[grouping] = {group: summarise([counts[name] for name in names]) for group, names in groups.items()}
    record["by_tensor"] = {name: one._asdict() for name, one in counts.items()}
    hand_over(record, options, lambda: show(record), lambda: draw(record, options))


def draw(record: dict[str, Any], options: argparse.Namespace) -> None:
    """Overlaps by layer, with the bands that chance gives."""
    from rlvr_lightning.analysis.picture import band, canvas

    layers = list(record["layers"].values())
    names = ["outside" if layer == "none" else layer for layer in record["layers"]]
    with canvas(options.plot, 2, f"A: {options.a}   B: {options.b}   base: {options.base}") as panels:
        for panel, (title, measure) in zip(panels, list(MEASURES.items())[:2], strict=True):
            shares = [[row[measure], row[f"{measure}_equal"], *row[f"{measure}_by_chance"]] for row in layers]
            band(panel, names, shares, title)
