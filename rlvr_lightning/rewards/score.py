"""Weighted sum of rewards that survives a reward that fails."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import traceback
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.schema import Sample


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Rewards of R completions."""

    total: Tensor
    """float32 [R]: sum over parts of weight * part."""
    parts: dict[str, Tensor]
    """float32 [R] for each reward, before weighting; 0 where it failed."""
    failed: int
    """Completions for which some reward failed."""
    answers: list[str | None] = field(default_factory=list)
    """R: what the first reward takes for the answer, None also where that failed; empty if it names no answers."""

    def with_replaced(self, rows: Tensor, new: Scores) -> Scores:
        """These scores with some rows (int64 [n]) exchanged for those of newly sampled completions."""
        rows, answers = rows.cpu(), list(self.answers)
        for row, answer in zip(rows.tolist(), new.answers, strict=bool(answers)):
            answers[row] = answer
        return Scores(
            total=self.total.index_copy(0, rows, new.total),
            parts={name: part.index_copy(0, rows, new.parts[name]) for name, part in self.parts.items()},
            failed=self.failed + new.failed,
            answers=answers,
        )


def score(
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
    samples: Sequence[Sample],
    failures_file: Path | None = None,
) -> Scores:
    """Judge completions by several rewards.

    A reward that raises, or returns too few or too many numbers or one that is not finite, is asked again about one
    completion at a time. Where it fails again that reward counts 0, and the completion is written to `failures_file`.

    Args:
        rewards: the parts, by name.
        weights: of the parts; a part that is not named has weight 1.
        samples: R completions.
        failures_file: JSONL, one line for each failure with the completion and the traceback; appended to.

    Raises:
        ValueError: a weight is not finite, or names no reward.

    Example:
        >>> class Length(Reward):
        ...     def __call__(self, samples):
        ...         return [float(len(s.text)) for s in samples]
        >>> samples = [Sample(prompt="", text=text, token_ids=[], record={}) for text in ("a", "abc")]
        >>> score({"length": Length()}, {"length": -0.5}, samples).total
        tensor([-0.5000, -1.5000])
    """
    check_weights(rewards, weights)
    total = torch.zeros(len(samples), dtype=torch.float32)
    parts: dict[str, Tensor] = {}
    failures: dict[str, dict[int, str]] = {}
    with ThreadPoolExecutor(len(rewards), "reward") as threads:
        judged = threads.map(lambda reward: judge(reward, samples), rewards.values())
    for name, (values, failures[name]) in zip(rewards, judged, strict=True):
        parts[name] = torch.tensor(values, dtype=torch.float32)
        total += weights.get(name, 1.0) * parts[name]
    if failures_file is not None and any(failures.values()):
        record_failures(failures, samples, failures_file)
    failed = len(set().union(*failures.values()))
    return Scores(total=total, parts=parts, failed=failed, answers=stated(next(iter(rewards.values())), samples))


def stated(reward: Reward, samples: Sequence[Sample]) -> list[str | None]:
    """What a reward takes for the answer of each sample, None where it fails; nothing if it names none of them."""
    answers: list[str | None] = []
    named = False
    for sample in samples:
        try:
            named |= reward.names_answers(sample.record)
            answers.append(reward.answer(sample))
        except Exception:  # whatever user code raises
            answers.append(None)
    return answers if named else []


def check_weights(rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
    """Raise ValueError unless there is a reward, and each weight is finite and names one."""
    if not rewards:
        raise ValueError("rewards is empty: name at least one reward")
    for name, weight in weights.items():
        if name not in rewards:
            raise ValueError(f"weights names {name!r}, which is not among the rewards {sorted(rewards)}")
        if not math.isfinite(weight):
            raise ValueError(f"weights.{name} must be a finite number, got {weight}")


def judge(reward: Reward, samples: Sequence[Sample]) -> tuple[list[float], dict[int, str]]:
    """What one reward says: a number for each sample, and the traceback for each sample it failed on."""
    if not samples:
        return [], {}
    try:
        return call(reward, samples), {}
    except Exception:  # whatever user code raises; found again below, by sample
        pass
    values, failures = [0.0] * len(samples), {}
    for i, sample in enumerate(samples):
        try:
            [values[i]] = call(reward, [sample])
        except Exception:
            failures[i] = traceback.format_exc()
    return values, failures


def call(reward: Reward, samples: Sequence[Sample]) -> list[float]:
    """The reward's numbers; ValueError if they are not one finite number for each sample."""
    said = reward(samples)
    if inspect.isawaitable(said):
        said = asyncio.run(_awaited(said))  # in a thread of its own, where no loop runs
    values = [float(value) for value in said]
    if len(values) != len(samples):
        raise ValueError(f"{type(reward).__name__} returned {len(values)} numbers for {len(samples)} completions")
    for value in values:
        if not math.isfinite(value) or abs(value) > torch.finfo(torch.float32).max:
            raise ValueError(f"{type(reward).__name__} returned {value}, which is not a finite float32")
    return values


async def _awaited(said: Awaitable[Sequence[float]]) -> Sequence[float]:
    return await said


def record_failures(failures: Mapping[str, Mapping[int, str]], samples: Sequence[Sample], file: Path) -> None:
    """Append one JSON object a line for each failed completion."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        for name, failed in failures.items():
            for i, error in failed.items():
                sample = samples[i]
                entry = {"reward": name, "error": error, "prompt": sample.prompt, "completion": sample.text}
                more: dict[str, object] = {"token_ids": sample.token_ids, "record": dict(sample.record)}
                lines.write(json.dumps(entry | more, default=repr) + "\n")
