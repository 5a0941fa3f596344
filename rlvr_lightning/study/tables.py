"""Tables of a sweep: on the console, as Markdown, and inside marked blocks of a README.

A block is filled from the records in `results/NAME` beside the file::

    <!-- table:NAME -->            every cell, every metric kept
    <!-- table:NAME best -->       of each label the cell with the highest mean of the first metric
    <!-- table:NAME METRIC ... --> these metrics only
    <!-- table:NAME only:A,B -->   the labels A and B only
    ...
    <!-- end -->
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rlvr_lightning.study.records import Cell, best_cells, cells, load_records

BLOCK = re.compile(r"(<!-- table:(?P<name>[\w.-]+)(?P<options>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def gib(num_bytes: float) -> str:
    """Bytes as GiB for people.

    >>> gib(3 * 2**29)
    '1.50'
    """
    return f"{num_bytes / 2**30:.2f}"


def number(value: float) -> str:
    """Three decimals, a power of ten where they would say nothing, no decimals where they would be noise.

    >>> number(0.5), number(0.00012), number(0.0), number(3566080.0)
    ('0.500', '1.2e-04', '0.000', '3,566,080')
    """
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"


def spread(values: Sequence[float], text: Any = number) -> str:
    """Mean and range over seeds.

    >>> spread([0.5, 0.75]), spread([0.5]), spread([])
    ('0.625 (0.500 to 0.750)', '0.500', '-')
    """
    if not values:
        return "-"
    if len(set(values)) == 1:
        return text(values[0])
    return f"{text(mean(values))} ({text(min(values))} to {text(max(values))})"


def metric_names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Metrics that the records keep, in their order."""
    return list(dict.fromkeys(name for record in records for name in record["metrics"]))


def _memory(cell: Cell, *path: str) -> list[int]:
    found = []
    for record in cell.good:
        value: Any = record.get("memory") or {}
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        found += [value] if isinstance(value, int) else []
    return found


def rows(records: Iterable[Mapping[str, Any]], metrics: Sequence[str], best: bool = False) -> list[list[str]]:
    """The table as text: a heading, then one row for each cell.

    Args:
        records: of one sweep.
        metrics: shown as the mean at the end of training with the range over seeds; also at the start if measured then.
        best: only the best cell of each label, by the first metric.
    """
    found = cells(records)
    if best:
        found = best_cells(found, metrics[0])
    started = {name for name in metrics if any(cell.values(name, "start") for cell in found)}
    heading = ["run", "seeds"]
    for name in metrics:
        heading += [f"{name} start", f"{name} end"] if name in started else [name]
    heading += ["seconds", "peak GiB", "optimizer state bytes"]
    table = [heading]
    for cell in found:
        failed = len(cell.records) - len(cell.good)
        row = [cell.name, f"{len(cell.good)}" + (f" ({failed} failed)" if failed else "")]
        for name in metrics:
            row += [_over_seeds(cell, name, which) for which in (("start", "final") if name in started else ("final",))]
        row += [spread([record["wall_s"] for record in cell.good], lambda seconds: f"{seconds:.0f}")]
        row += [gib(max(peaks)) if (peaks := _memory(cell, "peak_bytes")) else "-"]
        row += [f"{max(state):,}" if (state := _memory(cell, "optimizer_state", "global_bytes")) else "-"]
        table.append(row)
    return table


def _over_seeds(cell: Cell, metric: str, which: str) -> str:
    lost = cell.not_finite(metric, which)
    return spread(cell.values(metric, which)) + (f" ({lost} not finite)" if lost else "")


def markdown(table: Sequence[Sequence[str]]) -> str:
    r"""A Markdown table, first row its heading.

    >>> print(markdown([["a", "b"], ["1", "x|y"]]))
    | a | b |
    |---|---|
    | 1 | x\|y |
    """
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in table]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def print_table(records: Iterable[Mapping[str, Any]], metrics: Sequence[str]) -> None:
    """The table on the console."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    heading, *body = rows(records, metrics)
    table = Table(box=box.ASCII2)
    for title in heading:
        table.add_column(title, overflow="fold")
    for row in body:
        table.add_row(*map(Text, row))
    Console().print(table)


def of_labels(records: Sequence[Mapping[str, Any]], labels: Sequence[str], name: str) -> list[Mapping[str, Any]]:
    """Those of some labels; ValueError where a label has none."""
    if unknown := set(labels) - {record["label"] for record in records}:
        raise ValueError(f"table:{name}: no record of {sorted(unknown)}")
    return [record for record in records if record["label"] in labels]


def fill_blocks(text: str, results: Path) -> str:
    """A Markdown text with each marked block replaced by the table of its records.

    Args:
        text: with blocks as in the module's docstring.
        results: the folder that holds a folder for each sweep.

    Raises:
        ValueError: a block names a sweep without records, or a metric that no record keeps.
    """

    def filled(block: re.Match[str]) -> str:
        records: list[Mapping[str, Any]] = list(load_records(results / block["name"]).values())
        if not records:
            raise ValueError(f"table:{block['name']}: no records in {results / block['name']}")
        options = block["options"].split()
        for word in options:
            if word.startswith("only:"):
                records = of_labels(records, word.removeprefix("only:").split(","), block["name"])
        kept = metric_names(records)
        chosen = [word for word in options if word != "best" and not word.startswith("only:")] or kept
        if unknown := set(chosen) - set(kept):
            raise ValueError(f"table:{block['name']}: no record keeps {sorted(unknown)}; there are {kept}")
        return f"{block[1]}{markdown(rows(records, chosen, best='best' in options))}\n{block[4]}"

    return BLOCK.sub(filled, text)
