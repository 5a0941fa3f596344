"""What a report says, whatever it is written as: sections of tables and samples. Charts are the page's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from rlvr_lightning.profiling.table import Table
from rlvr_lightning.report.memory import memory_table, peak_bytes, phase_table
from rlvr_lightning.report.reading import Run, fraction, merged, notes
from rlvr_lightning.report.settings import differences
from rlvr_lightning.report.text import harmless
from rlvr_lightning.report.why_table import WHY, why_tables
from rlvr_lightning.study.tables import gib, number

SHOWN = 4
"""Completions of a step."""


@dataclass(frozen=True)
class Sample:
    """One completion, as read from a file: nothing in it is to be trusted."""

    step: int
    prompt: str
    completion: str
    scores: str


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """By the name of the run."""
    listings: dict[str, str] = field(default_factory=dict)
    """Long text by title, which a page folds."""


def document(runs: Sequence[Run]) -> list[Section]:
    """All sections, in the order of reading."""
    return [
        Section("Summary", tables=[summary(runs)]),
        Section("Training", "Every curve is over batches of rollouts; 0 is before the first step.", [training(runs)]),
        Section("Memory", tables=[t for t in (memory_table(runs), phase_table(runs)) if t]),
        Section("Update sparsity", DEFINITIONS, sparsity_tables(runs)),
        *([Section("Why sparse", WHY, why_tables(runs))] if any(run.why or run.curvature for run in runs) else []),
        Section("Completions", _kept(runs), samples={run.name: samples(run) for run in runs if run.completions}),
        settings(runs),
        Section("Where the numbers come from", tables=origins(runs)),
    ]


DEFINITIONS = (
    "Share of the weights that one optimizer step changed, and that differ from the start of the run. bf16: the bits "
    "of the values rounded to bf16 differ; tol1e-5: and those are further apart than 1e-5; rel1e-3: the stored values "
    "are further apart than 1e-3 of the larger; fp32: the stored bits differ at all."
)


def validation(runs: Sequence[Run]) -> list[str]:
    """Names of what was validated, in any run."""
    return list(
        dict.fromkeys(name for run in runs for name in sorted(run.curves) if name.startswith(("val/", "test/")))
    )


def _ends(run: Run, metric: str) -> list[str]:
    """First and last value."""
    curve = run.curves.get(metric, [])
    return [number(curve[0][1]), number(curve[-1][1])] if curve else ["-", "-"]


def _from_to(run: Run, metric: str) -> str | None:
    return " to ".join(_ends(run, metric)[: len(run.curves.get(metric, []))]) or None


def summary(runs: Sequence[Run]) -> Table:
    """One row a run."""
    shown = [name for name in ("reward/mean", *validation(runs)) if any(name in run.curves for run in runs)]
    columns = ["run", "batches", *shown, "peak GiB", "optimizer state bytes", "changed, bf16", "training s"]
    rows: list[list[Any]] = []
    for run in runs:
        peak, state = peak_bytes(run), run.last("memory/optimizer_state_bytes")
        steps = [curve[-1][0] for curve in run.curves.values() if curve]
        seconds = sum(value for _, value in run.curves.get("time/step_s", []) if math.isfinite(value))
        rows.append(
            [
                run.name,
                max(steps, default=None),
                *(_from_to(run, name) for name in shown),
                None if peak is None else gib(peak),
                None if state is None else int(state),
                share(run.sparsity[-1].get("total") if run.sparsity else None, "bf16"),
                f"{seconds:,.0f}" if seconds else None,
            ]
        )
    note = "Metrics: first value to last. Changed: of all weights, since the start, when last measured."
    return Table("", columns, rows, [note])


def training(runs: Sequence[Run]) -> Table:
    """The first, last and lowest and highest value of what the charts show."""
    rows: list[list[Any]] = []
    for name in charted(runs):
        for run in runs:
            values = [value for _, value in run.curves.get(name, []) if math.isfinite(value)]
            low, high = (number(min(values)), number(max(values))) if values else ("-", "-")
            rows.append([name, run.name, len(values), *_ends(run, name), low, high])
    absent = [name for name in WANTED if name not in charted(runs)]
    said = [f"not recorded in any run: {', '.join(absent)}"] if absent else []
    others = sorted({name for run in runs for name in run.curves} - set(charted(runs)))
    hidden = [name for name in others if not name.startswith(ELSEWHERE)]
    said += [f"recorded in metrics.csv, not shown: {', '.join(hidden)}"] if hidden else []
    return Table("", ["metric", "run", "values", "first", "last", "lowest", "highest"], rows, said)


ELSEWHERE = (
    *("memory/", "update/changed", "update/measure"),
    *("update/watch", "update/absorbed_frac", "update/momentum_", "update/sqrt_v"),
)
"""Metrics that other sections show."""
WANTED = (
    "reward/mean",
    "policy/kl",
    "policy/entropy",
    "response/length_mean",
    "response/truncated_frac",
    "reward/no_signal_frac",
    "update/grad_norm",
    "train/loss",
)


def charted(runs: Sequence[Run]) -> list[str]:
    """The metrics that have a chart: those that are wanted and validation, if any run has them."""
    names = (WANTED[0], *validation(runs), *WANTED[1:])
    return [name for name in names if any(name in run.curves for run in runs)]


def share(record: Any, definition: str) -> str | None:
    """Changed entries over all entries, in %; None if it was not measured."""
    found = fraction(record, definition)
    return None if found is None else f"{100 * found:.3g} %"


def definitions(runs: Sequence[Run]) -> list[str]:
    """The definitions of "changed" that any run was measured by."""
    return list(dict.fromkeys(name for run in runs for line in run.sparsity for name in line["last_step"]["changed"]))


def sparsity_tables(runs: Sequence[Run]) -> list[Table]:
    """At the last measurement, of the whole model and by kind of matrix."""
    names = definitions(runs)
    rows: list[list[Any]] = []
    for run in runs:
        for when in ("last_step", "total") if run.sparsity else ():
            line = run.sparsity[-1]
            record = line.get(when) or {}
            what = "changed by the step" if when == "last_step" else "differ from the start"
            for kind, part in {"all": record, **record["kinds"]}.items() if record else ():
                shares = (share(part, name) for name in names)
                rows.append([run.name, line["step"], what, kind, part.get("entries"), *shares])
    said = [(run.name, "no sparsity.jsonl, or nothing in it") for run in runs if not run.sparsity]
    for run in runs:
        starts = sorted({each["since_step"] for each in run.sparsity if each.get("since_step")})
        if starts:
            text = f"resumed after step {', '.join(map(str, starts))}; the start counts from there anew"
            said.append((run.name, text))
    columns = ["run", "optimizer step", "", "kind", "weights", *names]
    return [Table("Changed weights when last measured", columns, rows, notes(said))]


def _kept(runs: Sequence[Run]) -> str:
    none = [run.name for run in runs if not run.completions]
    said = f"Up to {SHOWN} of the first step kept and of the last, spread over the batch; control characters escaped."
    return said + (f" None kept: {', '.join(none)}." if none else "")


def samples(run: Run) -> list[Sample]:
    """Some completions of each step, spread over its batch to show more than one prompt's group."""
    found = []
    for step in dict.fromkeys(line["step"] for line in run.completions):
        lines = [line for line in run.completions if line["step"] == step]
        found += [_sample(line) for line in lines[:: max(1, len(lines) // SHOWN)][:SHOWN]]
    return found


def _sample(line: dict[str, Any]) -> Sample:
    parts = line.get("parts") if isinstance(line.get("parts"), dict) else {}
    scores = {"reward": line.get("reward"), **(parts or {}), "advantage": line.get("advantage")}
    said = [
        f"{name} {value:.3g}" if isinstance(value, int | float) else f"{name} {value}"
        for name, value in scores.items()
        if value is not None
    ]
    said += ["cut at the limit"] if line.get("truncated") else []
    prompt, completion = (harmless(str(line.get(key, ""))) for key in ("prompt", "completion"))
    return Sample(line["step"], prompt, completion, harmless(", ".join(said), 200))


def settings(runs: Sequence[Run]) -> Section:
    """How the configs differ; of one run, its config."""
    if len(runs) > 1:
        return Section("Settings", tables=[differences(runs)])
    text = yaml.safe_dump(runs[0].config, sort_keys=False, allow_unicode=True) if runs[0].config else ""
    return Section(
        "Settings", "" if text else "No config.", listings={"config.yaml": harmless(text, 10**6)} if text else {}
    )


def origins(runs: Sequence[Run]) -> list[Table]:
    """The folder of each run, how it is run again, and what is not there."""
    names = list(dict.fromkeys(name for run in runs for name in run.origin))
    rows = [[run.name, str(run.folder), *(run.origin.get(name) for name in names)] for run in runs]
    left_out = list(merged((run.name, text) for run in runs for text in run.missing).items())
    tables = [Table("", ["run", "folder", *names], rows)]
    return [*tables, Table("Missing, damaged or left out", ["what", "of"], left_out)] if left_out else tables
