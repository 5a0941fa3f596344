"""`rank BASE TUNED`: of what rank the change of each matrix is.

`rank`: singular values above max(m, n) * eps(float32) * the largest, the default of torch.linalg.matrix_rank.
`effective`: the fewest singular values that hold 99 % of the sum of their squares. `stable`: that sum over the largest
square. Matrices whose shorter side has up to 1024 entries are decomposed exactly. Larger ones are sketched at random
(Halko, Martinsson and Tropp 2011), and what the sketch leaves bounds the error: numbers come as low..high, which holds
for certain but for rounding; where 5 % cannot be had from a sketch of a sixteenth, the exact decomposition is made.
Rounding to bf16 is a change of full rank: `rank` says little, the other two more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import torch

from rlvr_lightning.analysis.command import about, hand_over, parser, print_about, print_table, run
from rlvr_lightning.analysis.groups import by_group, cells, matrices
from rlvr_lightning.analysis.matching import Matched, match
from rlvr_lightning.analysis.opening import open_weights
from rlvr_lightning.analysis.rank import Bounds, Ranks, ranks
from rlvr_lightning.callbacks.change_counts import layer_of, matrix_of

SEED = 0
MEASURES = ("matrix", "effective", "stable")


def analyse(found: Matched, progress: Callable[[int], object] = lambda entries: None) -> dict[str, Ranks]:
    """Ranks of the change of each matrix that changed; of vectors (norms, biases) there are none."""
    generator = torch.Generator().manual_seed(SEED)
    result = {}
    for name, spec in found.tensors.items():
        if len(spec.shape) > 1:
            for part, matrix in matrices(name, found.difference(name)).items():
                if matrix.any():
                    result[part] = ranks(matrix, generator)
        progress(spec.entries)
    return result


def as_record(one: Ranks) -> dict[str, Any]:
    """For JSON: bounds as [low, high]."""
    return {"full": one.full, **{name: list(getattr(one, name)) for name in MEASURES}, "sketch": one.sketch}


def average(some: Sequence[Ranks], measure: str) -> Bounds:
    """Bounds of the mean over matrices."""
    found = [getattr(one, measure) for one in some]
    return Bounds(mean(one.low for one in found), mean(one.high for one in found))


def shown(bounds: Bounds, digits: int = 1) -> str:
    """One number if it is known exactly.

    >>> shown(Bounds(2, 2)), shown(Bounds(1.26, 3.0))
    ('2.0', '1.3..3.0')
    """
    low, high = (f"{bound:.{digits}f}" for bound in bounds)
    return low if low == high else f"{low}..{high}"


def show(record: dict[str, Any], found: dict[str, Ranks]) -> None:
    """The tables: means over the matrices of a group."""
    print_about(record)
    print(f"{len(found)} matrices changed, {record['unchanged_tensors']} tensors did not; vectors have no rank")
    heading = ["matrices", "sketched", "full", "rank", "% of full", "effective", "% of full", "stable"]
    groups = {
        "all": {"all": list(found)},
        "by matrix": by_group(found, matrix_of),
        "by layer": by_group(found, layer_of),
    }
    for title, parts in groups.items():
        rows = []
        for group, names in parts.items():
            some = [found[name] for name in names]
            full = mean(one.full for one in some)
            means = {measure: average(some, measure) for measure in MEASURES}
            of_full = {m: shown(Bounds(*(100 * bound / full for bound in means[m]))) for m in MEASURES}
            sketched = str(sum(one.sketch > 0 for one in some))
            row = [group, str(len(some)), sketched, f"{full:.0f}", shown(means["matrix"]), of_full["matrix"]]
            rows.append([*row, shown(means["effective"]), of_full["effective"], shown(means["stable"])])
        print_table(f"mean rank of the change, {title}", ["", *heading], rows)


def main(argv: list[str]) -> int:
    """Analyse; returns the exit status."""
    made = parser("rank", __doc__, [("BASE", "what training started from"), ("TUNED", "what it led to")])
    return run("rank", _work, made.parse_args(argv))


def _work(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    base = open_weights("BASE", options.base)
    compared = match(base, open_weights("TUNED", options.tuned, base))
    with tqdm(total=compared.entries, unit=" entries", unit_scale=True, desc="rank", disable=None, leave=False) as bar:
        found = analyse(compared, bar.update)
    if not found:
        raise ValueError(f"no matrix of {options.tuned} differs from {options.base}: the change has no rank")
    changed = {name.partition("[")[0] for name in found}
    unchanged = sum(len(spec.shape) > 1 and name not in changed for name, spec in compared.tensors.items())
    record = about(compared) | {"unchanged_tensors": unchanged, "seed": SEED}
    record["by_tensor"] = {name: as_record(one) for name, one in found.items()}
    hand_over(record, options, lambda: show(record, found), lambda: draw(found, options))


def draw(found: dict[str, Ranks], options: argparse.Namespace) -> None:
    """Effective and stable rank by layer and matrix, upper bounds where they are sketched."""
    from rlvr_lightning.analysis.picture import canvas, heat

    with canvas(options.plot, 2, f"{options.base} -> {options.tuned}") as panels:
        for panel, measure in zip(panels, MEASURES[1:], strict=True):
            values = {place: average(some, measure).high for place, some in cells(found).items()}
            heat(panel, values, f"{measure} rank of the change")
