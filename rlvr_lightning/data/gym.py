"""Problems that reasoning-gym makes: any of its tasks, mixed by weight."""

from __future__ import annotations

import difflib
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rlvr_lightning.data.prompts import ListedPrompts, Record
from rlvr_lightning.data.wording import Wording
from rlvr_lightning.rewards.tasks import reasoning_gym, refuse_evaluation
from rlvr_lightning.seeds import derive_seed

TEMPLATE = "{problem}\nThink first, then give the answer alone in <answer> tags, as in <answer>42</answer>."


@dataclass(frozen=True, kw_only=True)
class GymTask:
    """How often a task is drawn, and how it is made."""

    weight: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)
    """Passed on to the task, such as `min_terms: 2` for chain_sum."""


class GymPrompts(ListedPrompts):
    """Records with `prompt`, `problem`, `answer`, `task` (its name) and `entry`, by which `TaskReward` has it judged.

    Reward: `class_path: rlvr_lightning.rewards.tasks.TaskReward, init_args: {extract: tag}`. Another seed gives other
    draws, but small tasks have few problems: let `data.cleaning` look for training problems among those to test on.

    Args:
        tasks: weight by name of the task, as in `{chain_sum: 1, gcd: 2}`, or its weight and its settings, as in
            `{chain_sum: {weight: 1, settings: {min_terms: 2}}}`.
        num: how many problems in all; each is of a task drawn by weight.
        seed: of the draws.
        wording: how a problem becomes a prompt; its template, if it has one, takes the place of one with answer tags.

    Raises:
        ValueError: an unknown task, a setting it does not have, a weight that is not positive, or reasoning-gym is
            missing.

    Example:
        >>> problems = GymPrompts(tasks={"chain_sum": 3, "leg_counting": 1}, num=40)
        >>> sorted({record["task"] for record in problems})
        ['chain_sum', 'leg_counting']
    """

    def __init__(
        self,
        tasks: dict[str, float | GymTask],
        num: int,
        seed: int = 0,
        wording: Wording = Wording(),  # noqa: B008 (frozen)
    ) -> None:
        wanted = {name: each if isinstance(each, GymTask) else GymTask(weight=each) for name, each in tasks.items()}
        check_tasks(wanted, num)
        rng = random.Random(f"gym/{seed}")
        names = rng.choices(list(wanted), weights=[task.weight for task in wanted.values()], k=num)
        made = {
            name: iter(make(name, count, derive_seed(seed, "gym", name), wanted[name].settings))
            for name, count in Counter(names).items()
        }
        entries = [next(made[name]) for name in names]
        prompts = wording.prompts([entry["question"] for entry in entries], TEMPLATE)
        records: list[Record] = [
            {"prompt": prompt, "problem": entry["question"], "answer": entry["answer"], "task": name, "entry": entry}
            for prompt, entry, name in zip(prompts, entries, names, strict=True)
        ]
        super().__init__(records)


def make(name: str, count: int, seed: int, settings: dict[str, Any]) -> Any:
    """`count` entries of a task; ValueError for settings that it refuses."""
    try:
        # numpy, which some tasks draw with, takes seeds of 32 bits
        return reasoning_gym().create_dataset(name, size=count, seed=seed % 2**31, **settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"tasks.{name}.settings: {str(error) or 'refused'}") from None


def check_tasks(tasks: dict[str, GymTask], num: int) -> None:
    """Raise ValueError unless all tasks exist, their weights are positive, and problems are asked for."""
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    if not tasks:
        raise ValueError("tasks is empty: name at least one task of reasoning-gym")
    reasoning_gym()
    from reasoning_gym.factory import DATASETS

    for name, task in tasks.items():
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=3)
            raise ValueError(f"tasks: reasoning-gym has no {name!r}; near are {', '.join(near or sorted(DATASETS))}")
        refuse_evaluation(name)
        if not 0 < task.weight < float("inf"):
            raise ValueError(f"tasks.{name}: the weight must be a positive number, got {task.weight}")
