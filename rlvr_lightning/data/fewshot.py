"""Four kinds of small problems as raw few-shot prompts, for a real pretrained model that starts at 10 to 45 %.

A prompt is a few solved lines and one unsolved line; the model finishes the line, so the stop string is a newline::

    3 + 12 = 15
    17 + 5 = 22
    8 + 14 =

Problems are enumerated, and a hash of their text sets 100 of each kind apart for testing, 25 for validation: training
never shows one of these, neither to solve nor among the solved lines, which always come from the training problems.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from rlvr_lightning.data.prompts import PromptSource, Record
from rlvr_lightning.rewards.tasks import reasoning_gym

HELD_OUT = {"val": 25, "test": 100}
"""Problems of each kind that are never trained on."""
Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Problem:
    """A line to finish, and how it should end."""

    question: str
    answer: str
    entry: dict[str, Any] | None = None
    """The problem as reasoning-gym describes it, for its scorer; None if it is not from there."""


def additions() -> list[Problem]:
    """Two numbers up to 19, not both of one digit (those are among the chain sums): 300 problems."""
    pairs = itertools.product(range(20), repeat=2)
    return [Problem(f"{a} + {b} =", str(a + b)) for a, b in pairs if max(a, b) > 9]


def chain_sums() -> list[Problem]:
    """reasoning-gym's `chain_sum` of two digits, plus or minus, negative results included: 200 problems."""
    entries = reasoning_gym().create_dataset(
        "chain_sum", size=4000, seed=0, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    found = {entry["metadata"]["expression"]: entry for entry in entries}  # 4000 draws of 200: all occur
    return [Problem(f"{text} =", entry["answer"], entry) for text, entry in found.items()]


def largest() -> list[Problem]:
    """The largest of three distinct digits: 720 problems."""
    return [
        Problem(f"largest of {a}, {b}, {c}:", str(max(a, b, c))) for a, b, c in itertools.permutations(range(10), 3)
    ]


def third() -> list[Problem]:
    """The third of four distinct digits: 5,040 problems."""
    return [Problem(f"third of {a}, {b}, {c}, {d}:", str(c)) for a, b, c, d in itertools.permutations(range(10), 4)]


KINDS: dict[str, Callable[[], list[Problem]]] = {
    "add": additions,
    "chain_sum": chain_sums,
    "largest": largest,
    "third": third,
}


class FewShot(PromptSource):
    """Few-shot prompts; records hold `prompt`, `answer` (str), `task` (the kind) and, from reasoning-gym, `entry`.

    Args:
        kinds: any of add, chain_sum (needs reasoning-gym), largest, third; they take turns.
        num: how many prompts. In training a problem comes again, with other solved lines, once all have come.
        split: "val" (25 of each kind, each once), "test" (100 of each kind, each once), or "train": the others.
        shots: solved lines before the unsolved one.
        seed: order of the problems and choice of the solved lines.

    Raises:
        ValueError: an unknown kind, more problems of "val" or "test" than there are, or reasoning-gym is missing.

    Example:
        >>> record = FewShot(kinds=["add"], num=1, shots=2)[0]
        >>> record["prompt"].splitlines()[-1], record["answer"]
        ('5 + 14 =', '19')
    """

    def __init__(
        self,
        kinds: list[str],
        num: int,
        split: Split = "train",
        shots: int = 3,
        seed: int = 0,
    ) -> None:
        _check(kinds, num, split, shots)
        rng = random.Random(f"fewshot/{split}/{seed}")
        shares = [len(range(k, num, len(kinds))) for k in range(len(kinds))]
        columns = [_records(kind, share, split, shots, rng) for kind, share in zip(kinds, shares, strict=True)]
        self._rows = [columns[i % len(kinds)][i // len(kinds)] for i in range(num)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]


class FewShotDemos(FewShot):
    r"""The problems of `FewShot` with their lines finished, to imitate: records also hold `demonstration`.

    Args:
        kwargs: see `FewShot`.

    Example:
        >>> FewShotDemos(kinds=["add"], num=1)[0]["demonstration"]
        ' 19\n'
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rows = [row | {"demonstration": f" {row['answer']}\n"} for row in self._rows]


@cache
def partition(kind: str) -> dict[Split, tuple[Problem, ...]]:
    """The problems of a kind by split: the same for every seed, number and order of kinds."""
    problems = sorted(KINDS[kind](), key=lambda problem: hashlib.sha256(problem.question.encode()).digest())
    test, val = HELD_OUT["test"], HELD_OUT["test"] + HELD_OUT["val"]
    return {"test": tuple(problems[:test]), "val": tuple(problems[test:val]), "train": tuple(problems[val:])}


def _records(kind: str, num: int, split: Split, shots: int, rng: random.Random) -> list[Record]:
    """`num` prompts of one kind: every problem once in random order, then again in another."""
    problems = partition(kind)
    queue: list[Problem] = []
    while len(queue) < num:
        queue += rng.sample(problems[split], len(problems[split]))
    return [_record(kind, problem, problems["train"], shots, rng) for problem in queue[:num]]


def _record(kind: str, problem: Problem, examples: tuple[Problem, ...], shots: int, rng: random.Random) -> Record:
    solved = [example for example in rng.sample(examples, shots + 1) if example is not problem][:shots]
    lines = [f"{example.question} {example.answer}" for example in solved]
    record: Record = {"prompt": "\n".join([*lines, problem.question]), "answer": problem.answer, "task": kind}
    return record if problem.entry is None else record | {"entry": problem.entry}


def _check(kinds: list[str], num: int, split: Split, shots: int) -> None:
    if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be distinct names among {sorted(KINDS)}, got {kinds}")
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    if split not in ("train", *HELD_OUT):
        raise ValueError(f"split must be 'train', 'val' or 'test', got {split!r}")
    if split in HELD_OUT and num > (most := HELD_OUT[split] * len(kinds)):
        raise ValueError(f"num must be at most {most} for {len(kinds)} kinds in {split!r}, got {num}")
    if not 0 <= shots <= 20:
        raise ValueError(f"shots must lie in 0..20, got {shots}")
