"""Prompts from a Hugging Face data set, by name or from local files, as text or as a chat."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlvr_lightning.data.prompts import RESERVED, ListedPrompts, Record
from rlvr_lightning.data.reading import Answers, Problem, Reading, Shape, text_in
from rlvr_lightning.data.wording import Example, Wording

OURS = (*RESERVED, "problem", "source_row")


@dataclass(frozen=True, kw_only=True)
class Shots:
    """Solved problems in front of each problem, the same for all of them; none stands in front of itself."""

    num: int
    """How many."""
    split: str = "train"
    """Of which split of the data set."""
    path: str | None = None
    """From another data set or file with the same columns; None: the same."""
    seed: int = 0
    """Which ones."""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"shots.num must be at least 1, got {self.num}; leave shots out for none")


class HubPrompts(ListedPrompts):
    r"""Records with `prompt`, `problem` (the bare text), `source_row` and the mapped columns, of a data set or a file.

    What a row lacks is never made up: rows without a problem or a usable answer are left out, counted and listed.

    Args:
        path: name on the hub (`owner/name`), or a local .jsonl, .json, .csv or .parquet file.
        columns: column of the data set by field of the record: `prompt` is the problem, `answer` the right answer,
            `solution` what an example in front shows (the answer if there is none), `id` a name that stands once, and
            whatever else a reward looks at. None is `{prompt: problem, answer: answer}`.
        config: which configuration of a data set on the hub.
        split: which split of a data set on the hub.
        wording: how a problem becomes a prompt.
        shots: solved problems in front.
        num: keep this many, drawn at random without repetition, or the first if streamed; None keeps all, in order.
        seed: of the drawing.
        answers: what a problem needs to be kept: `any`, an answer, if one is mapped; `math`, one that `MathAnswer` can
            parse; `boxed`, a worked solution, of which the last \boxed{} holds the answer; `tests`, those of code.
        streaming: read the rows of a data set as they are needed, without fetching all of it first.

    Raises:
        ValueError: no such file, a damaged one (names the line), a missing column (names those found), an id that
            stands twice, or too few problems for `num`.
    """

    def __init__(  # noqa: PLR0913 (a block of the YAML, flat on purpose)
        self,
        path: str,
        columns: dict[str, str] | None = None,
        config: str | None = None,
        split: str = "train",
        wording: Wording = Wording(),  # noqa: B008 (frozen)
        shots: Shots | None = None,
        num: int | None = None,
        seed: int = 0,
        answers: Answers = "any",
        streaming: bool = False,
    ) -> None:
        columns = {"prompt": "problem", "answer": "answer"} if columns is None else columns
        check_columns(columns, answers)
        reading = Reading(
            path=path,
            shape=shape_of(columns),
            expected=list(columns.values()),
            config=config,
            split=split,
            answers=answers,
            streaming=streaming,
        )
        super().__init__(worded(reading, num, seed, wording, shots))


def worded(
    reading: Reading, num: int | None, seed: int, wording: Wording, shots: Shots | None, template: str = "{problem}"
) -> list[Record]:
    """Problems as records with prompts.

    Args:
        reading: where they come from.
        num: how many; see `Reading.problems`.
        seed: of the drawing.
        wording: how a problem becomes a prompt.
        shots: solved problems in front.
        template: of the prompt, where the wording has none.

    Raises:
        ValueError: as `Reading.problems`, or `num` is not positive.
    """
    if num is not None and num < 1:
        raise ValueError(f"num must be at least 1, or null for all, got {num}")
    found = reading.problems(num, seed)
    drawn: list[Example] = []
    if shots is not None:
        there = replace(reading, path=shots.path or reading.path, split=shots.split)
        drawn = [solved(each) for _, each in there.problems(shots.num + 1, shots.seed, "shots.num and one to spare")]
    texts = [problem["problem"] for _, problem in found]
    prompts = wording.prompts(texts, template, drawn, shots.num if shots else 0)
    return [
        {"prompt": prompt, "source_row": row} | problem for prompt, (row, problem) in zip(prompts, found, strict=True)
    ]


def solved(problem: Problem) -> Example:
    """A problem as an example, with its worked solution or else its answer."""
    shown = problem.get("solution") or problem.get("answer")
    if shown is None:
        raise ValueError(
            "shots: the data set has neither solutions nor answers to show; write wording.examples instead"
        )
    return Example(problem=problem["problem"], solution=str(shown))


def shape_of(columns: Mapping[str, str]) -> Shape:
    """Rows to problems by names of columns alone."""

    def shape(row: Mapping[str, Any], _: random.Random) -> Problem:
        fields = {name: row.get(column) for name, column in columns.items() if name != "prompt"}
        return {"problem": text_in(row, columns["prompt"])} | fields

    return shape


def check_columns(columns: Mapping[str, str], answers: Answers) -> None:
    """Raise ValueError for a mapping that cannot work."""
    if "prompt" not in columns:
        raise ValueError(f"columns: name the column of the problem, as in {{prompt: question}}; got {dict(columns)}")
    if taken := [name for name in columns if name in OURS]:
        raise ValueError(f"columns: the field {taken[0]!r} is added to each record; give the column another name")
    if answers in ("math", "boxed") and "answer" not in columns:
        raise ValueError(f"answers: {answers} needs a column for `answer` in columns")
