"""How many entries of a tensor changed, by how much, and how many of the changes bf16 hides. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlvr_lightning.callbacks.change_counts import DEFINITIONS, bits, count_changed
from rlvr_lightning.callbacks.change_report import as_record
from rlvr_lightning.delta.tensor import positions_cpu

FEW = 1 << 18
"""Changed entries looked at together: bounds the memory where all of them changed."""
SMALLEST, LARGEST = -16, 16
"""Powers of two that the histogram tells apart."""
BINS = ("from zero", "not finite", f"below 2^{SMALLEST}", *(f"2^{k}" for k in range(SMALLEST, LARGEST + 1)))
"""|new - old| in units of the last place of old's bf16: `2^k` counts those from 2^k to below 2^(k+1), the last all
above; those of an old value of exactly 0, whose unit says nothing, and those with an infinity or NaN, apart."""


@dataclass
class Tally:
    """Exact counts over some entries; the sum of two is that of all of them."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(1 + len(DEFINITIONS), 2, dtype=torch.int64))
    """int64 [1 + definitions, 2], as `count_changed` returns them."""
    flips: int = 0
    """Entries that went through zero: positive before and negative now, or the other way round."""
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(len(BINS), np.int64))
    """int64 [BINS]: of entries whose stored bits differ."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.counts + other.counts, self.flips + other.flips, self.histogram + other.histogram)


def tally(old: Tensor, new: Tensor) -> Tally:
    """Count over some entries.

    Args:
        old: [n] values before, on the CPU, contiguous.
        new: [n] values after, of the same dtype.

    >>> one = tally(torch.tensor([1.0, -2.0, 0.0, 3.0]), torch.tensor([1.0, 2.0, 1.0, 3.0 + 2**-8]))
    >>> one.counts[:, 0].tolist(), one.flips, {BINS[i]: int(one.histogram[i]) for i in one.histogram.nonzero()[0]}
    ([4, 2, 2, 3, 3], 1, {'from zero': 1, '2^-2': 1, '2^8': 1})
    """
    found = Tally()
    before, after = bits(old).numpy(), bits(new).numpy()
    found.counts[0, 0] = len(before)
    found.counts[0, 1] = len(before) - int(np.count_nonzero(before << 1))
    # No definition counts an entry whose stored bits are equal, so the others need not be looked at.
    changed = positions_cpu(before, after)
    for first in range(0, len(changed), FEW):
        some = torch.from_numpy(changed[first : first + FEW])
        x, y = old[some], new[some]
        found.counts[1:] += count_changed(x, y, list(DEFINITIONS))[1:]
        wide_x, wide_y = x.double().numpy(), y.double().numpy()
        found.flips += int(
            np.count_nonzero((wide_x < 0) & (wide_y > 0)) + np.count_nonzero((wide_x > 0) & (wide_y < 0))
        )
        found.histogram += _histogram(wide_x, wide_y, x.bfloat16().double().numpy())
    return found


def _histogram(old: np.ndarray, new: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Counts [BINS] of the changes of entries that differ; `half` is old rounded to bf16."""
    finite = np.isfinite(half) & np.isfinite(new)
    zero = finite & (old == 0)
    rest = finite & ~zero
    distance = np.frexp(new[rest] - old[rest])[1] - 1  # floor(log2 |x|)
    binade = np.where(half[rest] == 0, -126, np.frexp(half[rest])[1] - 1)
    power = np.clip(distance - (np.maximum(binade, -126) - 7), SMALLEST - 1, LARGEST)
    found = np.bincount(power - SMALLEST + 3, minlength=len(BINS))
    found[:2] = np.count_nonzero(zero), np.count_nonzero(~finite)
    return found


def as_counts(found: Tally) -> dict[str, Any]:
    """The numbers by name: all integers but what ends in `_frac`.

    The histogram leaves out empty bins. `absorbed` are entries whose stored bits differ and whose bf16 view does not.
    `changed_frac` is of the entries, `absorbed_frac` of those that changed (None if none did).
    """
    record = as_record(found.counts, list(DEFINITIONS))
    entries, changed = record["entries"], record["changed"]
    absorbed = changed["fp32"] - changed["bf16"]
    return record | {
        "sign_flips": found.flips,
        "absorbed": absorbed,
        "ulp_histogram": {name: int(count) for name, count in zip(BINS, found.histogram, strict=True) if count},
        "changed_frac": {name: count / max(entries, 1) for name, count in changed.items()},
        "absorbed_frac": absorbed / changed["fp32"] if changed["fp32"] else None,
    }
