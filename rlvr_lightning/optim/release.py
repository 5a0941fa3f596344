"""Gradients used up during the backward pass: each parameter is updated as soon as its gradient is complete.

Then the gradients never exist all at once, which spares as many bytes as the weights take. What it costs:

- **The norm.** Clipping needs the norm of all gradients before the first update. `two_pass` goes backward twice: once
  to sum squares, dropping each gradient, and once to apply (the idea of LOMO, arXiv 2306.09782). It is exact: the same
  bits as ordinary clipping, for one more backward pass. `delayed` clips by the norm of the step before, and each
  tensor by its own norm as well, so that a sudden large gradient cannot move any tensor by more than `lr * max_norm`;
  it goes backward once, and is not exact. `two_pass` is the default because an unclipped step can destroy a model;
  where norms change slowly `delayed` learns the same in less time (`results/tiny_modes`, `bench_memory_cpu.json`).
- **Micro-batches.** A sum over micro-batches needs somewhere to be kept, which is what release does away with. So
  `accumulation: whole` takes one micro-batch per optimizer step and is exact; `each` applies every micro-batch at once,
  a sequence of smaller steps on weights that have moved, each clipped to its share of `max_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rlvr_lightning.heap import give_back
from rlvr_lightning.optim.clip import clip_factor, norm_of, squared_norm
from rlvr_lightning.optim.sgd import SGD
from rlvr_lightning.ranks import ALONE, Ranks

Backward = Callable[..., None]

TRIMS = 32
"""On a CPU freed memory goes back to the system so many times in a backward pass, which bounds what lies about as
garbage. Each time costs milliseconds."""


@dataclass(frozen=True, kw_only=True)
class GradientRelease:
    """Update weights during the backward pass."""

    clip: Literal["two_pass", "delayed"] = "two_pass"
    """How the gradient's norm is known in time: exactly, by a second backward pass, or from the step before."""
    accumulation: Literal["whole", "each"] = "whole"
    """One micro-batch per optimizer step (exact), or every micro-batch applied at once (several smaller steps)."""

    def check(
        self, completions: int, micro_batch: int, field: str = "batching.micro_batch", of: str = "completions"
    ) -> None:
        """Raise ValueError where an optimizer step has several micro-batches and nothing says what to do with them."""
        if self.accumulation == "whole" and completions > micro_batch:
            raise ValueError(
                f"gradient_release.accumulation: whole needs one micro-batch per optimizer step, but "
                f"{field} is {micro_batch} and a step has {completions} {of}; raise it to "
                f"{completions} (activation_checkpointing saves memory) or set gradient_release.accumulation: each"
            )


class ReleasedUpdate:
    """Turns backward passes into updates; one per optimizer.

    Args:
        optimizer: must be ours; torch's own keep no way to step one parameter.
        release: how.
        max_norm: clip the gradient's global norm to this; 0 never clips, and then one backward pass is enough.
        shards: ranks that hold the parameters between them; they go backward together, through equal graphs.

    Raises:
        ValueError: the optimizer cannot do it.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, release: GradientRelease, max_norm: float, shards: Ranks = ALONE
    ) -> None:
        if not isinstance(optimizer, SGD):
            raise ValueError(
                f"gradient_release needs optimizer: rlvr_lightning.optim.SGD, got {type(optimizer).__name__}; "
                "set it, or leave gradient_release out"
            )
        self.optimizer, self.release, self.max_norm, self.shards = optimizer, release, max_norm, shards
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.parts = 1
        self._dropped_bytes = 0
        self._trim_bytes = max(4 << 20, sum(p.nbytes for p in parameters) // TRIMS)
        self._on_grad: Callable[[Tensor], None] | None = None
        self._squares: dict[Tensor, Tensor] = {}
        self._finite = True
        self._handles: list[RemovableHandle] = [p.register_post_accumulate_grad_hook(self._hook) for p in parameters]

    def close(self) -> None:
        """Leave the parameters alone again."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, parameter: Tensor) -> None:
        if self._on_grad is None:
            raise RuntimeError("a backward pass outside of ReleasedUpdate.backward would leave gradients behind")
        self._on_grad(parameter)
        self._dropped_bytes += 0 if parameter.grad is None else parameter.grad.nbytes
        parameter.grad = None
        if parameter.device.type == "cpu" and self._dropped_bytes >= self._trim_bytes:
            self._dropped_bytes = 0
            give_back()

    def backward(self, loss: Tensor, backward: Backward) -> float:
        """Go backward and update every parameter on the way.

        Args:
            loss: of the step, or of one of its `parts`.
            backward: `backward(loss, retain_graph=...)` runs the pass.

        Returns:
            The global norm of the gradient. If it is not finite, nothing was updated; with `delayed`, or without
            clipping, nothing from the first tensor on whose gradient is not finite (the last layers come first).
        """
        known = self._last_norm() if self.release.clip == "delayed" else 0.0
        if self.max_norm and not known:
            self._run(self._measure, loss, backward, retain_graph=True)
            norm = self._norm()
            if not math.isfinite(norm):
                return norm
            self.optimizer.grad_scale = clip_factor(norm, self.max_norm / self.parts)
            self._run(self._apply, loss, backward)
        else:
            self.optimizer.grad_scale = clip_factor(known, self.max_norm / self.parts)
            self._run(self._apply_guarded, loss, backward)
            norm = self._norm()
            if not math.isfinite(norm):
                return norm
        for group in self.optimizer.param_groups:
            group["last_norm"] = norm
        return norm

    def _last_norm(self) -> float:
        """Kept in the optimizer's groups, so that checkpoints hold it."""
        norm = float(self.optimizer.param_groups[0].get("last_norm", 0.0))
        return norm if math.isfinite(norm) else 0.0

    def _run(
        self, on_grad: Callable[[Tensor], None], loss: Tensor, backward: Backward, retain_graph: bool = False
    ) -> None:
        self._on_grad = on_grad
        self._squares, self._finite = ({} if on_grad != self._apply else self._squares), True
        try:
            backward(loss, retain_graph=retain_graph)
        finally:
            self._on_grad = None

    def _norm(self) -> float:
        """In the order of the parameters, not of the backward pass, so that it has the bits of ordinary clipping."""
        order = [p for group in self.optimizer.param_groups for p in group["params"] if p in self._squares]
        return norm_of([self._squares[p] for p in order], self.shards)

    def _measure(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._squares[parameter] = squared_norm(parameter.grad, self.shards)

    def _apply(self, parameter: Tensor) -> None:
        self.optimizer.update_parameter(parameter)

    def _apply_guarded(self, parameter: Tensor) -> None:
        """Update, and measure for the next step; a tensor alone may not exceed the norm that all are allowed."""
        self._measure(parameter)
        norm = norm_of([self._squares[parameter]], self.shards)
        self._finite &= math.isfinite(norm)
        if not self._finite:
            return
        step_factor = self.optimizer.grad_scale
        self.optimizer.grad_scale = min(step_factor, clip_factor(norm, self.max_norm / self.parts))
        self.optimizer.update_parameter(parameter)
        self.optimizer.grad_scale = step_factor
