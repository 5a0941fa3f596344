"""Charts of what `WhySparse` measured, and of the curvature at the start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from plotly import graph_objects as go

from rlvr_lightning.report.figures import (
    COLUMNS,
    STEPS,
    TOGETHER,
    Chart,
    add_curves,
    groups,
    line,
    name_x,
    panels,
    places,
    plain,
)
from rlvr_lightning.report.reading import Run
from rlvr_lightning.report.why_table import value
from rlvr_lightning.study.records import Curve

OVER = {
    "absorbed updates": ("update", "absorbed_frac"),
    "cosine of momentum and gradient": ("momentum_cosine",),
    "std of sqrt(v)": ("sqrt_v", "std"),
    "gradient norm": ("grad_norm",),
}
"""What is drawn over steps: title, and where it is in a record."""


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Curves over steps, sizes of updates overall and by kind, norms of gradients by layer; eigenvalues."""
    measured, curved = [run for run in runs if run.why], [run for run in runs if run.curvature]
    return [*(_of_steps(runs, measured) if measured else []), *([_eigenvalues(curved)] if curved else [])]


def _of_steps(runs: Sequence[Run], measured: Sequence[Run]) -> list[Chart]:
    kinds = ["all", *dict.fromkeys(kind for run in measured for kind in run.why[-1]["kinds"])]
    sizes = [_sizes(measured, kinds[k : k + TOGETHER]) for k in range(0, len(kinds), TOGETHER)]
    return [_curves(runs), *sizes, *[_norms(run) for run in measured if run.why[-1]["layers"]]]


def _curves(runs: Sequence[Run]) -> Chart:
    figure = panels(list(OVER), shared_xaxes="all")
    add_curves(figure, runs, [[_over_steps(run, keys) for run in runs] for keys in OVER.values()])
    figure.update_yaxes(tickformat=".3~%", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(tickformat=".1e", rangemode="tozero", row=2, col=1)
    name_x(figure, STEPS)
    what = "Share of updates below half a unit in the last place, cosine of momentum and gradient, std of sqrt(v), norm"
    return Chart(f"{what} of the gradient, over optimizer steps; a line for each run.", figure)


def _eigenvalues(runs: Sequence[Run]) -> Chart:
    figure = panels(["largest eigenvalues of the Hessian at the start"])
    numbers = groups(runs)
    for run in runs:
        curve = [(place, one["value"]) for place, one in enumerate(run.curvature, start=1)]
        error = {"type": "data", "array": [one["residual"] for one in run.curvature]}
        figure.add_trace(line(run.name, curve, numbers[run.group], True, error_y=error))
    figure.update_xaxes(dtick=1)
    name_x(figure, "by magnitude")
    return Chart(
        "Largest eigenvalues of the Hessian of the first step's loss, with bounds of error, by magnitude.", figure
    )


def _over_steps(run: Run, keys: Sequence[str]) -> Curve:
    found = [(each["step"], value(each["all"], *keys)) for each in run.why]
    return [(step, number) for step, number in found if number is not None]


def _sizes(runs: Sequence[Run], kinds: Sequence[str]) -> Chart:
    figure = panels(kinds, 3, row_px=190, shared_xaxes="all")
    numbers, shown = groups(runs), set()
    for kind, (row, column) in zip(kinds, places(figure, len(kinds)), strict=True):
        for run in runs:
            curve = _histogram(run.why[-1]["all"] if kind == "all" else run.why[-1]["kinds"].get(kind))
            if curve:
                figure.add_trace(line(run.name, curve, numbers[run.group], run.name not in shown), row, column)
                shown.add(run.name)
        figure.add_vline(x=0, line={"color": "#8a8a8a", "width": 1, "dash": "dot"}, row=row, col=column)
    figure.update_yaxes(tickformat=".2~%", rangemode="tozero")
    name_x(figure, "log2(|update| / half a unit)")
    what = "Sizes of updates at the last measurement, in octaves of half a unit in the last place of the bf16 weight"
    return Chart(f"{what}: what is left of the dotted line is absorbed. Share of the updates that are not 0.", figure)


def _histogram(part: Any) -> Curve:
    """Share of updates in each octave, at its middle."""
    counts = part["update"].get("octaves") if part else None
    if not isinstance(counts, dict) or not counts or not all(isinstance(n, int) for n in counts.values()):
        return []
    total, known = sum(counts.values()), {int(octave): count for octave, count in counts.items()}
    return [(k + 0.5, known.get(k, 0) / total) for k in range(min(known) - 1, max(known) + 2)]  # type: ignore[misc]


def _norms(run: Run) -> Chart:
    lines = run.why[:: math.ceil(len(run.why) / COLUMNS)]
    layers = sorted(run.why[-1]["layers"], key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0))
    found = [[value(each["layers"].get(layer), "grad_norm") for each in lines] for layer in layers]
    figure = panels(
        [f"{run.name}: norm of the gradient by layer"], row_px=80 + max(9, min(22, 600 // len(layers))) * len(layers)
    )
    heat = go.Heatmap(
        x=[each["step"] for each in lines],
        y=[f"layer {plain(layer)}" if layer.isdigit() else "outside layers" for layer in layers],
        z=[[math.log10(norm) if norm and norm > 0 else None for norm in row] for row in found],
        text=[["" if norm is None else f"{norm:.3g}" for norm in row] for row in found],
        hovertemplate="step %{x}, %{y}: %{text}<extra></extra>",
        colorscale="Viridis",
        colorbar={"title": "log10", "thickness": 14},
        hoverongaps=False,
    )
    figure.add_trace(heat)
    figure.update_layout(hovermode="closest", margin={"l": 105})
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, ticks="")
    figure.update_xaxes(showgrid=False)
    name_x(figure, STEPS)
    return Chart(f"{run.name}: norm of the gradient in each layer over optimizer steps, logarithmic colours.", figure)
