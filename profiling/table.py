"""A table for people and programs: console, Markdown, CSV, JSON or HTML. Loads `rich` for the console alone."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

FORMATS = ("console", "markdown", "csv", "json", "html")


@dataclass(frozen=True)
class Table:
    """Rows under headings, with what is to be known about them.

    Example:
        >>> table = Table("sizes", ["model", "GiB"], [["a", 1.5], ["b", None]], notes=["GiB: 2**30 bytes"])
        >>> print(render([table], "markdown"))
        sizes
        <BLANKLINE>
        | model | GiB |
        | --- | ---: |
        | a | 1.50 |
        | b | - |
        <BLANKLINE>
        - GiB: 2**30 bytes
        <BLANKLINE>
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    """Strings, numbers (of which floats are shown with two decimals) or None."""
    notes: Sequence[str] = field(default_factory=list)


def cell(value: Any) -> str:
    """For people.

    >>> cell(1234.5), cell(1234567), cell(None), cell("x")
    ('1,234.50', '1,234,567', '-', 'x')
    """
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _right(table: Table, column: int) -> bool:
    return all(row[column] is None or isinstance(row[column], int | float) for row in table.rows)


def render(tables: Sequence[Table], form: str) -> str:
    """All tables as one text; of CSV the first column names the table.

    Raises:
        ValueError: there is no such format.
    """
    makers = {"console": _console, "markdown": _markdown, "csv": _csv, "json": _json, "html": _html}
    if form not in makers:
        raise ValueError(f"--format: {form!r} is not known; one of {', '.join(FORMATS)}")
    return makers[form](tables)


def _console(tables: Sequence[Table]) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as Rich

    out = io.StringIO()
    # as wide as it is: a cell cut short would be no number
    console = Console(file=out, width=1000, highlight=False)
    for table in tables:
        shown = Rich(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(table.columns):
            shown.add_column(name, justify="right" if _right(table, number) else "left", no_wrap=True)
        for row in table.rows:
            shown.add_row(*map(cell, row))
        console.print(shown)
        for note in table.notes:
            console.print(f"  {note}", markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _markdown(tables: Sequence[Table]) -> str:
    lines = []
    for table in tables:
        rule = ["---:" if _right(table, number) else "---" for number in range(len(table.columns))]
        rows = [map(_in_cell, table.columns), rule, *(map(_in_cell, row) for row in table.rows)]
        lines += [table.title, "", *(f"| {' | '.join(row)} |" for row in rows), ""]
        lines += [*(f"- {note}" for note in table.notes), ""] if table.notes else []
    return "\n".join(lines)


def _in_cell(value: Any) -> str:
    """On one line, and nothing in it Markdown or HTML of its own."""
    text = html.escape(" ".join(cell(value).split()), quote=False)
    return re.sub(r"([|\\`*\[])", r"\\\1", text) if isinstance(value, str) else text


def _csv(tables: Sequence[Table]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for table in tables:
        writer.writerow(["table", *table.columns])
        writer.writerows([table.title, *("" if value is None else value for value in row)] for row in table.rows)
    return out.getvalue()


def _json(tables: Sequence[Table]) -> str:
    found = [
        {
            "title": table.title,
            "rows": [dict(zip(table.columns, row, strict=True)) for row in table.rows],
            "notes": list(table.notes),
        }
        for table in tables
    ]
    return json.dumps(found, indent=1) + "\n"


def _html(tables: Sequence[Table]) -> str:
    parts = [
        "<!doctype html><meta charset='utf-8'><title>Memory, predicted</title><style>",
        ":root{color-scheme:light dark}body{font:15px system-ui,sans-serif;margin:2em}",
        "table{border-collapse:collapse;margin:.5em 0}th,td{padding:.25em .7em;border-bottom:1px solid #8886;",
        "text-align:left}.n{text-align:right;font-variant-numeric:tabular-nums}</style>",
    ]
    for table in tables:
        parts += [f"<h2>{html.escape(table.title)}</h2>", html_table(table)]
        parts += [f"<p>{html.escape(note)}</p>" for note in table.notes]
    return "\n".join(parts) + "\n"


def html_table(table: Table) -> str:
    """Its rows as an HTML element, without title and notes; whatever is in a cell is text.

    >>> html_table(Table("", ["<a>"], [[1]]))
    '<table><thead><tr><th class=n>&lt;a&gt;</th></tr></thead><tbody><tr><td class=n>1</td></tr></tbody></table>'
    """
    kinds = [" class=n" if _right(table, number) else "" for number in range(len(table.columns))]
    heads = "".join(f"<th{k}>{html.escape(name)}</th>" for k, name in zip(kinds, table.columns, strict=True))
    rows = (
        "".join(f"<td{k}>{html.escape(cell(value))}</td>" for k, value in zip(kinds, row, strict=True))
        for row in table.rows
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
