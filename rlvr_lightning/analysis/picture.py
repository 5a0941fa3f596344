"""Pictures of what differs where: layers by kinds of matrix, and histograms."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvr_lightning.analysis.groups import OUTSIDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_installed(path: Path) -> None:
    """Raise ValueError if a picture cannot be drawn, or not in the format that the file's name asks for."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs the package matplotlib: pip install 'rlvr-lightning[plot]'")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot: {path.name} must end in .png, .svg or .pdf")


@contextmanager
def canvas(path: Path, panels: int, title: str) -> Iterator[Any]:
    """Axes side by side, written to a file at the end of the block."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(7 * panels, 6), squeeze=False)
    figure.suptitle(title)
    yield tuple(axes[0])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def heat(axes: Axes, values: Mapping[tuple[str, str], float], title: str) -> None:
    """A map of values by (layer, kind of matrix); places without a value stay white.

    Where one value would drown the others, colours are logarithmic, and 0 has that of the least.
    """
    layers = sorted({layer for layer, _ in values}, key=lambda layer: (layer == OUTSIDE, layer.zfill(6)))
    kinds = sorted({kind for _, kind in values})
    grid = [[values.get((layer, kind), float("nan")) for kind in kinds] for layer in layers]
    positive = sorted(value for value in values.values() if value > 0)
    wide = bool(positive) and positive[-1] > 10 * positive[len(positive) // 2]
    least = positive[0] if wide else -math.inf
    colors = [[value if math.isnan(value) else max(value, least) for value in line] for line in grid]
    norm = "log" if wide else "linear"
    image = axes.imshow(colors, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right")
    every = max(1, len(layers) // 30)
    axes.set_yticks(range(0, len(layers), every), ["outside" if x == OUTSIDE else x for x in layers[::every]])
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=10)
    if len(layers) <= 16:
        bar = (positive[0] * positive[-1]) ** 0.5 if wide else sum(image.get_clim()) / 2
        for row, line in enumerate(grid):
            for column, value in enumerate(line):
                if not math.isnan(value):
                    color = "black" if value > bar else "white"
                    axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=7, color=color)
    axes.figure.colorbar(image, ax=axes)


def bars(axes: Axes, counts: Mapping[str, int], xlabel: str, ylabel: str) -> None:
    """Counts by name, without the empty ends, on a logarithmic scale."""
    full = [index for index, count in enumerate(counts.values()) if count]
    shown = list(counts.items())[full[0] : full[-1] + 1] if full else []
    axes.bar(range(len(shown)), [count for _, count in shown], color="#0072B2")
    axes.set_xticks(range(len(shown)), [name for name, _ in shown], rotation=60, ha="right", fontsize=8)
    if shown:
        axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", alpha=0.25)


def band(axes: Axes, names: Sequence[str], shares: Sequence[Sequence[float | None]], title: str) -> None:
    """Shares of layers in per cent: what was found, what chance gives at equal exponents, and its low, mean, high."""
    for at, found in enumerate(shares):
        if None in found:
            continue
        value, equal, low, mean, high = (100 * (share or 0.0) for share in found)
        axes.vlines(at, low, high, color="#999999", linewidth=6, label="chance, 95 %" if not at else "")
        axes.plot(at, mean, "_", color="black", markersize=9)
        axes.plot(
            at + 0.15, equal, "s", color="#0072B2", markersize=4, label="chance at equal exponent" if not at else ""
        )
        axes.plot(at - 0.15, value, "o", color="#D55E00", label="found" if not at else "")
    every = max(1, len(names) // 40)
    axes.set_xticks(range(0, len(names), every), names[::every], rotation=90, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("% of the changed entries")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=3)
