"""Let any of torch's optimizers say what each step changed, with one tensor's copy at a time instead of a model's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlvr_lightning.delta import TensorDelta
from rlvr_lightning.delta.tensor import local
from rlvr_lightning.optim.sgd import SGD, Listener
from rlvr_lightning.optim.update import DENSE


def on_change(optimizer: Optimizer, listener: Listener, wants: Callable[[Tensor], bool]) -> None:
    """Call `listener(parameter, undo)` after each update of a wanted parameter; see `SGD.listen`.

    Our SGD emits this by itself. Any other optimizer is made to step one tensor at a time, which gives the same bits
    for all optimizers whose update of a tensor looks at no other tensor.

    Raises:
        ValueError: an optimizer not of `torch.optim`, of which that is not known.
    """
    if isinstance(optimizer, SGD):
        optimizer.listen(listener, wants)
        return
    if not type(optimizer).__module__.startswith("torch.optim.") or isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"reference: delta cannot follow {type(optimizer).__name__}; use reference: copy, an optimizer of "
            "torch.optim or rlvr_lightning.optim.SGD"
        )

    def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _step_each(self, listener, wants)
        return loss

    hooked = Optimizer.profile_hook_step(step)  # the optimizer's own hooks run once a step, as before
    optimizer.step = MethodType(hooked, optimizer)  # type: ignore[method-assign]


def _step_each(optimizer: Optimizer, listener: Listener, wants: Callable[[Tensor], bool]) -> None:
    twin = copy.copy(optimizer)  # shares the state, has no hooks
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            before = local(parameter).clone() if wants(parameter) else None
            twin.param_groups = [{**group, "params": [parameter]}]
            type(optimizer).step(twin)
            if before is not None:
                undo = TensorDelta.between(parameter, before)
                listener(parameter, undo if undo.density <= DENSE else before.view(-1))
