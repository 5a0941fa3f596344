"""The charts of a page. Text and background get their colours from the page, which knows light, dark and print."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from rlvr_lightning.report.document import charted, definitions
from rlvr_lightning.report.memory import OWNERS, comparable, predicted
from rlvr_lightning.report.reading import Run, fraction
from rlvr_lightning.study.plots import COLORS
from rlvr_lightning.study.records import Curve

SEEN = (*COLORS[:-1], "#8a8a8a")
"""Okabe and Ito's palette, with grey for black, which nobody sees on a dark page."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
GRID = "rgba(128,128,128,0.28)"
ROW = 250
"""Pixels of a row of charts."""
BATCHES = "batches of rollouts"
STEPS = "optimizer steps"
TOGETHER = 6
"""Charts of a figure: what a printed page holds."""
COLUMNS = 150
"""Measurements in a heat map, which is not much wider in pixels."""


@dataclass(frozen=True)
class Chart:
    """A figure with what it shows, for those who see it and those who do not."""

    caption: str
    figure: go.Figure


def plain(text: str) -> str:
    """Text as plotly shows it literally: it would read some tags."""
    return html.escape(text, quote=False)


def groups(runs: Sequence[Run]) -> dict[str, int]:
    """Of each group of runs its number, which decides its look."""
    return {group: number for number, group in enumerate(dict.fromkeys(run.group for run in runs))}


def look(number: int, thin: bool = False) -> dict[str, Any]:
    """The line of the group of that number: another colour for the next, another dash too."""
    return {"color": SEEN[number % len(SEEN)], "dash": DASHES[number % len(DASHES)], "width": 1 if thin else 2}


def panels(titles: Sequence[str], columns: int = 2, row_px: int = ROW, **settings: Any) -> go.Figure:
    """Empty charts beside each other under one legend."""
    columns = min(columns, len(titles))
    lines = math.ceil(len(titles) / columns)
    height = lines * row_px + 90
    gaps = {"vertical_spacing": 58 / height if lines > 1 else 0, "horizontal_spacing": 0.16 / columns}
    figure = make_subplots(lines, columns, subplot_titles=list(map(plain, titles)), **gaps | settings)
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 20, "t": 70, "b": 45},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1, "yref": "container", "yanchor": "top", "x": 0},
        hovermode="x unified",
        hoverlabel={"bgcolor": "#222", "bordercolor": "#888", "font": {"color": "#fff"}},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#8a8a8a", "activecolor": "#0072B2"},
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, linecolor=GRID, showticklabels=True)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, linecolor=GRID)
    figure.update_annotations(font_size=14)
    return figure


