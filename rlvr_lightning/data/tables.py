"""Rows of a data set: of the model hub, or of a JSONL, JSON, CSV or Parquet file, each with its place for messages."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

Row = dict[str, Any]
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
SHOWN = 20
_MAX_CELL_CHARS = 1 << 30  # csv's own limit is too low for the tests of programming problems


@dataclass(frozen=True)
class Table:
    """Rows, in the order of their source."""

    name: str
    """The path or the data set's name."""
    columns: Sequence[str]
    rows: Any
    """A sequence of mappings, or, where they are streamed, what can be iterated over once."""
    lines: Sequence[int] | None = None
    """Of a text file, where each row begins, from 1."""
    streamed: bool = False

    def narrowed(self, columns: Sequence[str]) -> Table:
        """The table without other columns, which may be large, where that spares reading them."""
        if not hasattr(self.rows, "select_columns"):
            return self
        return replace(self, columns=columns, rows=self.rows.select_columns(list(dict.fromkeys(columns))))

    def drawn(self, shuffled: bool, seed: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Each row with its number, from 0: in order, or in one drawn with the seed; streamed rows are in order."""
        if self.streamed:
            yield from enumerate(self.rows)
            return
        order = list(range(len(self.rows)))
        if shuffled:
            random.Random(f"hub/{seed}").shuffle(order)
        for number in order:
            yield number, self.rows[number]

    def place(self, number: int) -> str:
        """Where a row is: `line 3` of a text file, else `row 2`, from 0."""
        return f"row {number}" if self.lines is None else f"line {self.lines[number]}"

    def places(self, numbers: Sequence[int]) -> str:
        """Where rows are; of many, the first.

        Example:
            >>> Table("a.jsonl", ["x"], [{}] * 3, lines=[1, 3, 4]).places([0, 2]), Table("b", [], []).places([5])
            ('lines 1, 4', 'row 5')
        """
        shown = numbers[:SHOWN] if self.lines is None else [self.lines[number] for number in numbers[:SHOWN]]
        kind = ("row" if self.lines is None else "line") + "s" * (len(numbers) > 1)
        return f"{kind} {', '.join(map(str, shown))}" + ", ..." * (len(numbers) > SHOWN)


def load_table(path: str, config: str | None = None, split: str = "train", streaming: bool = False) -> Table:
    """A table from the hub or from a file.

    Args:
        path: name on the hub (`owner/name`), a local .jsonl, .json, .csv or .parquet file, or Parquet files by
            `hf://datasets/...`, where `{split}` stands for the split.
        config: which configuration of a data set on the hub.
        split: which split of a data set on the hub; a local file has none.
        streaming: fetch the rows of a data set as they are read, rather than all of them first.

    Raises:
        ValueError: it cannot be had, or is damaged (names file and line of a text file), or has no rows.
    """
    suffix = Path(path).suffix.lower()
    if path.startswith("hf://"):
        table = _from_library(path, "parquet", streaming, data_files=path.replace("{split}", split), split="train")
    elif suffix in FILE_TYPES:
        file = Path(path).expanduser()
        if not file.is_file():
            raise ValueError(f"path: there is no file {path!r}")
        if suffix == ".parquet":
            table = _from_library(path, "parquet", streaming, data_files=str(file), split="train")
        else:
            table = read_text_table(file)
    else:
        table = _from_library(path, path, streaming, name=config, split=split)
    if not table.columns or (not table.streamed and not len(table.rows)):
        raise ValueError(f"path: {path!r} is empty: it has no rows")
    return table


def _from_library(told: str, builder: str, streaming: bool, **how: Any) -> Table:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(builder, streaming=streaming, **how)
        columns = rows.column_names or list(next(iter(rows), ()))
    except (OSError, ValueError, DatasetsError) as error:  # not on the hub, no such split, no network, a damaged file
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(f"path: cannot load {told!r}: {reason or type(error).__name__}") from None
    return Table(told, columns, rows, streamed=streaming)


def read_text_table(file: Path) -> Table:
    """The rows of a JSONL, JSON or CSV file in UTF-8; ValueError naming file and line if it is damaged."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}:{line}: not UTF-8: {error}") from None
    if file.suffix.lower() == ".csv":
        found = list(_csv_rows(text, file))
    elif file.suffix.lower() == ".json" and text.lstrip().startswith("["):
        return _from_list(parse_json(text, str(file)), file)
    else:
        lines = enumerate(text.split("\n"), start=1)
        found = [(number, parse_object(line, f"{file}:{number}")) for number, line in lines if line.strip()]
    columns = list(dict.fromkeys(key for _, row in found for key in row))
    return Table(str(file), columns, [row for _, row in found], lines=[number for number, _ in found])


def _from_list(rows: list[Any], file: Path) -> Table:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{file}: entry {number} is not a JSON object")
    return Table(str(file), list(dict.fromkeys(key for row in rows for key in row)), rows)


def _csv_rows(text: str, file: Path) -> Iterator[tuple[int, Row]]:
    """The line on which each row begins, and the row: texts by the names in the first line."""
    csv.field_size_limit(_MAX_CELL_CHARS)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] = []
    line = 1
    try:
        for cells in reader:
            if cells and not names:
                names = cells
                if doubled := sorted({name for name in names if names.count(name) > 1}):
                    raise ValueError(f"{file}:{line}: column {doubled[0]!r} appears twice")
            elif cells:
                if len(cells) != len(names):
                    raise ValueError(f"{file}:{line}: {len(cells)} cells, but the first line names {len(names)}")
                yield line, dict(zip(names, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file}:{line}: {error}") from None


def parse_object(line: str, where: str) -> Row:
    """A line of JSONL as an object; `where` (file:line) opens the message of the ValueError it may raise."""
    record = parse_json(line, where)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object; each line must be one")
    return record


def parse_json(text: str, where: str) -> Any:
    """JSON in which no key appears twice and no number is NaN or infinite; `where` opens the message of a ValueError.

    Example:
        >>> parse_json('{"a": NaN}', "x.jsonl:2")
        Traceback (most recent call last):
        ValueError: x.jsonl:2: NaN is not JSON
    """

    def unique(pairs: list[tuple[str, Any]]) -> Row:
        keys = [key for key, _ in pairs]
        doubled = sorted({key for key in keys if keys.count(key) > 1})
        if doubled:
            raise ValueError(f"key {doubled[0]!r} appears twice")
        return dict(pairs)

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None


def check_ids(table: Table, found: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
    """Raise ValueError if two rows have the same `id`."""
    seen: dict[Any, int] = {}
    for number, row in found:
        name = row.get("id")
        if name is not None and (first := seen.setdefault(name, number)) != number:
            raise ValueError(
                f"{table.name}: the id {name!r} stands twice, in {table.place(first)} and {table.place(number)}"
            )
