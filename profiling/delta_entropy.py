"""How small a delta can be: entropies of its positions and of its values. Numpy only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from rlvr_lightning.delta import SparseDelta
from rlvr_lightning.delta.codec import exponents_of, ordered
from rlvr_lightning.delta.file import signed
from rlvr_lightning.delta.tensor import bits, flat_bits


def binary_entropy_bits(share: float) -> float:
    """Of a coin that falls on one side with this probability.

    >>> binary_entropy_bits(0.5), binary_entropy_bits(1.0)
    (1.0, 0.0)
    """
    return float(sum(p * np.log2(1 / p) for p in (share, 1 - share) if p > 0))


def entropy_bits(counts: np.ndarray) -> float:
    """Of a draw from a distribution given by counts.

    >>> entropy_bits(np.array([2, 1, 1]))
    1.5
    """
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def bounds(delta: SparseDelta, base: Mapping[str, Tensor]) -> dict[str, float]:
    """Bytes per changed entry that no code can beat, by the model of the delta that it works with.

    - `uniform`: positions uniform over the model; distances (in units of the last place) drawn independently.
    - `tensor`: positions uniform within each tensor.
    - `exponent`: positions uniform among the entries of a tensor whose base has one exponent, and distances drawn from
      one distribution per exponent. This is what the file's code is after; its own tables are not counted.
    """
    steps, exponents, by_tensor, by_exponent = [], [], 0.0, 0.0
    for name, entries in delta.items():
        old, dtype = signed(flat_bits(base[name])), entries.values.dtype
        classes, where = exponents_of(old, dtype), entries.indices.numpy()
        sizes, counts = (np.bincount(found, minlength=256) for found in (classes, classes[where]))
        by_tensor += entries.numel * binary_entropy_bits(entries.density)
        by_exponent += sum(n * binary_entropy_bits(k / n) for n, k in zip(sizes, counts, strict=True) if n)
        steps.append(ordered(signed(bits(entries.values)), dtype) - ordered(old[where], dtype))
        exponents.append(classes[where])
    step, exponent = np.concatenate(steps), np.concatenate(exponents)
    total = delta.changed
    values = entropy_bits(np.unique(step, return_counts=True)[1])
    apart = [step[exponent == e] for e in np.unique(exponent)]
    values_by_exponent = sum(entropy_bits(np.unique(s, return_counts=True)[1]) * len(s) for s in apart) / total
    uniform = delta.numel * binary_entropy_bits(delta.density) / total
    return {
        "uniform_positions": uniform / 8,
        "tensor_positions": by_tensor / total / 8,
        "exponent_positions": by_exponent / total / 8,
        "values": values / 8,
        "exponent_values": values_by_exponent / 8,
        "uniform": (uniform + values) / 8,
        "tensor": (by_tensor / total + values) / 8,
        "exponent": (by_exponent / total + values_by_exponent) / 8,
    }
