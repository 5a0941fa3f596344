"""How many of the entries that two runs changed are the same, and how many would be by chance. Pure.

By chance: the entries that the second run changed are drawn anew in each tensor, as many as they were, all choices
equally likely. The overlap of a tensor then follows the hypergeometric law, and that of several tensors the
convolution of their laws: what a permutation test would sample is computed, to rounding.

That is not all that chance does. A small weight has a small unit in the last place, so that any update changes its bf16
bits more easily, and two random updates change the same small weights. Drawn anew among the entries of equal exponent
in the base, tensor by tensor, masks keep that: overlap above this level is not of rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any, NamedTuple

import numpy as np

REACH = 12
"""Standard deviations to each side of the mean that are computed; what lies beyond is below 1e-30."""
LEVEL = 0.95


class Counts(NamedTuple):
    """Of one tensor."""

    entries: int
    first: int
    """Entries that A changed."""
    second: int
    """Entries that B changed."""
    both: int
    expected_equal: float = 0.0
    """Mean of the overlap if B's entries are drawn among those of equal exponent, as many of each as they were."""


EXPONENTS = 256


def exponents(base: np.ndarray) -> np.ndarray:
    """Of bf16 values.

    Args:
        base: int16 [n], their bits.
    """
    return (base >> 7) & 0xFF


class Tally:
    """Counts of a tensor, exponent by exponent, as its pieces come."""

    def __init__(self) -> None:
        self.counts = np.zeros((4, EXPONENTS), np.int64)

    def add(self, base: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
        """Some entries: bits of their bf16 views, int16 [n], in the base, in A and in B."""
        of = exponents(base)
        changed = first != base, second != base
        for row, mask in zip(self.counts[1:], (*changed, changed[0] & changed[1]), strict=True):
            row += np.bincount(of[mask], minlength=EXPONENTS)
        self.counts[0] += np.bincount(of, minlength=EXPONENTS)

    def total(self) -> Counts:
        """Of all entries so far."""
        n, a, b, _ = self.counts.astype(np.float64)
        entries, first, second, both = map(int, self.counts.sum(1))
        return Counts(entries, first, second, both, float((a * b / np.maximum(n, 1)).sum()))


def hypergeometric(one: Counts) -> tuple[int, np.ndarray]:
    """The law of the overlap by chance: the smallest value, and float64 probabilities of it and those that follow.

    >>> hypergeometric(Counts(4, 2, 2, 0))[1].round(6).tolist()
    [0.166667, 0.666667, 0.166667]
    """
    n, a, b = one.entries, one.first, one.second
    mean, variance = moments(one)
    reach = REACH * (isqrt(int(variance)) + 1)
    low, high = max(0, a + b - n, int(mean) - reach), min(a, b, int(mean) + reach)
    k = np.arange(low, high, dtype=np.float64)
    # p(k + 1) / p(k), whose product from the smallest on is stable in logarithms
    steps = np.log(a - k) + np.log(b - k) - np.log(k + 1) - np.log(n - a - b + k + 1)
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    weights = np.exp(logs - logs.max())
    return low, weights / weights.sum()


def moments(one: Counts) -> tuple[float, float]:
    """Mean and variance of the overlap by chance."""
    n, a, b = one.entries, one.first, one.second
    mean = a * b / n if n else 0.0
    return mean, mean * (n - a) * (n - b) / (n * (n - 1)) if n > 1 else 0.0


def chance_interval(counts: Sequence[Counts]) -> tuple[int, int]:
    """Holds 95 % of the summed overlap by chance: at most 2.5 % lie below it, and at most 2.5 % above."""
    laws = [hypergeometric(one) for one in counts]
    mean = sum(moments(one)[0] for one in counts)
    spread = REACH * (isqrt(int(sum(moments(one)[1] for one in counts))) + 1)
    start = max(sum(low for low, _ in laws), int(mean) - spread)
    length = 2 * spread + 3
    # Sums wrap around modulo `length`, within which all but nothing of the mass lies; so does each law.
    product = np.ones(length // 2 + 1, dtype=np.complex128)
    for low, law in laws:
        wrapped = np.bincount((low + np.arange(len(law))) % length, weights=law, minlength=length)
        product *= np.fft.rfft(wrapped)
    total = np.fft.irfft(product, length)[(start + np.arange(length)) % length].clip(min=0)
    below = np.cumsum(total / total.sum())
    tail = (1 - LEVEL) / 2
    return start + int(np.searchsorted(below, tail)), start + int(np.searchsorted(below, 1 - tail))


def summarise(counts: Sequence[Counts]) -> dict[str, Any]:
    """Overlaps of some tensors together, and what chance gives.

    `a_in_b` is the share of A's entries that B changed too, by chance (`density_b`) B's density; `b_in_a` the other way
    round. `jaccard` is the share of both in either. `expected` and `interval` are the mean and a 95 % interval of the
    overlap by chance with the counts of every tensor as they are; the `*_by_chance` are the same as shares.
    `expected_equal` is the mean by chance among entries of equal exponent, `*_equal` the same as shares.
    """
    entries, first, second, both, equal = (sum(column) for column in zip(*counts, strict=True))
    expected = sum(moments(one)[0] for one in counts)
    low, high = chance_interval(counts)

    def share(of: float, whole: float) -> float | None:
        return of / whole if whole else None

    by_chance = (low, expected, high)
    return {
        "entries": entries,
        "changed_a": first,
        "changed_b": second,
        "both": both,
        "density_a": share(first, entries),
        "density_b": share(second, entries),
        "a_in_b": share(both, first),
        "b_in_a": share(both, second),
        "jaccard": share(both, first + second - both),
        "expected": expected,
        "interval": [low, high],
        "a_in_b_by_chance": [share(value, first) for value in by_chance],
        "b_in_a_by_chance": [share(value, second) for value in by_chance],
        "jaccard_by_chance": [share(value, first + second - value) for value in by_chance],
        "expected_equal": equal,
        "a_in_b_equal": share(equal, first),
        "b_in_a_equal": share(equal, second),
        "jaccard_equal": share(equal, first + second - equal),
    }
