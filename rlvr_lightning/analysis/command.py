"""What the commands of this room share: arguments, tables on the console, records, error lines."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlvr_lightning.analysis.matching import Matched
from rlvr_lightning.analysis.opening import FORMS


def parser(name: str, doc: str | None, models: Sequence[tuple[str, str]]) -> argparse.ArgumentParser:
    """Of a command: models, then `--json` and `--plot`."""
    made = argparse.ArgumentParser(
        prog=f"python -m rlvr_lightning {name}",
        description=doc,
        epilog=f"Each model is {FORMS}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for model, text in models:
        made.add_argument(model.lower(), metavar=model, help=text)
    made.add_argument("--json", metavar="FILE", help="write all numbers there; - prints them instead of the tables")
    made.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them (needs the extra `plot`)")
    return made


def run(name: str, work: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Do it; a problem is one line on stderr and exit status 2."""
    try:
        check_writable(options)
        work(options)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {name}: {error}", file=sys.stderr)
        return 2
    return 0


def check_writable(options: argparse.Namespace) -> None:
    """Raise ValueError, before anything is computed, if a file could not be written at the end."""
    for field in ("json", "plot"):
        wanted = getattr(options, field)
        if wanted and str(wanted) != "-" and (not Path(wanted).parent.is_dir() or Path(wanted).is_dir()):
            raise ValueError(f"--{field}: there is no folder {Path(wanted).parent} for a file {Path(wanted).name!r}")
    if options.plot:
        from rlvr_lightning.analysis.picture import check_installed

        check_installed(options.plot)


def about(found: Matched) -> dict[str, Any]:
    """What was compared: the beginning of every record."""
    return {
        "models": [model.label for model in found.models],
        "dtypes": found.dtypes(),
        "tensors": len(found.tensors),
        "entries": found.entries,
        "tied": found.tied,
        "left_out": [asdict(one) for one in found.left_out],
    }


def print_about(record: dict[str, Any]) -> None:
    """The same for people."""
    pairs = ", ".join(f"{model} ({dtype})" for model, dtype in zip(record["models"], record["dtypes"], strict=True))
    print(f"{pairs}: {record['tensors']} tensors, {record['entries']:,} entries")
    if len(set(record["dtypes"])) > 1:
        print(
            "dtypes differ: compared in the wider one; what the narrower lost before, if it was rounded, is change here"
        )
    for head, first in record["tied"].items():
        print(f"tied: {head} is {first}, counted once")
    for one in record["left_out"]:
        print(f"left out: {one['entries']:,} entries of {one['tensor']} in {one['model']}: {one['reason']}")


def print_table(title: str, heading: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    """A table on the console, numbers to the right.

    Args:
        title: above it.
        heading: a title for each column.
        rows: of cells.
        left: columns that hold text.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(heading):
        table.add_column(column, justify="left" if index in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    print(f"\n{title}")
    Console(width=console.width if console.is_terminal else 200).print(table)


def percent(share: float | None) -> str:
    """A share in per cent with three significant digits, and what is none as a dash.

    >>> percent(0.12345), percent(0.00001234), percent(0.0), percent(None), percent(1.0)
    ('12.3', '0.00123', '0', '-', '100')
    """
    if not share:
        return "-" if share is None else "0"
    digits = max(0, 2 - math.floor(math.log10(100 * abs(share))))
    return f"{100 * share:.{digits}f}"


def hand_over(
    record: dict[str, Any],
    options: argparse.Namespace,
    show: Callable[[], None],
    draw: Callable[[], None] = lambda: None,
) -> None:
    """What was found, as it was asked for: `--json`, the tables unless the numbers go to the console, `--plot`.

    Args:
        record: all numbers.
        options: of the command.
        show: prints the tables.
        draw: the picture.
    """
    if options.json:
        write_json(record, options.json)
    if options.json != "-":
        show()
    if getattr(options, "plot", None):
        draw()


def write_json(record: dict[str, Any], where: str) -> None:
    """To a file, or to the standard output for `-`."""
    text = json.dumps(record, indent=1)
    if where == "-":
        print(text)
    else:
        Path(where).write_text(text + "\n")
