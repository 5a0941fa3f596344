"""The page of one step's memory: stacked by owner over its allocations, phases and the peak marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plotly import graph_objects as go

from rlvr_lightning.profiling.history import History, Moment
from rlvr_lightning.profiling.table import Table
from rlvr_lightning.report.document import Section
from rlvr_lightning.report.figures import GRID, SEEN, Chart, panels
from rlvr_lightning.report.page import framed

MIB = 2**20
TITLE = "Over the step"
NARROW = 0.03
"""Share of the width under which a phase is not named."""


def timeline_page(step: int, history: History, end: str) -> str:
    """HTML that fetches nothing.

    Args:
        step: its number, from 1.
        history: what it held.
        end: why it ended before its time, or "".
    """
    text = (
        "Bytes of tensors by owner, as they are made and freed. What was made in a phase and belongs to none of the "
        "named owners is the phase's own: rollout workspace, activations, optimizer workspace. Counting makes the step "
        "slower, so seconds are of the counted one."
    )
    sections = [Section(TITLE, text, [peak_table(history), phase_table(history)])]
    title = f"Memory of step {step}" + (f", {end}" if end else "")
    return framed(title, sections, {TITLE: charts(history)})


def label(owner: str) -> str:
    """For people."""
    return owner.replace("_", " ")


def charts(history: History) -> list[Chart]:
    """Over seconds, and over allocations, of which a short phase may have many; owners that hold most lie lowest."""
    text = f"{told(history.peak)} {_shown(history)}"
    marks = history.phases()
    seconds = _chart(
        history,
        "seconds, while counting",
        [moment.seconds for moment in history.moments],
        [(mark["phase"], mark["first_s"], mark["seconds"]) for mark in marks],
    )
    events = _chart(
        history,
        "allocations and releases",
        [moment.event for moment in history.moments],
        [(mark["phase"], mark["first_event"], mark["events"]) for mark in marks],
    )
    return [Chart(f"Over time. {text}", seconds), Chart(f"Over allocations. {text}", events)]


def _chart(history: History, axis: str, x: Sequence[float], marks: Sequence[tuple[str, float, float]]) -> go.Figure:
    figure = panels([""], row_px=450)
    for number, owner in enumerate(history.owners()):
        figure.add_trace(
            go.Scatter(
                x=x,
                y=[moment.owners.get(owner, 0) / MIB for moment in history.moments],
                name=label(owner),
                mode="lines",
                stackgroup="held",
                line={"shape": "hv", "width": 0.5, "color": SEEN[number % len(SEEN)]},
                fillpattern={"shape": ("", "/", "x")[number // len(SEEN) % 3], "size": 6, "solidity": 0.3},
                hovertemplate=f"%{{y:,.2f}}<extra>{label(owner)}</extra>",
            )
        )
    width = marks[-1][1] + marks[-1][2]
    _mark_phases(figure, marks, width)
    peak = history.peak
    _mark_peak(figure, x[history.moments.index(peak)], peak.total, width)
    figure.update_xaxes(title={"text": axis, "standoff": 4}, range=[0, width])
    figure.update_yaxes(title="MiB", rangemode="tozero")
    figure.update_layout(margin={"t": 105, "r": 40}, legend={"traceorder": "normal"}, modebar={"orientation": "v"})
    return figure


def _shown(history: History) -> str:
    shown = f"{history.events:,} allocations and releases"
    if history.every > 1:
        shown += f", of each {history.every} the fullest moment"
    return shown + "."


def told(peak: Moment) -> str:
    """The peak and who held it."""
    most = sorted(peak.owners.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{label(owner)} {size / MIB:,.1f}" for owner, size in most if size >= peak.total / 100)
    return f"Peak {peak.total / MIB:,.1f} MiB: {parts}."


def _mark_phases(figure: go.Figure, marks: Sequence[tuple[str, float, float]], width: float) -> None:
    for phase, start, wide in marks:
        line: dict[str, Any] = {"color": GRID, "width": 1, "dash": "dot"}
        figure.add_shape(type="line", x0=start, x1=start, y0=0, y1=1, yref="y domain", line=line)
        if wide >= NARROW * width:
            figure.add_annotation(
                x=start + wide / 2, y=1, yref="y domain", yanchor="bottom", text=phase, showarrow=False
            )


def _mark_peak(figure: go.Figure, x: float, total: int, width: float) -> None:
    left = x > width / 2
    figure.add_annotation(
        x=x,
        y=total / MIB,
        text=f"peak {total / MIB:,.1f} MiB",
        showarrow=True,
        arrowhead=2,
        arrowcolor="#8a8a8a",
        ax=-70 if left else 70,
        ay=-14,
        xanchor="right" if left else "left",
    )


def peak_table(history: History) -> Table:
    """Who held the peak."""
    peak = history.peak
    most = sorted(peak.owners.items(), key=lambda item: -item[1])
    rows = [[label(owner), size / MIB, 100 * size / peak.total] for owner, size in most]
    return Table("At the peak", ["owner", "MiB", "%"], [*rows, ["together", peak.total / MIB, 100.0]])


def phase_table(history: History) -> Table:
    """What each phase held at most, and how long it took."""
    rows = [
        [found["phase"], found["events"], found["seconds"], found["peak_bytes"] / MIB]
        for found in history.phases()
        if found["events"]
    ]
    dropped = history.marks_dropped
    notes = [f"{dropped:,} more phases are not told apart: they belong to the last"] if dropped else []
    columns = ["phase", "allocations and releases", "seconds, counted", "peak MiB"]
    return Table("Phases", columns, rows, [*notes, f"Dropped: {_dropped(history)}"])


def _dropped(history: History) -> str:
    if not history.dropped:
        return "nothing"
    return (
        f"{history.dropped:,} of {history.events:,} moments, each of which held no more than one kept within "
        f"{history.every} of it"
    )
