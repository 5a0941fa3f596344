"""Learning-rate schedules with a linear warm-up in front."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LinearLR, LRScheduler, SequentialLR


def with_warmup(
    optimizer: Optimizer, make_scheduler: Callable[[Optimizer], LRScheduler] | None, warmup_steps: int
) -> LRScheduler | None:
    """The schedule, after `warmup_steps` optimizer steps of linearly rising rate; None when there is neither.

    Step k (from 0) of the warm-up runs at (k + 1) / warmup_steps of the rate.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule = with_warmup(sgd, None, 2)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(sgd.param_groups[0]["lr"])
        ...     sgd.step()
        ...     schedule.step()
        >>> rates
        [0.5, 1.0, 1.0, 1.0]
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
    if warmup_steps < 2:  # one step of warm-up is a step at the full rate
        return make_scheduler(optimizer) if make_scheduler else None
    warmup = LinearLR(optimizer, start_factor=1 / warmup_steps, total_iters=warmup_steps - 1)
    after = make_scheduler(optimizer) if make_scheduler else ConstantLR(optimizer, factor=1.0, total_iters=0)
    return SequentialLR(optimizer, [warmup, after], milestones=[warmup_steps])
