"""The largest eigenvalues of a loss's Hessian, from gradients alone. Knows tensors, no trainer.

Products of the Hessian with a vector are central differences of gradients,

    H v = (g(w + s v) - g(w - s v)) / 2 s + O(s**2),    |v| = 1,

so the loss needs one derivative only, as training does, and memory for a few vectors of the weights' size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

STEP = 1e-5
"""Length of a step over the norm of the weights. Larger ones feel third derivatives (on the tiny model 1e-3 doubles the
first eigenvalue), smaller ones the rounding of gradients, which float32 has to 1e-6 or so."""


@dataclass(frozen=True)
class Eigenvalue:
    """One of the Hessian, with a bound of its error: some eigenvalue lies within `residual` of `value`."""

    value: float
    residual: float
    """|H v - value v| for the unit vector v that was found, at half the step: a step that is too large shows."""


class Hessian:
    """Of a loss at the weights as they are; after each product they are that again, to the bit.

    Args:
        parameters: what the loss is differentiated by: float32 or wider, in one process.
        backward: computes the gradient of the loss into the parameters' `grad`, which are None before.
        step: see `STEP`.

    Raises:
        ValueError: 16-bit parameters, which would round a step away.
    """

    def __init__(self, parameters: Sequence[Tensor], backward: Callable[[], object], step: float = STEP) -> None:
        if any(p.element_size() < 4 for p in parameters):
            raise ValueError("16-bit weights round small steps away; set model.dtype: float32")
        self.parameters, self.backward = list(parameters), backward
        self.size = sum(p.numel() for p in parameters)
        self.norm = float(torch.stack([p.detach().double().norm() for p in parameters]).norm())
        self.step = step * (self.norm or 1.0)
        self.products = 0

    def gradient(self) -> Tensor:
        """[size], float32 or the parameters' own if it is wider; zeros where a parameter has none."""
        for p in self.parameters:
            p.grad = None
        self.backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        return torch.cat([grad.reshape(-1) for grad in found])

    def product(self, vector: Tensor) -> Tensor:
        """H v.

        Args:
            vector: [size], of any length.
        """
        self.products += 1
        length = float(vector.norm())
        if length == 0:
            return torch.zeros_like(vector)
        with self._moved(vector, self.step / length):
            ahead = self.gradient()
        with self._moved(vector, -self.step / length):
            behind = self.gradient()
        return (ahead - behind).mul_(length / (2 * self.step))

    @contextmanager
    def _moved(self, vector: Tensor, factor: float) -> Iterator[None]:
        kept = [p.detach().clone() for p in self.parameters]
        try:
            with torch.no_grad():
                for p, part in zip(self.parameters, self._split(vector), strict=True):
                    p.add_(part.to(p), alpha=factor)
            yield
        finally:
            with torch.no_grad():
                for p, old in zip(self.parameters, kept, strict=True):
                    p.copy_(old)

    def _split(self, vector: Tensor) -> Iterator[Tensor]:
        parts = vector.split([p.numel() for p in self.parameters])
        return (part.view_as(p) for p, part in zip(self.parameters, parts, strict=True))


def top_eigenvalues(
    hessian: Hessian, count: int, seed: int = 0, progress: Callable[[int], object] = lambda products: None
) -> list[Eigenvalue]:
    """Those of largest magnitude, by ARPACK's implicitly restarted Lanczos method (`scipy.sparse.linalg.eigsh`).

    Args:
        hessian: of what.
        count: how many, less than there are parameters.
        seed: of the first vector.
        progress: called after each product with how many there were.

    Returns:
        Largest magnitude first; with their residuals, one more product each.

    Raises:
        ValueError: scipy is not installed, `count` is too large, a gradient is not finite, or the method does not
            converge.
    """
    try:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ImportError:
        raise ValueError("curvature needs scipy: pip install 'rlvr-lightning[curvature]'") from None
    if not 1 <= count < hessian.size:
        raise ValueError(f"--top must be from 1 to {hessian.size - 1}, the number of parameters less one, got {count}")
    like = hessian.parameters[0]

    def times(vector: Any) -> Any:
        product = hessian.product(torch.from_numpy(np.ravel(vector)).to(like))
        if not bool(product.isfinite().all()):
            raise ValueError("a gradient is not finite near these weights; the Hessian cannot be had")
        progress(hessian.products)
        return product.cpu().numpy()

    dtype = torch.zeros(0, dtype=like.dtype).numpy().dtype
    operator = LinearOperator((hessian.size, hessian.size), matvec=times, dtype=dtype)
    first = torch.randn(hessian.size, generator=torch.Generator().manual_seed(seed), dtype=like.dtype).numpy()
    basis = min(hessian.size, max(2 * count + 1, 20))
    try:
        values, vectors = eigsh(operator, count, which="LM", v0=first, ncv=basis, tol=1e-3, maxiter=30)
    except ArpackNoConvergence as error:
        raise ValueError(
            f"only {len(error.eigenvalues)} of {count} eigenvalues converged in {hessian.products} products; "
            "ask for fewer with --top, or change --step"
        ) from None
    hessian.step /= 2
    found = [
        Eigenvalue(float(value), float(np.linalg.norm(times(vector) - value * vector)))
        for value, vector in zip(values, vectors.T, strict=True)
    ]
    hessian.step *= 2
    return sorted(found, key=lambda one: -abs(one.value))
