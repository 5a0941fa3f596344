"""Of what rank a matrix is: exactly for small ones, with certified bounds from a random sketch for large ones. Pure."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ENERGY = 0.99
"""Share of the squared spectrum that the effective rank holds."""
SMALL = 1024
"""Matrices whose shorter side is no longer are always decomposed exactly."""
FIRST_SKETCH = 64
PAYS = 16
"""Sketches of more than one column in so many cost as much as the exact decomposition."""
POWER_ITERATIONS = 2
ROUNDING = 1e-5
"""Share of the squared norm by which float32 may misstate what a sketch leaves."""
ROWS = 4096
"""Rows taken to float64 at a time."""


class Bounds(NamedTuple):
    """A number that is known exactly (`low == high`), or to lie in an interval, ends included."""

    low: float
    high: float


class Ranks(NamedTuple):
    """Of one matrix."""

    full: int
    """The shorter side: no rank is higher."""
    matrix: Bounds
    """Singular values above max(m, n) * eps(float32) * the largest: the default of `torch.linalg.matrix_rank`."""
    effective: Bounds
    """The fewest singular values that hold 99 % of the sum of their squares."""
    stable: Bounds
    """Sum of the squared singular values over the largest of the squares."""
    sketch: int
    """Columns of the random sketch; 0 if the spectrum is exact."""


def gram(matrix: Tensor) -> Tensor:
    """matrix.T @ matrix of the shorter side, in float64.

    Args:
        matrix: [m, n] with m >= n, of any dtype; 4096 of its rows are cast at a time.
    """
    result = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    for rows in matrix.split(ROWS):
        wide = rows.double()
        result.addmm_(wide.T, wide)
    return result


def squares(matrix: Tensor) -> Tensor:
    """Squared singular values, descending, float64 [min(m, n)].

    They are eigenvalues of the smaller Gram matrix in float64: exact to 1e-16 of the largest, so that singular values
    are to 1e-8 of the largest, where those of a float32 decomposition are to 1e-7.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(gram(tall)).flip(0).clamp_(min=0)


def ranks(matrix: Tensor, generator: torch.Generator | None = None) -> Ranks:
    """Ranks of a matrix.

    A large one is first sketched (Halko, Martinsson and Tropp 2011, algorithm 4.4): an orthonormal basis Q of what the
    matrix makes of random vectors, B = Q.T A. The squared Frobenius norm r2 of what is left, A - Q B, is known, and
    bounds what the sketch can have missed: for all i and k,

        s_i(B)^2 <= s_i(A)^2 <= s_i(B)^2 + r2,    sum_k s_i(B)^2 <= sum_k s_i(A)^2 <= sum_k s_i(B)^2 + r2

    (Weyl's and Ky Fan's inequalities on A.T A = B.T B + (A - Q B).T (A - Q B)). The sketch is doubled until the
    effective rank is known to 5 %; when it would be a sixteenth of the matrix, the exact decomposition costs no more.

    Args:
        matrix: [m, n], finite.
        generator: of the random vectors.

    >>> found = ranks(torch.diag(torch.tensor([3.0, 4.0, 0.0])))
    >>> found.full, found.matrix.low, found.effective.low, found.stable.high
    (3, 2, 2, 1.5625)
    """
    full, size = min(matrix.shape), FIRST_SKETCH
    while full > SMALL and PAYS * size <= full:
        found, rest, total = sketch(matrix, size, generator)
        result = bounds(found, rest, total, matrix.shape, size)
        if result.effective.high - result.effective.low <= 0.05 * result.effective.high:
            return result
        size *= 2
    exact = squares(matrix)
    return bounds(exact, 0.0, float(exact.sum()), matrix.shape, 0)


def sketch(matrix: Tensor, size: int, generator: torch.Generator | None = None) -> tuple[Tensor, float, float]:
    """Squared singular values of B = Q.T A, float64 [size], descending; squared norms of A - Q B and of A.

    The second is the difference of the norms of A and B, and a little more, for B is computed in A's dtype.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    basis = tall @ torch.randn(tall.shape[1], size, generator=generator, dtype=tall.dtype)
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(tall.T @ torch.linalg.qr(basis).Q).Q
        basis = tall @ basis
    basis = torch.linalg.qr(basis).Q
    found = squares(basis.T @ tall)
    total = sum(float(rows.double().square().sum()) for rows in tall.split(ROWS))
    rest = max(total - float(found.sum()), 0.0)
    return found, rest + ROUNDING * total, total


def bounds(found: Tensor, rest: float, total: float, shape: torch.Size, size: int) -> Ranks:
    """Ranks from squared singular values, and what is known of those that are missing.

    Args:
        found: float64 [k], descending.
        rest: what the sums of squares may be larger by, and each of the squares.
        total: sum of all squares.
        shape: of the matrix.
        size: of the sketch.
    """
    full = min(shape)
    if total == 0:
        return Ranks(full, Bounds(0, 0), Bounds(0, 0), Bounds(0.0, 0.0), size)
    largest = float(found[0])
    tolerance = (max(shape) * torch.finfo(torch.float32).eps) ** 2
    held = found.cumsum(0)
    low, high = (int((held + extra < ENERGY * total).sum()) + 1 for extra in (rest, 0.0))
    below = rest <= tolerance * largest
    matrix = Bounds(
        int((found > tolerance * (largest + rest)).sum()),
        int((found + rest > tolerance * largest).sum()) if below else full,
    )
    stable = Bounds(total / (largest + rest), total / largest)
    return Ranks(full, matrix, Bounds(low, high if high <= len(found) else full), stable, size)
