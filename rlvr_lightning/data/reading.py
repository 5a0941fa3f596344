"""From the rows of a data set to problems with answers; what cannot be used is left out, counted and shown."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from rlvr_lightning.data.tables import Table, check_ids, load_table
from rlvr_lightning.rewards.code_tests import tests_of
from rlvr_lightning.rewards.math_answer import as_list, usable_golds
from rlvr_lightning.rewards.math_text import last_boxed
from rlvr_lightning.rewards.math_verifier import Verifier, require_math_verify

Answers = Literal["any", "math", "boxed", "tests"]
Problem = dict[str, Any]
"""`problem` (str) and whatever the reward needs: `answer`, `choices`, tests."""
Shape = Callable[[Mapping[str, Any], random.Random], Problem]
"""A row, and numbers drawn for it alone, to a problem; raises Unusable for a row that holds none."""
CHECKED_AT_ONCE = 1000


class Unusable(Exception):
    """Why a row holds no problem, in a few words."""


def text_in(row: Mapping[str, Any], column: str) -> str:
    """What a column holds; Unusable unless it is text that is not blank."""
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise Unusable(f"no text in {column!r}")
    return text


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Where problems come from, and how they are told from rows."""

    path: str
    """As `load_table` takes it."""
    shape: Shape
    expected: Sequence[str]
    """The columns that `shape` looks at."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Those of them that have another name here."""
    config: str | None = None
    split: str = "train"
    answers: Answers = "any"
    """What an answer must be to be used: see `HubPrompts`."""
    streaming: bool = False

    def problems(self, num: int | None, seed: int, asked: str = "num") -> list[tuple[int, Problem]]:
        """Row numbers and problems.

        Args:
            num: how many, drawn at random, or the first if they are streamed; None takes all, in order.
            seed: of the drawing, and of what a shape draws.
            asked: the setting that `num` is, for messages.

        Raises:
            ValueError: no such data, a column is missing, an id stands twice, too few usable rows, or none.
        """
        table = load_table(self.path, self.config, self.split, self.streaming)
        table = table.narrowed(self._columns(table))
        found, left_out = self._usable(table, num, seed)
        told = "; ".join(f"{why} ({table.places(sorted(rows))})" for why, rows in left_out.items())
        if not found:
            raise ValueError(f"path: {table.name} has no usable problem: {told}")
        if num is not None and len(found) < num:
            raise ValueError(
                f"{asked}: {table.name} has {len(found)} usable problems, fewer than {num}" + f": {told}" * bool(told)
            )
        if left_out:
            count = sum(map(len, left_out.values()))
            rank_zero_warn(f"{table.name}: left out {count} rows, kept {len(found)}: {told}")
        check_ids(table, found)
        return found

    def _columns(self, table: Table) -> list[str]:
        """Names of the expected columns in the table; ValueError if one is missing."""
        here = [self.renamed.get(name, name) for name in self.expected]
        if missing := [name for name in here if name not in table.columns]:
            raise ValueError(
                f"{table.name}: no column {missing[0]!r}; the columns are {', '.join(table.columns)}; "
                f"expected are {', '.join(here)}; name yours in `columns`"
            )
        return here

    def _usable(
        self, table: Table, num: int | None, seed: int
    ) -> tuple[list[tuple[int, Problem]], dict[str, list[int]]]:
        """The first `num` usable problems of the drawn order, and the rows that were passed over, by reason."""
        found: list[tuple[int, Problem]] = []
        left_out: dict[str, list[int]] = {}
        rows = table.drawn(num is not None, seed)
        with Gold(self.answers) as gold:
            while batch := list(
                islice(rows, CHECKED_AT_ONCE if num is None else min(CHECKED_AT_ONCE, num - len(found)))
            ):
                shaped = []
                for number, row in batch:
                    try:
                        shaped.append((number, self._shaped(row, number, seed)))
                    except Unusable as why:
                        left_out.setdefault(str(why), []).append(number)
                for (number, _), kept in zip(shaped, gold([problem for _, problem in shaped]), strict=True):
                    if isinstance(kept, str):
                        left_out.setdefault(kept, []).append(number)
                    else:
                        found.append((number, kept))
        return found, left_out

    def _shaped(self, row: Mapping[str, Any], number: int, seed: int) -> Problem:
        expected = {name: row.get(self.renamed.get(name, name)) for name in self.expected}
        return self.shape(expected, random.Random(f"{seed}/{number}"))


class Gold:
    """The answers of problems, checked; a context that ends the checking processes."""

    def __init__(self, kind: Answers) -> None:
        self.kind = kind
        if kind in ("math", "boxed"):
            require_math_verify()
        self.verifier = Verifier()

    def __enter__(self) -> Gold:
        return self

    def __call__(self, problems: Sequence[Problem]) -> list[Problem | str]:
        """Each problem with its answer as it will be compared, or why it cannot be used."""
        if self.kind == "tests":
            return [_with_tests(problem) for problem in problems]
        checked: list[Problem | str] = [_with_answer(problem) for problem in problems]
        if self.kind == "any":
            return checked
        golds = [[] if isinstance(each, str) else as_list(each.get("answer", "")) for each in checked]
        if self.kind == "boxed":
            golds = [[last_boxed(each) or "" for each in several] for several in golds]
        flat = [each for several in golds for each in several]
        usable = dict(zip(flat, usable_golds(flat, self.verifier), strict=True))
        return [
            each if isinstance(each, str) else _with_golds(each, [usable[gold] for gold in several])
            for each, several in zip(checked, golds, strict=True)
        ]

    def __exit__(self, *_: object) -> None:
        self.verifier.close()


def _with_answer(problem: Problem) -> Problem | str:
    """The problem, unless it has an answer that is none."""
    answer = problem.get("answer", True)
    missing = answer is None or answer == [] or answer != answer  # NaN
    return "no answer" if missing or (isinstance(answer, str) and not answer.strip()) else problem


def _with_golds(problem: Problem, golds: list[str | None]) -> Problem | str:
    if not golds or None in golds:
        return "an answer that cannot be parsed"
    several = isinstance(problem["answer"], list | tuple)
    return problem | {"answer": golds if several else golds[0]}


def _with_tests(problem: Problem) -> Problem | str:
    try:
        tests_of(problem)
    except (ValueError, KeyError, TypeError):
        return "no tests that can be run"
    return problem
