"""`plots`: figures of a sweep, and the tables of a README, from records.

python -m rlvr_lightning plots results/tiny         # curves and rates, PNG and SVG, beside the records
python -m rlvr_lightning plots README.md            # fill its <!-- table:NAME --> blocks
python -m rlvr_lightning plots README.md --check    # fail if they do not show what the records say
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from rlvr_lightning.study.bench_tables import fill_bench
from rlvr_lightning.study.change_tables import fill_changes
from rlvr_lightning.study.claims import fill_claims
from rlvr_lightning.study.rates import lines, swept
from rlvr_lightning.study.records import Cell, best_cells, cells, load_records
from rlvr_lightning.study.tables import fill_blocks, markdown, metric_names, of_labels, rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette: told apart with any colour vision."""
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def mean_curve(curves: Sequence[Sequence[Sequence[float | None]]]) -> list[tuple[float, float]]:
    """The mean of curves at the steps that all of them have.

    >>> mean_curve([[[0, 1.0], [5, 2.0]], [[0, 3.0], [5, None], [9, 1.0]]])
    [(0, 2.0)]
    """
    points: list[dict[float, float]] = [{x: y for x, y in curve if x is not None and y is not None} for curve in curves]
    shared = set.intersection(*map(set, points)) if points else set()
    return [(step, mean(p[step] for p in points)) for step in sorted(shared)]


def draw_curves(axes: Axes, found: Sequence[Cell], metric: str) -> None:
    """A metric over training: the mean over seeds, and each seed as a thin line; dots where points are few."""
    for number, cell in enumerate(found):
        color, style = COLORS[number % len(COLORS)], STYLES[number % len(STYLES)]
        kept = [record["metrics"][metric]["curve"] for record in cell.good if metric in record["metrics"]]
        for curve in kept if len(kept) > 1 else []:
            points = [(step, value) for step, value in curve if value is not None]
            axes.plot(*zip(*points, strict=True), color=color, linestyle=style, linewidth=0.6, alpha=0.45)
        if average := mean_curve(kept):
            seeds = f" ({len(kept)} seeds)" if len(kept) > 1 else ""
            marks: dict[str, Any] = {"marker": "o" if len(average) <= 10 else "", "color": color, "linestyle": style}
            axes.plot(*zip(*average, strict=True), linewidth=2, label=f"{cell.name}{seeds}", **marks)
    axes.set_xlabel("batches of rollouts")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.25)


def draw_rates(axes: Axes, found: Sequence[Cell], metric: str) -> None:
    """Where a metric settles against the learning rate: seeds as dots, their mean as a line, the stable band shaded.

    Rates at which a run failed are crosses at the lower edge.
    """
    for number, line in enumerate(lines(found, metric)):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        good = [point for point in line.points if point.values]
        axes.plot([p.rate for p in good], [mean(p.values) for p in good], color=color, linewidth=1.5)
        dots = [(point.rate, value) for point in good for value in point.values]
        take = f", take {line.suggestion():g}" if line.suggestion() else ""
        marks: dict[str, Any] = {"linestyle": "", "color": color, "markersize": 5}
        axes.plot([x for x, _ in dots], [y for _, y in dots], marker=marker, alpha=0.7, label=line.name + take, **marks)
        failed = [point.rate for point in line.points if point.failed]
        axes.plot(failed, [0.02] * len(failed), marker="x", transform=axes.get_xaxis_transform(), **marks)
        if band := line.band():
            axes.axvspan(band[0].rate, band[-1].rate, color=color, alpha=0.12, linewidth=0)
        if number == 0 and line.start is not None:
            axes.axhline(line.start, color="grey", linewidth=1, linestyle=":", label="start")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"{metric} at the end")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def figures(records: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, Figure]:
    """Figures by file name: `curves` of the best cell of each label, and `rates` if a learning rate was swept."""
    from matplotlib.figure import Figure

    found = cells(records)
    result = {}
    for name, draw, shown in (("curves", draw_curves, best_cells(found, metrics[0])), ("rates", draw_rates, found)):
        if name == "rates" and not any(map(swept, found)):
            continue
        columns = min(len(metrics), 3)
        high = -(-len(metrics) // columns)
        # not pyplot's, which keeps all there ever were
        figure = Figure(figsize=(5.2 * columns, 3.6 * high), layout="constrained")
        axes = figure.subplots(high, columns, squeeze=False)
        for axis, metric in zip(axes.flat, metrics, strict=False):
            draw(axis, shown, metric)
        for axis in axes.flat[len(metrics) :]:
            axis.set_visible(False)
        if name == "curves":
            _one_legend(figure)
        result[name] = figure
    return result


def _one_legend(figure: Figure) -> None:
    """Of all panels, below them: inside it would hide the ends of curves."""
    shown = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    by_label = {label: handle for handle, label in shown}
    columns = max(1, int(figure.get_figwidth() // 2.6))
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def draw(
    folder: Path, records: Sequence[Mapping[str, Any]], metrics: Sequence[str], labels: Sequence[str] = ()
) -> list[Path]:
    """Write `curves`, `rates` (PNG, SVG) and `table.md` of records into a sweep's folder; returns their paths.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError(f"no records in {folder / 'records'}; run the sweep first")
    shown = of_labels(records, labels, folder.name) if labels else records
    metrics = list(metrics) or metric_names(records)
    if not metrics:
        raise ValueError(f"no run in {folder / 'records'} has a metric; see their last_lines")
    written = []
    for name, figure in figures(shown, metrics).items():
        for suffix in ("png", "svg"):
            path = folder / f"{name}.{suffix}"
            figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            written.append(path)
    table = folder / "table.md"
    table.write_text(markdown(rows(records, metrics)) + "\n")
    return [*written, table]


def fill(path: Path, check: bool) -> int:
    """Fill a Markdown file's blocks, or check that they are filled; returns the exit status."""
    text = path.read_text()
    folder = path.resolve().parent
    results = folder if folder.name == "results" else folder / "results"
    new = text
    for filled in (fill_blocks, fill_bench, fill_changes, fill_claims):
        new = filled(new, results)
    if check and new != text:
        print(
            f"error: {path} does not show what the records say: python -m rlvr_lightning plots {path}", file=sys.stderr
        )
        return 1
    if new != text:
        path.write_text(new)
    return 0


def main(argv: list[str]) -> int:
    """Draw a sweep's figures, or fill a file's tables."""
    parser = argparse.ArgumentParser(
        prog="python -m rlvr_lightning plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="a sweep's folder, or a Markdown file")
    parser.add_argument("--metric", action="append", default=[], help="draw this one only; may be repeated")
    parser.add_argument("--check", action="store_true", help="with a Markdown file: change nothing, fail if stale")
    parser.add_argument("--only", metavar="A,B", help="draw the runs of these labels only")
    options = parser.parse_args(argv)
    try:
        if options.target.is_file():
            return fill(options.target, options.check)
        records, labels = list(load_records(options.target).values()), options.only.split(",") if options.only else ()
        print("\n".join(map(str, draw(options.target, records, options.metric, labels))))
        return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
