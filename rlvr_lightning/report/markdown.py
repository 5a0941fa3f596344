"""The report as Markdown, for pull requests: the tables and samples, in text that needs no chart."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlvr_lightning.profiling.table import render
from rlvr_lightning.report.document import Sample, document
from rlvr_lightning.report.reading import Run


def markdown(runs: Sequence[Run]) -> str:
    """Markdown of everything but charts."""
    parts = ["# Report"]
    for section in document(runs):
        parts += [f"## {section.title}", *([section.text] if section.text else [])]
        parts += [render([table], "markdown").strip() for table in section.tables if table.rows or table.notes]
        for run, found in section.samples.items():
            parts += [f"### {_line(run)}", *map(_sample, found)]
        parts += [fenced(text) for text in section.listings.values()]
    return "\n\n".join(parts) + "\n"


def fenced(text: str) -> str:
    """A block that the text cannot end: its fence is longer than any in it.

    >>> print(fenced("```"))
    ````text
    ```
    ````
    """
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _line(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>])", r"\\\1", " ".join(text.split()))


def _sample(sample: Sample) -> str:
    written = fenced(f"{sample.prompt}\n-> {sample.completion}")
    return f"After {sample.step} batches, {_line(sample.scores)}:\n\n{written}"
