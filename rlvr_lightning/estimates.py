"""Estimates from repeated attempts at problems, and how sure they are. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import torch
from torch import Tensor

RESAMPLES = 10_000  # for p-values
BOUNDED = 2_000  # for intervals: their bounds are within a few per cent of their width
CONFIDENCE = 0.95
_DRAWN_AT_ONCE = 1 << 22  # entries; bounds memory


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Chance that one of k attempts is right, without bias from `samples` >= k of which `correct` were.

    1 - C(samples - correct, k) / C(samples, k), as the product that neither overflows nor cancels (Chen et al. 2021,
    arXiv 2107.03374, eq. 1).

    Raises:
        ValueError: k is not from 1 to `samples`.

    Example:
        >>> pass_at_k(correct=1, samples=4, k=2), pass_at_k(3, 4, 2), pass_at_k(0, 4, 2), pass_at_k(1, 4, 1)
        (0.5, 1.0, 0.0, 0.25)
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to the {samples} samples, got {k}")
    missed = 1.0
    for i in range(samples - correct + 1, samples + 1):
        missed *= 1 - k / i
    return 1 - missed


def majority(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Whether the most frequent answer is right.

    Attempts without an answer do not vote; if none has one, that is wrong. A tie is the share of the tied answers that
    are right: what drawing one of them gives on average.

    Args:
        answers: of each attempt; equal ones are the same text.
        correct: of each attempt.

    Example:
        >>> majority(["4", "5", "4", None], [True, False, True, False])
        1.0
        >>> majority(["4", "5", "6"], [True, False, False]), majority([None], [False])
        (0.3333333333333333, 0.0)
    """
    votes: dict[str, list[bool]] = {}
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(right)
    most = max(map(len, votes.values()), default=0)
    tied = [rights for rights in votes.values() if len(rights) == most]
    return sum(sum(rights) / most for rights in tied) / len(tied) if tied else 0.0


def majority_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Mean of `majority` over the runs of k attempts, in their order; those that are left over are not used.

    Example:
        >>> majority_at_k(["1", "1", "2", "1", "3"], [True, True, False, True, False], k=2)
        0.75
    """
    runs = range(0, len(answers) - k + 1, k)
    return sum(majority(answers[at : at + k], correct[at : at + k]) for at in runs) / len(runs)


def resampled_means(values: Tensor, seed: int = 0, num: int = RESAMPLES) -> Tensor:
    """Means of `num` samples drawn from float64 values [n] with repetition, as many as there are: float64 [num]."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _DRAWN_AT_ONCE // len(values))
    parts = [
        values[torch.randint(len(values), (min(rows, num - at), len(values)), generator=generator)].mean(1)
        for at in range(0, num, rows)
    ]
    return torch.cat(parts)


def interval(values: Tensor, seed: int = 0) -> tuple[float, float]:
    """Where the mean of values [n] lies with 95 % confidence: percentiles of the bootstrap over them.

    Example:
        >>> interval(torch.tensor([1.0, 1.0]))
        (1.0, 1.0)
        >>> low, high = interval(torch.tensor([0.0, 1.0]).repeat(50))
        >>> round(low, 2), round(high, 2)  # 0.5 +- 1.96 * 0.5 / sqrt(100)
        (0.4, 0.6)
    """
    tail = (1 - CONFIDENCE) / 2
    bounds = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = resampled_means(values.double(), seed, BOUNDED).quantile(bounds).tolist()
    return low, high


def paired_p(differences: Tensor, seed: int = 0) -> float:
    """Two-sided p-value of the mean of differences [n] being 0, by a bootstrap of the differences less their mean.

    (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 16.) Few differences say little, however
    alike: with m of them not 0 it is never below 2 ** (1 - m), the chance of m fair coins falling all on one side.

    Example:
        >>> paired_p(torch.zeros(7)), paired_p(torch.tensor([1.0, -1.0])), paired_p(torch.tensor([0.0, 0.5, 0.5]))
        (1.0, 1.0, 0.5)
        >>> paired_p(torch.ones(20)) < 0.001
        True
    """
    differences = differences.double()
    mean = differences.mean()
    means = resampled_means(differences - mean, seed)
    extreme = int((means.abs() >= mean.abs() - 1e-12).sum())  # what is equal may differ in the last bit
    least = 2.0 ** (1 - int((differences != 0).sum()))
    return min(1.0, max((1 + extreme) / (1 + len(means)), least))


def mcnemar_p(only_one: int, only_other: int) -> float:
    """Two-sided exact p-value of two answerers being equally good (McNemar 1947, by the binomial distribution).

    Args:
        only_one: problems that the one got right and the other wrong.
        only_other: the reverse. What both got right or both wrong says nothing.

    Example:
        >>> mcnemar_p(0, 0), mcnemar_p(3, 3), mcnemar_p(0, 6), mcnemar_p(2, 10)
        (1.0, 1.0, 0.03125, 0.03857421875)
    """
    total, fewer = only_one + only_other, min(only_one, only_other)
    return min(1.0, 2 * sum(comb(total, i) for i in range(fewer + 1)) / 2**total)
