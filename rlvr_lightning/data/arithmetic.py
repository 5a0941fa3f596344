"""The built-in world: sums worked out one operation at a time, and demonstrations of mixed quality to learn it from.

A problem of level n is a two-digit number followed by n additions or subtractions of one digit; no total on the way
leaves 0..99. It is worked out like this, and only the number after `answer` is judged:

    prompt      47+8-5+9=
    completion  +8=55 -5=50 +9=59 answer 59

The demonstrations are what a mediocre class would hand in. A few of the writers are patient. The others may lose
patience after each step, the sooner the more is left to do, and state the total reached so far as the answer; and
anyone may slip, that is, write a wrong total and go on from it. A model that imitates them well therefore knows how to
do every step and yet gets most long problems wrong, greedily as well as sampled. Reinforcement learning from it elicits
and sharpens a skill that is there; it does not teach arithmetic from nothing. The splits share no problem: which split
a problem is in is a function of the problem.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any, Literal

from rlvr_lightning.data.prompts import PromptSource

Split = Literal["train", "val", "test"]

MARKER = "answer "
MAX_LEVEL = 5


class Arithmetic(PromptSource):
    """Distinct problems; records hold `prompt`, `answer` (int), `level` and `task`.

    Args:
        num: how many problems.
        seed: which problems, and in which order.
        split: of all problems 80 % are "train", 10 % "val", 10 % "test".
        levels: numbers of operations, 1 to 5; the problems are spread evenly over them and take turns.

    Raises:
        ValueError: a level does not exist, or has too few problems for its share of `num`.

    Example:
        >>> Arithmetic(num=2, levels=[3], split="val")[0]
        {'prompt': '56+1-7-6=', 'answer': 44, 'level': 3, 'task': 'arithmetic'}
    """

    def __init__(
        self, num: int, seed: int = 0, split: Split = "train", levels: Sequence[int] = (1, 2, 3, 4, 5)
    ) -> None:
        check_levels(levels, num)
        rng = random.Random(f"arithmetic/{split}/{seed}")
        shares = [len(range(i, num, len(levels))) for i in range(len(levels))]
        columns = [distinct_problems(level, share, rng, split) for level, share in zip(levels, shares, strict=True)]
        self._records = [
            {"prompt": prompt, "answer": totals(prompt)[-1], "level": levels[i % len(levels)], "task": "arithmetic"}
            for i, prompt in ((i, columns[i % len(levels)][i // len(levels)]) for i in range(num))
        ]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return self._records[index]


class ArithmeticDemos(PromptSource):
    """Problems of the "train" split with a demonstration each; problems may repeat, written by someone else.

    Records hold `demonstration` in addition to what `Arithmetic` gives. `answer` is the right one, also where the
    demonstration's is wrong.

    Args:
        num: how many demonstrations.
        seed: which problems and which mistakes.
        slip: chance at each step of writing a wrong total.
        patient: share of demonstrations that never stop early.
        impatience: for the others, chances of stopping early when 1, 2, ... operations are left; the last one serves
            for more.
        levels: numbers of operations, 1 to 5, taking turns.

    Example:
        >>> careful = ArithmeticDemos(num=1, levels=[3], slip=0.0, patient=1.0)[0]
        >>> careful["prompt"], careful["demonstration"]
        ('75-1-4-8=', '-1=74 -4=70 -8=62 answer 62')
        >>> ArithmeticDemos(num=1, levels=[3], slip=0.0, patient=0.0, impatience=[1.0])[0]["demonstration"]
        '-1=74 answer 74'
    """

    def __init__(
        self,
        num: int,
        seed: int = 0,
        slip: float = 0.02,
        patient: float = 0.08,
        impatience: Sequence[float] = (0.35, 0.8, 0.85, 0.9),
        levels: Sequence[int] = (1, 2, 3, 4, 5),
    ) -> None:
        check_levels(levels, num)
        if not impatience or not all(0 <= chance <= 1 for chance in (slip, patient, *impatience)):
            raise ValueError("slip, patient and impatience are chances: give numbers from 0 to 1")
        rng = random.Random(f"demonstrations/{seed}")
        self._records = []
        for i in range(num):
            level = levels[i % len(levels)]
            prompt = draw(level, rng, "train")
            record = {"prompt": prompt, "answer": totals(prompt)[-1], "level": level, "task": "arithmetic"}
            writer = [0.0] if rng.random() < patient else impatience
            self._records.append(record | {"demonstration": demonstrate(prompt, slip, writer, rng)})

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return self._records[index]


def check_levels(levels: Sequence[int], num: int) -> None:
    """Raise ValueError unless the levels exist, once each, and something is asked for."""
    if not levels or len(set(levels)) < len(levels) or not all(1 <= level <= MAX_LEVEL for level in levels):
        raise ValueError(f"levels must be distinct numbers from 1 to {MAX_LEVEL}, got {list(levels)}")
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")


def distinct_problems(level: int, num: int, rng: random.Random, split: Split) -> list[str]:
    """Prompts of one level, none twice, in the order drawn."""
    found: dict[str, None] = {}
    misses = 0
    while len(found) < num:
        before = len(found)
        found[draw(level, rng, split)] = None
        misses = misses + 1 if len(found) == before else 0
        if misses > 2000:
            raise ValueError(f"num is too large: level {level} has about {len(found)} problems in {split!r}, not {num}")
    return list(found)


def draw(level: int, rng: random.Random, split: Split) -> str:
    """A random prompt of a level and split, such as `47+8-5=`."""
    while True:
        total = rng.randint(10, 99)
        prompt = str(total)
        for _ in range(level):
            change = rng.choice([c for c in range(-9, 10) if c and 0 <= total + c <= 99])
            total += change
            prompt += f"{change:+d}"
        prompt += "="
        if split_of(prompt) == split:
            return prompt


def split_of(prompt: str) -> Split:
    """The split a problem belongs to, from a hash of its text.

    Example:
        >>> [split_of(f"{start}+1=") for start in (19, 20, 21, 22)]
        ['train', 'val', 'train', 'test']
    """
    part = hashlib.sha256(prompt.encode()).digest()[0] % 10  # 256 is not a multiple of 10: a bias of 1 % or less
    return "val" if part == 0 else "test" if part == 1 else "train"


def changes(prompt: str) -> list[int]:
    """The signed digits of a prompt: `47+8-5=` gives [8, -5]."""
    return [int(prompt[at : at + 2]) for at in range(2, len(prompt) - 1, 2)]


def totals(prompt: str) -> list[int]:
    """The number a prompt starts with and the total after each operation.

    Example:
        >>> totals("47+8-5=")
        [47, 55, 50]
    """
    reached = [int(prompt[:2])]
    for change in changes(prompt):
        reached.append(reached[-1] + change)
    return reached


def demonstrate(prompt: str, slip: float, impatience: Sequence[float], rng: random.Random) -> str:
    """A completion as one of the demonstrators would write it."""
    total = int(prompt[:2])
    todo = changes(prompt)
    steps = []
    for left, change in zip(reversed(range(len(todo))), todo, strict=True):
        total += change
        if rng.random() < slip:
            total = rng.choice([t for t in (total - 10, total - 1, total + 1, total + 10) if 0 <= t <= 99])
        steps.append(f"{change:+d}={total} ")
        if left and rng.random() < impatience[min(left, len(impatience)) - 1]:
            break
    return "".join(steps) + f"{MARKER}{total}"
