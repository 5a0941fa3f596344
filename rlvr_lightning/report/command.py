"""`python -m rlvr_lightning report RUN [RUN...] --out report.html`: what runs did, on one page that needs no network.

report runs/sgd/version_0 --out report.html                          one run
report runs/sgd/version_0 runs/adamw/version_0 --out report.html     several compared
report results/tiny_seeds --out report.html                          all runs of a sweep
report runs/sgd/version_0 --out report.md                            tables for a pull request

RUN is a run's folder (what it was resumed from is put in front of it), a folder of runs, or a sweep's. Files that are
not there are named in the report.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlvr_lightning.report.finding import find_runs


class Parser(argparse.ArgumentParser):
    """One line for a mistake."""

    def error(self, message: str) -> Any:
        """Leave with status 2."""
        self.exit(2, f"error: report: {message}\n")


def write(paths: Sequence[Path], out: Path) -> str:
    """Write the report; returns a line that says so.

    Raises:
        ValueError: a path is no run, `out` ends in neither .html nor .md, or plotly is not there for a page.
        OSError: it cannot be written.
    """
    if out.suffix not in (".html", ".md"):
        raise ValueError(f"report: --out {out} must end in .html or .md")
    runs = find_runs(paths)
    if out.suffix == ".md":
        from rlvr_lightning.report.markdown import markdown as make
    else:
        try:
            from rlvr_lightning.report.page import page as make
        except ModuleNotFoundError as error:
            if error.name != "plotly":
                raise
            raise ValueError(
                "report: a page needs plotly: pip install 'rlvr-lightning[report]', or write --out report.md"
            ) from None
    text = make(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return f"wrote {out}: {len(runs)} run{'s' * (len(runs) > 1)}, {out.stat().st_size / 1024:,.0f} KiB"


def main(argv: list[str]) -> int:
    """Write a report; returns the exit status."""
    parser = Parser(prog="python -m rlvr_lightning report", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="report.html or report.md")
    options = parser.parse_args(argv)
    try:
        print(write(options.runs, options.out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: report: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0
