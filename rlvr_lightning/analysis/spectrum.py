"""How far a matrix moved from its spectrum, and which of its entries changed. Pure.

After "The Path Not Taken" (arXiv 2511.08567): updates that keep the spectrum, turn the leading subspaces little, and
avoid the entries that the leading subspaces consist of.
"""

from __future__ import annotations

from math import degrees
from typing import NamedTuple

import torch
from torch import Tensor

from rlvr_lightning.analysis.rank import gram


class Leading(NamedTuple):
    """The leading part of a singular value decomposition, in float64."""

    values: Tensor
    """[min(m, n)] all singular values, descending."""
    left: Tensor
    """[m, k] orthonormal."""
    right: Tensor
    """[n, k] orthonormal; (left * values[:k]) @ right.T is the part of rank k."""


def leading(matrix: Tensor, k: int) -> Leading:
    """Of a matrix [m, n], by the eigenvectors of its smaller Gram matrix in float64."""
    if matrix.shape[0] < matrix.shape[1]:
        values, left, right = leading(matrix.T, k)
        return Leading(values, right, left)
    squares, vectors = torch.linalg.eigh(gram(matrix))
    values = squares.flip(0).clamp(min=0).sqrt()
    right = vectors.flip(1)[:, :k]
    left, lengths = torch.linalg.qr(torch.cat([rows.double() @ right for rows in matrix.split(4096)]))
    return Leading(values, torch.where(lengths.diagonal() < 0, -left, left), right)  # QR is free to turn a column round


def spectral_shift(old: Tensor, new: Tensor) -> float:
    """Norm of the difference of the singular values over the norm of the old ones; 0 of two zero matrices.

    >>> spectral_shift(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 6.5]))
    0.5
    """
    return float((new - old).norm() / old.norm()) if old.any() else float(new.any())


def principal_angles(old: Tensor, new: Tensor) -> Tensor:
    """Angles in degrees between two subspaces, ascending, float64 [k].

    From the cosines where they are large and from the sines where those are (Bjoerck and Golub 1973), so that angles of
    1e-8 are no rounding errors.

    Args:
        old: [n, k] orthonormal.
        new: [n, k] orthonormal.
    """
    cosines = torch.linalg.svdvals(old.T @ new).clamp(max=1)
    sines = torch.linalg.svdvals(new - old @ (old.T @ new)).flip(0).clamp(max=1)
    return torch.where(cosines**2 > 0.5, sines.asin(), cosines.acos()) * degrees(1.0)


def top_mask(scores: Tensor, count: int) -> Tensor:
    """Mask of the entries with the `count` highest scores, exactly so many; ties in favour of the first.

    >>> top_mask(torch.tensor([[1.0, 3.0], [3.0, 2.0]]), 1).int().tolist()
    [[0, 1], [0, 0]]
    """
    flat = scores.reshape(-1)
    mask = torch.zeros(len(flat), dtype=torch.bool)
    if count:
        bar = flat.kthvalue(len(flat) - count + 1).values
        mask |= flat > bar
        mask[(flat == bar).nonzero().squeeze(1)[: count - int(mask.sum())]] = True
    return mask.view(scores.shape)


class Shift(NamedTuple):
    """Of one matrix."""

    k: int
    """Size of the leading subspaces."""
    shift: float
    """See `spectral_shift`."""
    left_degrees: float
    """Largest principal angle between the leading left subspaces."""
    right_degrees: float
    """The same of the right ones."""
    entries: int
    changed: int
    """Entries whose bf16 view differs."""
    chosen: int
    """Entries in each of the two masks."""
    principal: int
    """Changed entries among the largest of the rank-k reconstruction."""
    low: int
    """Changed entries among those of least magnitude."""


def default_k(shape: torch.Size) -> int:
    """A tenth of the shorter side, at least 1."""
    return max(1, min(shape) // 10)


def analyse_matrix(old: Tensor, new: Tensor, k: int | None, share: float) -> Shift:
    """All of it for one matrix.

    Args:
        old: [m, n] before.
        new: [m, n] after.
        k: of the leading subspaces; None is `default_k`; cut to the shorter side.
        share: of the entries that count as principal, and as low.
    """
    k = min(k or default_k(old.shape), *old.shape)
    before, after = leading(old, k), leading(new, k)
    left, right = (
        float(principal_angles(getattr(before, side), getattr(after, side))[-1]) for side in ("left", "right")
    )
    changed = old.bfloat16().view(torch.int16) != new.bfloat16().view(torch.int16)
    chosen = round(share * old.numel())
    part = (before.left * before.values[:k]).float() @ before.right.T.float()
    principal = int((top_mask(part.abs_(), chosen) & changed).sum())
    low = int((top_mask(-old.float().abs(), chosen) & changed).sum())
    shift = spectral_shift(before.values, after.values)
    return Shift(k, shift, left, right, old.numel(), int(changed.sum()), chosen, principal, low)