def places(figure: go.Figure, number: int) -> list[tuple[int, int]]:
    """Row and column of each of so many charts."""
    columns = len(figure._grid_ref[0])
    return [(k // columns + 1, k % columns + 1) for k in range(number)]


def name_x(figure: go.Figure, title: str, column: int | None = None) -> None:
    """What the horizontal axes count, said under the lowest charts, or one of them."""
    text = {"text": title, "standoff": 4, "font": {"size": 12}}
    figure.update_xaxes(title=text, row=len(figure._grid_ref), col=column)


def line(name: str, curve: Curve, number: int, first: bool, hover: str = "", **settings: Any) -> go.Scatter:
    """A curve; those of one name are shown and hidden together.

    Args:
        name: in the legend.
        curve: its points.
        number: decides its look.
        first: whether it is the one of its name that the legend shows.
        hover: its name under the pointer, if another.
        settings: of plotly's Scatter.
    """
    few = len(curve) <= 40
    return go.Scatter(
        x=[step for step, _ in curve],
        y=[value if math.isfinite(value) else None for _, value in curve],
        name=plain(name),
        legendgroup=name,
        showlegend=first,
        mode="lines+markers" if few else "lines",
        hovertemplate=f"%{{y}}<extra>{plain(hover or name)}</extra>",
        **{"line": look(number)} | settings,
    )


def add_curves(figure: go.Figure, runs: Sequence[Run], found: Sequence[Sequence[Curve]]) -> None:
    """A chart for each of some metrics: of each the curves of all runs, empty ones where there is none."""
    numbers, shown = groups(runs), set()
    names = [run.group for run in runs]
    for curves, (row, column) in zip(found, places(figure, len(found)), strict=True):
        for run, curve in zip(runs, curves, strict=True):
            if curve:
                style = look(numbers[run.group], thin=names.count(run.group) > 1)
                seeds = f" ({names.count(run.group)} runs)" if names.count(run.group) > 1 else ""
                first = run.group not in shown
                trace = line(f"{run.group}{seeds}", curve, numbers[run.group], first, run.name, line=style)
                figure.add_trace(trace, row, column)
                shown.add(run.group)
    rows = math.ceil(sum(len(name) + 16 for name in set(names)) / 130)
    figure.update_layout(margin={"t": 48 + 22 * rows}, height=figure.layout.height + 22 * (rows - 1))


def training(runs: Sequence[Run]) -> list[Chart]:
    """Reward, validation, KL, entropy, lengths; one line a run."""
    names = charted(runs)
    return [_curves(names[k : k + TOGETHER], runs, BATCHES) for k in range(0, len(names), TOGETHER)]


def _curves(names: Sequence[str], runs: Sequence[Run], over: str, **axis: Any) -> Chart:
    figure = panels(names, shared_xaxes="all")
    add_curves(figure, runs, [[run.curves.get(name, []) for run in runs] for name in names])
    figure.update_yaxes(**axis)
    name_x(figure, over)
    return Chart(f"{', '.join(names)} over {over}; a line for each run.", figure)


def memory(runs: Sequence[Run]) -> list[Chart]:
    """What each owner held, stacked; and the peak of each batch."""
    return [*_owners(runs), *_peaks(runs)]


def _owners(runs: Sequence[Run]) -> list[Chart]:
    found = [run for run in runs if "memory/weights_bytes" in run.curves]  # the records of sweeps may lack them
    return [_stacks(found[k : k + TOGETHER]) for k in range(0, len(found), TOGETHER)]


def _stacks(found: Sequence[Run]) -> Chart:
    figure = panels([run.name for run in found], shared_yaxes="all")
    for run, (row, column) in zip(found, places(figure, len(found)), strict=True):
        for number, owner in enumerate(OWNERS):
            curve = [(step, value / 2**20) for step, value in run.curves.get(f"memory/{owner}_bytes", [])]
            trace = line(owner.replace("_", " "), curve, number, run is found[0], stackgroup="held")
            trace.update(mode="lines", line={"dash": "solid", "width": 1}, fillpattern=_pattern(number))
            figure.add_trace(trace, row, column)
    figure.update_yaxes(title="MiB", rangemode="tozero", col=1)
    name_x(figure, BATCHES)
    what = "MiB held by weights, gradients before the step, optimizer state and reference, over all processes"
    return Chart(f"{what}; stacked; a chart for each run.", figure)


def _pattern(number: int) -> dict[str, Any]:
    return {"shape": ("", "/", ".", "x")[number], "size": 8, "solidity": 0.25}


def _peaks(runs: Sequence[Run]) -> list[Chart]:
    curves = [[(step, value / 2**20) for step, value in run.curves.get("memory/peak_bytes", [])] for run in runs]
    if not any(curves):
        return []
    figure = panels(["peak of each batch"])
    add_curves(figure, runs, [curves])
    said = "of the process with most"
    for run, curve in zip(runs, curves, strict=True):
        ledger = predicted(run).ledger if comparable(run) and curve else None
        if ledger:
            said = "with what was predicted"
            ends = [(step, ledger.peak_bytes / 2**20) for step in (curve[0][0], curve[-1][0])]
            style = look(groups(runs)[run.group], thin=True)
            figure.add_trace(line(f"{run.name}, predicted", ends, 0, True, line=style, marker_symbol="diamond"), 1, 1)
    figure.update_yaxes(title="MiB", rangemode="tozero")
    name_x(figure, BATCHES)
    return [Chart(f"Peak memory in each batch of rollouts, MiB, {said}.", figure)]


def sparsity(runs: Sequence[Run]) -> list[Chart]:
    """The share that changed by definition, over steps; then heat maps of each run by kind and layer."""
    names = definitions(runs)
    measured = [run for run in runs if run.sparsity]
    if not names:
        return _logged(runs)
    least = _least(measured, names)
    heats = [_heat(run, names, when, least) for run in measured for when in WHEN if _parts(run, when, "kinds")]
    return [_shares(runs, names), *heats]


WHEN = {"last_step": "changed by a step", "total": "changed since the start"}


def _shares(runs: Sequence[Run], names: Sequence[str]) -> Chart:
    keys = [(name, when) for name in names for when in WHEN]
    figure = panels([f"{name}, {WHEN[when]}" for name, when in keys], row_px=200, shared_xaxes="all")
    found = [[_points(run, name, when) for run in runs] for name, when in keys]
    add_curves(figure, runs, found)
    figure.update_yaxes(tickformat=".3~%", rangemode="tozero")
    name_x(figure, STEPS)
    return Chart("Share of weights changed, by definition, over optimizer steps; a line for each run.", figure)


def _points(run: Run, name: str, when: str) -> Curve:
    values = [(each["step"], fraction(each.get(when), name)) for each in run.sparsity]
    return [(step, value) for step, value in values if value is not None]


def _logged(runs: Sequence[Run]) -> list[Chart]:
    """From metrics.csv, where `sparsity.jsonl` is not at hand: each value is repeated until the next measurement."""
    names = sorted({name for run in runs for name in run.curves if name.startswith("update/changed_frac")})
    return [_curves(names, runs, BATCHES, tickformat=".3~%", rangemode="tozero")] if names else []


def _parts(run: Run, when: str, by: str) -> list[str]:
    """Kinds or layers of a run; layers in order, what is in none of them last."""
    found = {name for each in run.sparsity for name in ((each.get(when) or {}).get(by) or {})}
    return sorted(found, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))


def _least(runs: Sequence[Run], names: Sequence[str]) -> int:
    """The power of ten below all shares of all heat maps that are not 0; one scale makes runs comparable."""
    shares = [
        fraction(part, name)
        for run in runs
        for each in run.sparsity
        for when in WHEN
        for by in ("kinds", "layers")
        for part in ((each.get(when) or {}).get(by) or {}).values()
        for name in names
    ]
    return min((math.floor(math.log10(share)) for share in shares if share and share > 0), default=-1)


def _heat(run: Run, names: Sequence[str], when: str, least: int) -> Chart:
    rows = [by for by in ("kinds", "layers") if _parts(run, when, by)]
    heights = [_height(len(_parts(run, when, by))) for by in rows]
    titles = [*names, *[""] * (len(names) * (len(rows) - 1))]
    figure = panels(titles, len(names), row_heights=heights, shared_yaxes=True, horizontal_spacing=0.015)
    for k, by in enumerate(rows):
        for j, name in enumerate(names):
            figure.add_trace(_map(run, name, when, by), k + 1, j + 1)
    ticks = list(range(least, 1))
    axis = {"colorscale": "Viridis", "cmin": least, "cmax": 0}
    bar = {"tickvals": ticks, "ticktext": [f"{100 * 10.0**tick:g} %" for tick in ticks], "thickness": 14}
    title = {"text": plain(f"{run.name}: {WHEN[when]}"), "x": 0, "font": {"size": 15}}
    figure.update_layout(height=int(sum(heights)) + 170, hovermode="closest", coloraxis=axis | {"colorbar": bar})
    figure.update_layout(title=title, margin={"t": 75, "l": 105})
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, ticks="")
    figure.update_xaxes(showgrid=False, nticks=4)
    figure.update_xaxes(showticklabels=len(rows) == 1, row=1)
    name_x(figure, STEPS, 1)
    what = f"share of weights {WHEN[when]}, in each kind of matrix and each layer, by definition"
    some = f"; one of {_stride(run)} measurements shown" if _stride(run) > 1 else ""
    return Chart(f"{run.name}: {what}; logarithmic scale, blank where nothing changed{some}.", figure)


