"""One optimizer step: backward passes, the clipped norm, the update; with gradients kept, or released on the way."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlvr_lightning.heap import give_back
from rlvr_lightning.optim.clip import clip_factor, grad_norm, scale_gradients
from rlvr_lightning.optim.release import Backward, GradientRelease, ReleasedUpdate
from rlvr_lightning.optim.sgd import SGD
from rlvr_lightning.ranks import ALONE, Ranks


class Updates:
    """Drives an optimizer: `begin`, `backward` for each micro-batch, `finish`.

    Args:
        optimizer: any torch optimizer; ours, for gradient release.
        backward: `backward(loss, retain_graph=...)` runs a backward pass (Lightning's `manual_backward`).
        max_norm: clip the global norm of the gradients to this; 0 never clips.
        release: update during the backward pass; None keeps gradients until the step, as usual.
        shards: ranks that hold the parameters between them.

    Raises:
        ValueError: the optimizer cannot release gradients.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        backward: Backward,
        max_norm: float,
        release: GradientRelease | None = None,
        shards: Ranks = ALONE,
    ) -> None:
        self.optimizer, self.run_backward, self.max_norm, self.shards = optimizer, backward, max_norm, shards
        self.released = ReleasedUpdate(optimizer, release, max_norm, shards) if release else None
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._norms: list[float] = []

    def begin(self, parts: int) -> None:
        """Start a step of so many micro-batches."""
        self.optimizer.zero_grad(set_to_none=True)
        self._norms = []
        if self.released:
            if parts > 1 and self.released.release.accumulation == "whole":
                raise ValueError(
                    f"gradient_release.accumulation: whole needs one micro-batch per optimizer step, got {parts}; "
                    "raise micro_batch or set gradient_release.accumulation: each"
                )
            self.released.parts = parts
            give_back()

    def backward(self, loss: Tensor) -> None:
        """Take in one micro-batch's loss."""
        if self.released:
            self._norms.append(self.released.backward(loss, self.run_backward))
        else:
            self.run_backward(loss)

    def close(self) -> None:
        """Leave the parameters alone again."""
        if self.released:
            self.released.close()

    def finish(self, step: Callable[[], object], finite: bool = True) -> dict[str, float]:
        """Clip and step.

        Args:
            step: steps the optimizer.
            finite: whether the loss was, on all ranks.

        Returns:
            `grad_norm` of the whole step before clipping (with released micro-batches, the root of the sum of their
            squares), or `nonfinite`, 1, if it was not finite and the weights were left alone (with released gradients,
            what had been applied before the first that is not finite stays). From our SGD also `changed`, the number of
            entries whose bits changed.
        """
        if self.released:
            norm = math.hypot(*self._norms)
            give_back()
        else:
            norm = grad_norm(self.parameters, self.shards) if finite else math.nan
            if math.isfinite(norm):
                scale_gradients(self.optimizer, self.parameters, clip_factor(norm, self.max_norm))
            else:  # one bad batch must not end in NaN weights
                self.optimizer.zero_grad(set_to_none=True)
        step()  # without any gradient a no-op that keeps the count of steps
        self.optimizer.zero_grad(set_to_none=True)  # the next rollout has better uses for the memory
        metrics = {"grad_norm": norm} if finite and math.isfinite(norm) else {"nonfinite": 1.0}
        if isinstance(self.optimizer, SGD):
            changed = self.optimizer.changed_entries.items()
            counts = [count.double() / self.shards.copies_of(parameter) for parameter, count in changed]
            # summed where they are: a GPU is waited for once, not for every parameter
            mine = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.float64)
            metrics["changed"] = float(self.shards.sum(mine))
        return metrics
