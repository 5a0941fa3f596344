"""What is measured of completions and of problems: torchmetrics metrics, the same on one rank and on many."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from rlvr_lightning.estimates import interval, majority_at_k, pass_at_k
from rlvr_lightning.ranks import Ranks
from rlvr_lightning.rewards.score import Scores
from rlvr_lightning.schema import Rollouts

PER_TOKEN = {
    "ratio_mean": "ratio",
    "clip_frac": "clipped",
    "entropy": "entropy",
    "rollout_kl": "rollout_kl",
    "kl": "kl",
    "kl_k1": "kl_k1",
    "kl_k2": "kl_k2",
    "rollout_gap": "rollout_gap",
    "corrected_frac": "corrected",
}
"""Metrics that are means over the tokens that went through the model, and the sums they are made of; `kl` is k3."""
MAXIMA = ("rollout_gap_max",)
"""Largest values over such tokens."""


def over(ranks: Ranks) -> dict[str, Any]:
    """Arguments of a metric that some ranks compute together, each with its share; without, all ranks of torch do."""

    def gather(tensor: Tensor, group: Any = None) -> list[Tensor]:
        everyones = ranks.gather(tensor.tolist())  # a pickled tensor takes 400 bytes more than its numbers
        return [torch.tensor(values, dtype=tensor.dtype) for values in everyones]

    return {"dist_sync_fn": gather, "distributed_available_fn": lambda: ranks.size > 1}


class _Exact(Metric):
    """A metric whose sums and counts are in double precision."""

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.set_dtype(torch.float64)


class TokenMeans(_Exact):
    """`policy/...`: means over all tokens that went through the model.

    Args:
        kwargs: of torchmetrics' Metric; see `over`.

    Example:
        >>> metric = TokenMeans()
        >>> metric.update({"tokens": 2.0, "ratio": 2.0})
        >>> metric.update({"tokens": 6.0, "ratio": 8.0})
        >>> metric.compute()
        {'policy/ratio_mean': 1.25}
    """

    sums: Tensor
    largest: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(2, len(PER_TOKEN), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("largest", torch.full((len(MAXIMA),), -torch.inf, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, sums: Mapping[str, float]) -> None:
        """Add sums over `tokens` tokens (see `PER_TOKEN`); what is not among them is not measured."""
        for column, key in enumerate(PER_TOKEN.values()):
            if key in sums:
                self.sums[:, column] += torch.tensor([sums[key], sums["tokens"]], dtype=torch.float64)
        found = torch.tensor([sums.get(name, -torch.inf) for name in MAXIMA], dtype=torch.float64)
        self.largest = torch.maximum(self.largest, found)

    def compute(self) -> dict[str, float]:
        """By name; without what no token had."""
        pairs = zip(PER_TOKEN, self.sums.T.tolist(), strict=True)
        means = {f"policy/{name}": total / tokens for name, (total, tokens) in pairs if tokens}
        maxima = zip(MAXIMA, self.largest.tolist(), strict=True)
        return means | {f"policy/{name}": value for name, value in maxima if value > -torch.inf}


class RolloutMetrics(_Exact):
    """`reward/...` and `response/...`: of a batch of rollouts and what they earned.

    Args:
        kwargs: of torchmetrics' Metric; see `over`.
    """

    completions: list[Tensor]
    groups: list[Tensor]
    failed: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parts: list[str] = []
        self.add_state("completions", [], dist_reduce_fx="cat")  # rows, flattened: a rank may have none
        self.add_state("groups", [], dist_reduce_fx="cat")
        self.add_state("failed", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rollouts: Rollouts, scores: Scores, signal: Tensor) -> None:
        """Add the rollouts of one rank, whole groups; every rank's scores have the same parts.

        Args:
            rollouts: of P prompts, R completions.
            scores: of these.
            signal: bool [P], groups with something to learn from; not looked at where groups are of one.
        """
        self.parts = list(scores.parts)
        columns = [scores.total, rollouts.lengths.cpu(), rollouts.truncated.cpu(), *scores.parts.values()]
        self.completions.append(torch.stack([column.double() for column in columns], 1).flatten())
        group = rollouts.group
        distinct = torch.full((len(rollouts.prompt_ids),), torch.nan, dtype=torch.float64)
        for prompt in range(len(distinct) if scores.answers else 0):
            answers = set(scores.answers[prompt * group : (prompt + 1) * group]) - {None}
            distinct[prompt] = len(answers)
        known = signal.cpu().double() if group > 1 else torch.full_like(distinct, torch.nan)
        self.groups.append(torch.stack([known, distinct], 1).flatten())
        self.failed += scores.failed

    def compute(self) -> dict[str, float]:
        """By name.

        Of groups: `reward/no_signal_frac` where they have several completions, and `response/distinct_answers`, a mean,
        where the first reward names answers.
        """
        total, length, truncated, *parts = dim_zero_cat(self.completions).view(-1, 3 + len(self.parts)).T
        signal, distinct = dim_zero_cat(self.groups).view(-1, 2).T
        metrics = {
            "reward/mean": total.mean(),
            "response/length_mean": length.mean(),
            "reward/std": total.std(),
            "reward/failed": self.failed,
            "response/truncated_frac": truncated.mean(),
        } | {f"reward/{name}": values.mean() for name, values in zip(self.parts, parts, strict=True)}
        if not signal.isnan().any():
            metrics["reward/no_signal_frac"] = 1 - signal.mean()
        if not distinct.isnan().any():
            metrics["response/distinct_answers"] = distinct.mean()
        return {name: float(value) for name, value in metrics.items()}


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """Completions of one problem, drawn in the same way."""

    correct: list[bool]
    lengths: list[int]
    """Tokens."""
    truncated: list[bool]
    answers: list[str | None] = field(default_factory=list)
    """What each states; empty if the verifier names no answers."""


class Estimate(NamedTuple):
    """A mean over problems, and where it lies with 95 % confidence."""

    mean: float
    low: float
    high: float
    problems: int


class ProblemMean(_Exact):
    """Mean over problems of a value of each, with a bootstrap interval over the problems.

    Args:
        kwargs: of torchmetrics' Metric; see `over`.
    """

    numbered: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("numbered", [], dist_reduce_fx="cat")  # pairs, flattened: a rank may have none

    @abstractmethod
    def value(self, attempts: Attempts) -> float:
        """Of one problem."""

    def update(self, numbers: Sequence[int], problems: Sequence[Attempts]) -> None:
        """Add problems.

        Args:
            numbers: a different one for each problem, whatever the number of ranks: they fix the order of resampling.
            problems: the attempts at each.
        """
        pairs = [(float(number), self.value(each)) for number, each in zip(numbers, problems, strict=True)]
        self.numbered.append(torch.tensor(pairs, dtype=torch.float64).flatten())

    def compute(self) -> Estimate:
        """Over the problems of all ranks, of which there must be one."""
        numbers, values = dim_zero_cat(self.numbered).view(-1, 2).T
        values = values[numbers.argsort()]
        return Estimate(float(values.mean()), *interval(values), len(values))


class PassAtK(ProblemMean):
    """Chance that one of k attempts is right; k = 1 is the mean over attempts. See `estimates.pass_at_k`.

    Example:
        >>> metric = PassAtK(k=2)
        >>> tries = [[True, False, False, False], [True, True, True, True]]
        >>> metric.update([0, 1], [Attempts(correct=each, lengths=[1] * 4, truncated=[False] * 4) for each in tries])
        >>> metric.compute()
        Estimate(mean=0.75, low=0.5, high=1.0, problems=2)
    """

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = k

    def value(self, attempts: Attempts) -> float:
        """The unbiased estimate."""
        return pass_at_k(sum(attempts.correct), len(attempts.correct), self.k)


class MajorityAtK(ProblemMean):
    """Whether the most frequent answer of k attempts is right: see `estimates.majority_at_k`."""

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = k

    def value(self, attempts: Attempts) -> float:
        """Mean over runs of k attempts."""
        return majority_at_k(attempts.answers, attempts.correct, self.k)


class MeanLength(ProblemMean):
    """Tokens of a completion."""

    def value(self, attempts: Attempts) -> float:
        """Mean over attempts."""
        return mean(attempts.lengths)


class TruncatedShare(ProblemMean):
    """Completions cut by the length limit."""

    def value(self, attempts: Attempts) -> float:
        """Share of the attempts."""
        return mean(map(float, attempts.truncated))


def summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sums by name, of names in `_max` the largest; a name that is missing somewhere counts 0 there.

    >>> summed([{"a": 1.0, "c_max": 5.0}, {"a": 2.0, "b": 3.0, "c_max": 4.0}])
    {'a': 3.0, 'c_max': 5.0, 'b': 3.0}
    """
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            before = total.get(name, 0.0)
            total[name] = max(before, value) if name.endswith("_max") else before + value
    return total
