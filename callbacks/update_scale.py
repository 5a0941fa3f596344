"""How large updates are beside the spacing of bfloat16, and other sums over sampled entries that add up. Pure.

Everything here is a vector of sums or of counts in fixed bins, so that those of several processes add up to the whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

PER_OCTAVE = 8
"""Bins in a factor of two: a quantile read from them is right within 1/8 octave, 9 %."""
LOW, HIGH = -80, 48
"""Octaves covered, from 2**-80 to 2**48; what lies outside counts in the first or the last bin."""
BINS = PER_OCTAVE * (HIGH - LOW)
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


def half_unit_log2(weight: Tensor) -> Tensor:
    """Log2 of half a unit in the last place of each weight rounded to bfloat16, which has 8 significant bits.

    An update below it is lost when the weight is rounded to nearest, unless the weight is a power of two and shrinks.

    Args:
        weight: float [n]; 0 is spaced like the smallest normal number.

    Returns:
        float32 [n].

    >>> half_unit_log2(torch.tensor([1.0, 1.99, -0.5, 0.0])).tolist()  # 1.99 is 1.9921875 as bfloat16
    [-8.0, -8.0, -9.0, -134.0]
    """
    _, exponent = torch.frexp(weight.to(torch.bfloat16).float())  # of a mantissa in [0.5, 1)
    exponent = torch.where(weight.to(torch.bfloat16) == 0, -125, exponent)
    return (exponent.clamp_min(-125) - 9).float()


def log2_histogram(log2: Tensor) -> Tensor:
    """Counts in bins of 1/8 octave.

    Args:
        log2: float [n], finite.

    Returns:
        int64 [BINS].
    """
    where = ((log2 - LOW) * PER_OCTAVE).floor().clamp(0, BINS - 1).long()
    return torch.bincount(where, minlength=BINS)


def quantiles(histogram: Tensor) -> dict[str, float] | None:
    """Quantiles of what was counted, each the geometric middle of its bin; None of nothing.

    >>> found = quantiles(log2_histogram(torch.log2(torch.tensor([1.0, 4.0, 4.0]))))
    >>> [round(found[name], 2) for name in ("0.1", "0.5")]
    [1.04, 4.18]
    """
    total = int(histogram.sum())
    if not total:
        return None
    below = histogram.cumsum(0)
    ranks = torch.tensor([max(1, math.ceil(q * total)) for q in QUANTILES])
    bins = torch.searchsorted(below, ranks).tolist()
    return {f"{q:g}": 2.0 ** (LOW + (at + 0.5) / PER_OCTAVE) for q, at in zip(QUANTILES, bins, strict=True)}


def octaves(histogram: Tensor) -> dict[str, int]:
    """Counts by octave, without empty ones: of key k, what lies in [2**k, 2**(k + 1)).

    >>> octaves(log2_histogram(torch.tensor([0.0, 0.9, -3.5])))
    {'-4': 1, '0': 2}
    """
    by_octave = histogram.view(-1, PER_OCTAVE).sum(1).tolist()
    return {str(LOW + k): count for k, count in enumerate(by_octave) if count}


COUNTS = ("entries", "no_gradient", "no_update", "below_half_unit", "changed_bf16", "unknown_update")


def update_counts(old: Tensor, new: Tensor, update: Tensor, grad: Tensor) -> Tensor:
    """What became of updates.

    Args:
        old: float [n], the weights before the step, as they are stored.
        new: float [n], and after it.
        update: float [n], what the step wanted to add to the exact weight; NaN where that is not known.
        grad: float [n].

    Returns:
        int64 [COUNTS + BINS]: entries, those with a gradient of 0, with an update of 0, with one below half a unit in
        the last place of the bfloat16 weight, those whose bfloat16 value changed, and those whose update is NaN; then
        the histogram of |update| / half a unit, of updates that are not 0 and finite.
    """
    size = update.abs()
    moved = (size > 0) & size.isfinite()
    log2 = size[moved].log2() - half_unit_log2(old[moved])
    before, after = (value.to(torch.bfloat16).view(torch.int16) for value in (old, new))
    found = [torch.tensor(update.numel()), (grad == 0).sum(), (size == 0).sum(), (log2 < 0).sum()]
    counts = torch.stack([count.to(old.device) for count in (*found, (before != after).sum(), update.isnan().sum())])
    return torch.cat([counts, log2_histogram(log2)])


def update_record(counts: Tensor) -> dict[str, Any]:
    """Names for what `update_counts` returns, with the share absorbed of the known updates that are not 0."""
    named = dict(zip(COUNTS, counts[: len(COUNTS)].tolist(), strict=True))
    histogram = counts[len(COUNTS) :]
    moved = named["entries"] - named["no_update"] - named["unknown_update"]
    share = named["below_half_unit"] / moved if moved else None
    return named | {"absorbed_frac": share, "over_half_unit": quantiles(histogram), "octaves": octaves(histogram)}


def moments(momentum: Tensor, grad: Tensor) -> Tensor:
    """What their cosine is made of: float64 [3], the products of momentum and gradient with each other and themselves.

    >>> cosine(moments(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])))
    0.6
    """
    m, g = momentum.double(), grad.double()
    return torch.stack([m @ g, m @ m, g @ g])


def cosine(sums: Tensor) -> float | None:
    """The cosine from `moments`; None where one of both is 0."""
    product, first, second = sums.tolist()
    return product / math.sqrt(first * second) if first > 0 and second > 0 else None


def spread_sums(root: Tensor) -> Tensor:
    """Of numbers >= 0: float64 [3 + BINS], how many, their sum, the sum of squares; then the histogram of all but 0."""
    wide = root.double()
    sums = torch.stack([torch.tensor(float(len(wide)), device=wide.device, dtype=wide.dtype), wide.sum(), wide @ wide])
    return torch.cat([sums, log2_histogram(root[root > 0].log2()).double()])


def spread_record(sums: Tensor) -> dict[str, Any] | None:
    """Mean, standard deviation over entries, and quantiles of those that are not 0; None of nothing.

    >>> record = spread_record(spread_sums(torch.tensor([1.0, 3.0, 0.0])))
    >>> round(record["mean"], 4), round(record["std"], 4), record["zeros"]
    (1.3333, 1.2472, 1)
    """
    number, total, squares = sums[:3].tolist()
    if not number:
        return None
    histogram = sums[3:].long()
    mean = total / number
    variance = max(squares / number - mean * mean, 0.0)
    zeros = int(number) - int(histogram.sum())
    return {"mean": mean, "std": math.sqrt(variance), "zeros": zeros, "quantiles": quantiles(histogram)}