def _height(rows: int) -> float:
    """Pixels of a heat map: of many layers low ones, so that a printed page holds them."""
    return rows * max(8.0, min(22.0, 600 / rows))


def _stride(run: Run) -> int:
    return math.ceil(len(run.sparsity) / COLUMNS)


def _map(run: Run, name: str, when: str, by: str) -> go.Heatmap:
    parts, lines = _parts(run, when, by), run.sparsity[:: _stride(run)]
    found: list[list[Any]] = [[((each.get(when) or {}).get(by) or {}).get(part) for each in lines] for part in parts]
    shares = [[fraction(record, name) for record in row] for row in found]
    counts = [
        [
            "" if fraction(record, name) is None else f"{record['changed'][name]:,} of {record['entries']:,}"
            for record in row
        ]
        for row in found
    ]
    few = len(lines) <= 40 and len(parts) <= 40  # a gap between cells of a pixel or two would be all there is
    return go.Heatmap(
        x=[each["step"] for each in lines],
        y=[
            f"layer {part}" if part.isdigit() else "outside layers" if by == "layers" else plain(part) for part in parts
        ],
        z=[[math.log10(share) if share else None for share in row] for row in shares],
        text=counts,
        hovertemplate="step %{x}, %{y}: %{text}<extra></extra>",
        coloraxis="coloraxis",
        hoverongaps=False,
        xgap=int(few),
        ygap=int(few),
    )
