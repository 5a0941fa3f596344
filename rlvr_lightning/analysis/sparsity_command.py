"""`sparsity BASE TUNED`: how many weights training changed, under every definition at once.

Changed is an entry of which, in the columns: `bf16`, the bits of the bf16 view differ; `tol1e-5`, the bf16 values are
further apart than 1e-5; `rel1e-3`, the stored values are further apart than 1e-3 of the larger; `fp32`, the stored bits
differ at all. `absorbed` is the share of the last that bf16 hides. The papers' sparsity is what is left of 100 % in
`tol1e-5`. Shares are of entries: a large tensor counts for more than a small one. Both models are read in pieces of
2**20 entries: memory does not grow with them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import reduce
from typing import Any

from rlvr_lightning.analysis.command import about, hand_over, parser, percent, print_about, print_table, run
from rlvr_lightning.analysis.groups import cells, groupings
from rlvr_lightning.analysis.matching import Matched, match
from rlvr_lightning.analysis.opening import open_weights
from rlvr_lightning.analysis.sparsity import BINS, Tally, as_counts, tally
from rlvr_lightning.callbacks.change_counts import DEFINITIONS

TITLES = {
    "parts": "% of entries changed; absorbed: % of those that changed",
    "kinds": "by matrix",
    "layers": "by layer",
}


def compare(found: Matched, progress: Callable[[int], object] = lambda entries: None) -> dict[str, Tally]:
    """Counts of each tensor of two models."""
    tallies = {}
    for name in found.tensors:
        tallies[name] = Tally()
        for old, new in found.pieces(name):
            tallies[name] += tally(old, new)
            progress(len(old))
    return tallies


def summarise(tallies: dict[str, Tally]) -> dict[str, Any]:
    """Counts of all tensors, of those with and without norms, by kind of matrix, by layer, and of each."""
    groups = {
        grouping: {
            group: as_counts(reduce(Tally.__add__, (tallies[n] for n in names))) for group, names in found.items()
        }
        for grouping, found in groupings(tallies).items()
    }
    return groups | {"by_tensor": {name: as_counts(one) for name, one in tallies.items()}}


def show(record: dict[str, Any]) -> None:
    """The tables."""
    print_about(record)
    if len(set(record["dtypes"])) > 1:
        print("bf16 and tol1e-5 compare the bf16 views, whatever the dtypes")
    heading = ["entries", *DEFINITIONS, "absorbed", "sign flips"]
    for grouping, title in TITLES.items():
        rows = [
            [
                group,
                f"{row['entries']:,}",
                *(percent(row["changed_frac"][name]) for name in DEFINITIONS),
                percent(row["absorbed_frac"]),
                f"{row['sign_flips']:,}",
            ]
            for group, row in record[grouping].items()
        ]
        print_table(title, ["", *heading], rows)
    everything = record["parts"]["all"]
    if not everything["changed"]["fp32"]:
        print("nothing differs: the two are the same model, bit for bit")
        return
    zeros = f"{everything['changed_zeros']['fp32']:,} of the {everything['zeros']:,} that were exactly 0"
    print(f"changed: {everything['changed']['fp32']:,} entries, among them {zeros}")
    histogram = everything["ulp_histogram"]
    rows = [[name, f"{count:,}", "#" * -(-40 * count // max(histogram.values()))] for name, count in histogram.items()]
    print_table("|change| in units of the last place of the base's bf16", ["from", "entries", ""], rows, left=(0, 2))


def main(argv: list[str]) -> int:
    """Compare; returns the exit status."""
    made = parser("sparsity", __doc__, [("BASE", "what training started from"), ("TUNED", "what it led to")])
    return run("sparsity", _work, made.parse_args(argv))


def _work(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    base = open_weights("BASE", options.base)
    found = match(base, open_weights("TUNED", options.tuned, base))
    with tqdm(total=found.entries, unit=" entries", unit_scale=True, desc="sparsity", disable=None, leave=False) as bar:
        tallies = compare(found, bar.update)
    record = about(found) | summarise(tallies)
    hand_over(record, options, lambda: show(record), lambda: draw(record, tallies, options))


def draw(record: dict[str, Any], tallies: dict[str, Tally], options: argparse.Namespace) -> None:
    """Share changed by layer and matrix, and the histogram."""
    from rlvr_lightning.analysis.picture import bars, canvas, heat

    counts = {place: as_counts(reduce(Tally.__add__, some)) for place, some in cells(tallies).items()}
    with canvas(options.plot, 2, f"{options.base} -> {options.tuned}") as (left, right):
        shares = {place: 100 * one["changed_frac"]["bf16"] for place, one in counts.items()}
        heat(left, shares, "% of entries changed in the bf16 view")
        histogram = record["parts"]["all"]["ulp_histogram"]
        bars(
            right,
            {name: histogram.get(name, 0) for name in BINS},
            "|change| in bf16 units of the last place, from",
            "entries",
        )
