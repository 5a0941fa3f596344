"""`spectrum BASE TUNED`: how far the spectrum of each matrix moved, and whether its important entries changed.

`shift`: norm of the difference of the singular values over the norm of the old ones. `angle`: the largest principal
angle, in degrees, between the leading k left (right) singular subspaces before and after; k is a tenth of the shorter
side. `principal`: the share of the changed entries (bf16 view) that are among the largest of the base's rank-k
reconstruction; `low`: that are among the base's smallest. What chance would give stands beside them: the share of
entries that count as such, 30 %. Small weights have small units in the last place, so that the same update changes more
of them: `low` above chance is also what rounding does. After "The Path Not Taken" (arXiv 2511.08567).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from rlvr_lightning.analysis.command import about, hand_over, parser, percent, print_about, print_table, run
from rlvr_lightning.analysis.groups import by_group, cells, matrices
from rlvr_lightning.analysis.matching import Matched, match
from rlvr_lightning.analysis.opening import open_weights
from rlvr_lightning.analysis.spectrum import Shift, analyse_matrix
from rlvr_lightning.callbacks.change_counts import layer_of, matrix_of

SHARE = 0.3


def analyse(
    found: Matched, k: int | None, progress: Callable[[int], object] = lambda entries: None
) -> dict[str, Shift]:
    """Of each matrix; vectors (norms, biases) have no spectrum."""
    result = {}
    for name, spec in found.tensors.items():
        if len(spec.shape) > 1:
            old, new = found.whole(name)
            if not (old.isfinite().all() and new.isfinite().all()):
                raise ValueError(f"{name!r} has entries that are infinite or NaN; `sparsity` counts them")
            after = matrices(name, new)
            for part, before in matrices(name, old).items():
                result[part] = analyse_matrix(before, after[part], k, SHARE)
        progress(spec.entries)
    return result


def summarise(some: Sequence[Shift]) -> dict[str, Any]:
    """Of a group: means of shifts and angles over its matrices, exact counts of entries and their shares.

    `principal_frac` and `low_frac` are None if no entry changed; `chance_frac` is of the entries.
    """
    counts = {name: sum(getattr(one, name) for one in some) for name in Shift._fields[4:]}
    changed = counts["changed"]
    means = {name: mean(getattr(one, name) for one in some) for name in ("shift", "left_degrees", "right_degrees")}
    shares = {f"{name}_frac": counts[name] / changed if changed else None for name in ("principal", "low")}
    # by the matrices in which the changes lie: whatever their sizes, a random entry of each is chosen so often
    chance = sum(one.changed * one.chosen / one.entries for one in some) / changed if changed else None
    return {"matrices": len(some), **means, **counts, **shares, "chance_frac": chance}


def show(record: dict[str, Any]) -> None:
    """The tables."""
    print_about(record)
    sizes = record["k"]
    print(f"k: {sizes[0] if sizes[0] == sizes[-1] else f'{sizes[0]} to {sizes[-1]}'} leading singular directions")
    heading = ["matrices", "shift", "angle left", "right", "changed %", "principal %", "low %", "chance %"]
    for title in ("all", "by matrix", "by layer"):
        rows = []
        for group, row in record["groups"][title].items():
            changed = percent(row["changed"] / row["entries"])
            angles = [f"{row[side]:.3g}" for side in ("left_degrees", "right_degrees")]
            shares = [percent(row[f"{name}_frac"]) for name in ("principal", "low", "chance")]
            rows.append([group, str(row["matrices"]), f"{row['shift']:.3g}", *angles, changed, *shares])
        print_table(f"{title}: mean shift, mean of the largest angles; of the changed entries", ["", *heading], rows)


def main(argv: list[str]) -> int:
    """Analyse; returns the exit status."""
    made = parser("spectrum", __doc__, [("BASE", "what training started from"), ("TUNED", "what it led to")])
    made.add_argument("--k", type=int, help="leading singular directions of each matrix; a tenth of its shorter side")
    return run("spectrum", _work, made.parse_args(argv))


def _work(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    if options.k is not None and options.k < 1:
        raise ValueError(f"--k must be at least 1, got {options.k}")
    base = open_weights("BASE", options.base)
    compared = match(base, open_weights("TUNED", options.tuned, base))
    total = compared.entries
    with tqdm(total=total, unit=" entries", unit_scale=True, desc="spectrum", disable=None, leave=False) as bar:
        found = analyse(compared, options.k, bar.update)
    if not any(one.shift or one.changed for one in found.values()):
        raise ValueError(f"no matrix of {options.tuned} differs from {options.base}: no spectrum moved")
    groups = {
        "all": {"all": list(found)},
        "by matrix": by_group(found, matrix_of),
        "by layer": by_group(found, layer_of),
    }
    record = about(compared) | {"k": sorted({one.k for one in found.values()}), "share": SHARE}
    record["groups"] = {
        title: {group: summarise([found[name] for name in names]) for group, names in parts.items()}
        for title, parts in groups.items()
    }
    record["by_tensor"] = {name: one._asdict() for name, one in found.items()}
    hand_over(record, options, lambda: show(record), lambda: draw(found, options))


def draw(found: dict[str, Shift], options: argparse.Namespace) -> None:
    """Shift and share of principal entries by layer and matrix."""
    from rlvr_lightning.analysis.picture import canvas, heat

    places = {place: summarise(some) for place, some in cells(found).items()}
    with canvas(options.plot, 3, f"{options.base} -> {options.tuned}") as (left, middle, right):
        heat(left, {place: row["shift"] for place, row in places.items()}, "normalised spectral shift")
        for panel, name in ((middle, "principal"), (right, "low")):
            shares = {place: 100 * row[f"{name}_frac"] for place, row in places.items() if row["changed"]}
            heat(panel, shares, f"% of the changed entries that are {name} ones; {100 * SHARE:.0f} by chance")
