"""What `WhySparse` last measured, and the curvature at the start, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlvr_lightning.profiling.table import Table
from rlvr_lightning.report.reading import Run, notes

WHY = (
    "Updates of a random sample of entries, beside half a unit in the last place of each weight as bf16: what is below "
    "it vanishes when the weight is rounded to nearest. Momentum: the average of earlier gradients (beta 0.9). "
    "sqrt(v): the root of the average of their squares (beta 0.999), kept beside the run whatever the optimizer, and "
    "its own where it has one. The norm is of the whole gradient, as the step uses it."
)
COLUMNS = ("entries", "absorbed", "median of half units", "momentum cosine", "std of sqrt(v)", "its own", "grad norm")


def value(record: Any, *keys: str) -> float | None:
    """A number inside of a record; None if it is not there.

    >>> value({"sqrt_v": {"std": 0.5}}, "sqrt_v", "std"), value({"sqrt_v": None}, "sqrt_v", "std")
    (0.5, None)
    """
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record if isinstance(record, int | float) else None


def why_tables(runs: Sequence[Run]) -> list[Table]:
    """Those of which there is something."""
    curved = [run for run in runs if run.curvature]
    return [*([_measured(runs)] if any(run.why for run in runs) else []), *([_curvature(curved)] if curved else [])]


def _curvature(runs: Sequence[Run]) -> Table:
    rows = [
        [run.name, number, f"{one['value']:.4g}", f"{one['residual']:.1g}"]
        for run in runs
        for number, one in enumerate(run.curvature, start=1)
    ]
    return Table("Largest eigenvalues of the Hessian at the start", ["run", "", "eigenvalue", "within"], rows)


def _measured(runs: Sequence[Run]) -> Table:
    """At the last measurement, overall and by kind of matrix."""
    rows: list[list[Any]] = []
    said = []
    for run in runs:
        if not run.why:
            said.append((run.name, "no why_sparse.jsonl: the callback WhySparse was not on"))
            continue
        line = run.why[-1]
        for kind, part in {"all": line["all"], **line["kinds"]}.items():
            rows.append([run.name, line["step"], kind, value(part, "update", "entries"), *_figures(part)])
        said.append((run.name, f"{_whole(line, 'sample_bytes')} bytes kept beside the run for the sample"))
        if line.get("skipped"):
            said.append((run.name, f"{_whole(line, 'skipped')} steps without a finite gradient left out"))
        if unknown := value(line, "all", "update", "unknown_update"):
            said.append(
                (run.name, f"{unknown:,.0f} entries left out of updates: what the optimizer wanted is not known")
            )
    return Table("When last measured", ["run", "optimizer step", "kind", *COLUMNS], rows, notes(said))


def _whole(line: dict[str, Any], key: str) -> str:
    found = value(line, key)
    return "-" if found is None else f"{found:,.0f}"


def _figures(part: dict[str, Any]) -> list[str | None]:
    absorbed = value(part, "update", "absorbed_frac")
    others = [
        value(part, "update", "over_half_unit", "0.5"),
        value(part, "momentum_cosine"),
        value(part, "sqrt_v", "std"),
        value(part, "sqrt_v_own", "std"),
        value(part, "grad_norm"),
    ]
    shares = None if absorbed is None else f"{100 * absorbed:.3g} %"
    return [shares, *(None if number is None else f"{number:.3g}" for number in others)]
