"""The report as one page: charts, tables and samples, with the script that draws them; it fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlvr_lightning.profiling.table import Table, html_table
from rlvr_lightning.report import figures, why
from rlvr_lightning.report.document import Sample, Section, document
from rlvr_lightning.report.figures import Chart
from rlvr_lightning.report.reading import Run

HERE = Path(__file__).parent


def page(runs: Sequence[Run]) -> str:
    """HTML of everything.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    sections = document(runs)
    names = ", ".join(run.name for run in runs)
    title = names if len(names) < 100 else f"{len(runs)} runs"
    return framed(title, sections, {section.title: charts(section.title, runs) for section in sections})


def charts(title: str, runs: Sequence[Run]) -> list[Chart]:
    """Those of a section of the document, by its title; none if there is nothing to draw."""
    makers = {
        "Training": figures.training,
        "Memory": figures.memory,
        "Update sparsity": figures.sparsity,
        "Why sparse": why.charts,
    }
    return makers[title](runs) if title in makers else []


def framed(title: str, sections: Sequence[Section], drawn: Mapping[str, Sequence[Chart]]) -> str:
    """HTML of some sections and the charts in them.

    Args:
        title: of the page.
        sections: in their order.
        drawn: charts by the title of their section.
    """
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), (HERE / "page.js").read_text()]
    drawings = [chart.figure.to_plotly_json() for found in drawn.values() for chart in found]
    start, body = 0, []
    for section in sections:
        body.append(_section(section, drawn[section.title], start))
        start += len(drawn[section.title])
    title = html.escape(title)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{(HERE / 'page.css').read_text()}</style></head><body>",
            f"<h1>{title}</h1>",
            f"<nav>{''.join(f'<a href=#{_anchor(s.title)}>{html.escape(s.title)}</a> ' for s in sections)}</nav>",
            *body,
            f'<script type="application/json" id="figures">{_inert(drawings)}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        ]
    )


def _policy(scripts: Sequence[str]) -> str:
    """What the page may do: run these scripts, draw, and nothing else; nothing is fetched or sent."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def _inert(value: object) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _section(section: Section, drawn: Sequence[Chart], start: int) -> str:
    parts = [f'<section id="{_anchor(section.title)}"><h2>{html.escape(section.title)}</h2>']
    parts += [f"<p>{html.escape(section.text)}</p>"] if section.text else []
    parts += [_chart(chart, start + number) for number, chart in enumerate(drawn)]
    parts += [_table(table) for table in section.tables]
    for run, found in section.samples.items():
        parts.append(f"<h3>{html.escape(run)}</h3>{_samples(found)}")
    for title, text in section.listings.items():
        parts.append(f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>")
    return "\n".join([*parts, "</section>"])


def _chart(chart: Chart, number: int) -> str:
    caption = html.escape(chart.caption)
    height = chart.figure.layout.height
    return (
        f'<figure><div class="chart" data-figure="{number}" role="img" aria-label="{caption}" '
        f'style="height:{height}px"></div><figcaption>{caption}</figcaption></figure>'
    )


def _table(table: Table) -> str:
    title = f"<h3>{html.escape(table.title)}</h3>" if table.title else ""
    rows = f'<div class="wide" tabindex="0">{html_table(table)}</div>' if table.rows else ""
    return title + rows + "".join(f'<p class="note">{html.escape(note)}</p>' for note in table.notes)


def _samples(found: Sequence[Sample]) -> str:
    rows = "".join(
        f"<tr><td class=n>{sample.step}</td><td><pre>{html.escape(sample.prompt)}</pre></td>"
        f"<td><pre>{html.escape(sample.completion)}</pre></td><td>{html.escape(sample.scores)}</td></tr>"
        for sample in found
    )
    heads = "<tr><th class=n>batches before</th><th>prompt</th><th>completion</th><th>scores</th></tr>"
    table = f'<table class="samples"><thead>{heads}</thead><tbody>{rows}</tbody></table>'
    return f'<div class="wide" tabindex="0">{table}</div>'
