"""SGD without momentum, for weights stored in 16 bits: three ways to keep what bfloat16 cannot hold.

=================  =========  ==============================================================================
bytes a parameter  settings   what it is
=================  =========  ==============================================================================
2 + 2              split      an fp32 master in two halves: the bf16 weight itself and 16 more bits. Follows
                              the fp32 trajectory bit for bit; the low half may live in host memory
2 + 4              fp32       an fp32 master beside the bf16 weight: the same trajectory, the anchor
2                  none       bf16 alone, rounded to nearest: an update below half a unit in the last place
                              is lost, however often it is repeated
2                  none and   bf16 alone, rounded up or down with the probability of the remainder: right on
                   stochastic average, no master
4                  any        weights stored in fp32 are their own master: plain SGD
=================  =========  ==============================================================================

There is no momentum and no weight decay: the papers' setting (arXiv 2602.07729), and the reason that there is no more
state than this.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rlvr_lightning.delta import TensorDelta
from rlvr_lightning.delta.tensor import first_entry, local
from rlvr_lightning.optim.update import Storage, update
from rlvr_lightning.seeds import derive_seed

Listener = Callable[[Tensor, TensorDelta | Tensor], None]
Master = Literal["split", "fp32", "none"]
Rounding = Literal["nearest", "stochastic"]


class SGD(Optimizer):
    """w <- w - lr * gradient, with fp32 precision in as few bytes as it takes.

    Every step counts how many entries' bits changed (`changed_entries`), and tells who listens (`listen`)
    which, and what they were, at no extra pass over memory.

    Args:
        params: parameters or groups, as for any torch optimizer; contiguous, dense gradients.
        lr: learning rate.
        master: where bfloat16 parameters keep their exact value; float32 parameters need no master.
        rounding: of bfloat16 parameters without a master.
        low_on_host: keep the low halves of `split` in (page-locked) host memory: 2 bytes a parameter on the device.
        seed: of stochastic rounding.

    Raises:
        ValueError: settings that cannot work together.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        >>> sgd = SGD([weight], lr=1.0)
        >>> for _ in range(3):  # each step is below half a unit in the last place of 1.0
        ...     weight.grad = torch.full((3,), 0.0015, dtype=torch.bfloat16)
        ...     sgd.step()
        >>> weight.tolist(), sgd.state[weight]["low"].dtype
        ([0.99609375, 0.99609375, 0.99609375], torch.int16)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        master: Master = "split",
        rounding: Rounding = "nearest",
        low_on_host: bool = False,
        seed: int = 0,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        if master not in ("split", "fp32", "none"):
            raise ValueError(f"master must be split, fp32 or none, got {master!r}")
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding must be nearest or stochastic, got {rounding!r}")
        if rounding == "stochastic" and master != "none":
            raise ValueError(f"rounding: stochastic needs master: none (a master of {master!r} loses nothing)")
        if low_on_host and master != "split":
            raise ValueError(f"low_on_host needs master: split; master is {master!r}")
        self.master, self.rounding, self.low_on_host, self.seed = master, rounding, low_on_host, seed
        self.grad_scale = 1.0
        """Multiplies gradients in the next step: norm clipping without a pass over them."""
        self._listeners: list[tuple[Listener, Callable[[Tensor], bool]]] = []
        self._begin_hooks: dict[int, Callable[[], None]] = OrderedDict()
        self.changed_entries: dict[Tensor, Tensor] = {}
        """Of the last step that is over: parameter -> int64 scalar, entries whose bits changed."""
        self._changing: dict[Tensor, tuple[int, Tensor]] = {}
        super().__init__(params, {"lr": lr, "steps": 0})

    def listen(self, listener: Listener, wants: Callable[[Tensor], bool] = lambda parameter: True) -> None:
        """Call `listener(parameter, undo)` after each update of a parameter for which `wants(parameter)` is true.

        `undo` is the way back to what the parameter was: the entries that changed, with their old values, or, if they
        are many, all of its old values in a flat tensor.
        """
        self._listeners.append((listener, wants))

    def register_begin_hook(self, hook: Callable[[], None]) -> RemovableHandle:
        """Call `hook()` before the first update of each step.

        Where gradients are released that is during the backward pass, long before `step`, whose pre-hooks come too late
        to see the old weights.
        """
        handle = RemovableHandle(self._begin_hooks)
        self._begin_hooks[handle.id] = hook
        return handle

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; ValueError if one is not contiguous, or is float16 and has a master."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not local(p).is_contiguous():
                raise ValueError(f"a parameter of shape {tuple(p.shape)} is not contiguous; make it so before training")
            if self.low_on_host and hasattr(p, "placements"):
                raise ValueError("low_on_host is for weights in one process; use trainer.strategy.cpu_offload: true")
            if p.dtype == torch.float16 and self.master != "none":
                raise ValueError(f"master: {self.master} is for bfloat16 parameters, got float16; use bfloat16")

    def __getstate__(self) -> dict[str, Any]:
        """For copies: settings and state, without those who listen."""
        kept = ("master", "rounding", "low_on_host", "seed", "grad_scale")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take on a copied or a loaded state; those who listen to this one stay."""
        fresh: dict[str, Any] = {
            "_listeners": [],
            "_begin_hooks": OrderedDict(),
            "changed_entries": {},
            "_changing": {},
        }
        for name, value in fresh.items():
            self.__dict__.setdefault(name, value)
        super().__setstate__(state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, and close the step.

        Parameters whose gradients were released (`update_parameter`) have none left: for them this only closes it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p in chain.from_iterable(group["params"] for group in self.param_groups):
            if p.grad is not None:
                self.update_parameter(p)
        if not self._changing:
            self._begin()
        for group in self.param_groups:
            group["steps"] += 1
        self.changed_entries = {p: changed for p, (_, changed) in self._changing.items()}
        self._changing = {}
        return loss

    @torch.no_grad()
    def update_parameter(self, parameter: Tensor) -> None:
        """Update one parameter with the gradient it has now; the gradient is left to the caller.

        Raises:
            ValueError: the gradient is sparse, or the parameter is not one of this optimizer's.
        """
        if not self._changing:
            self._begin()
        group, position = self._find(parameter)
        grad = cast(Tensor, parameter.grad)
        if grad.is_sparse:
            raise ValueError("SGD needs dense gradients; set sparse=False on the embedding")
        times, before = self._changing.get(parameter, (0, None))  # more than once, if micro-batches are applied singly
        key = derive_seed(self.seed, group["steps"], position, times) & 0xFFFFFFFF
        listeners = [listener for listener, wants in self._listeners if wants(parameter)]
        flat = local(grad).reshape(-1)
        changed, undo = update(self._storage(parameter, key), flat, group["lr"] * self.grad_scale, emit=bool(listeners))
        self._changing[parameter] = (times + 1, changed if before is None else before + changed)
        if undo is not None:
            for listener in listeners:
                listener(parameter, undo)

    def _begin(self) -> None:
        for hook in list(self._begin_hooks.values()):
            hook()

    def _find(self, parameter: Tensor) -> tuple[dict[str, Any], int]:
        """The parameter's group as it is now (loading a state replaces groups), and its position among all."""
        position = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p is parameter:
                    return group, position
                position += 1
        raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not one of this optimizer's")

    def _storage(self, parameter: Tensor, key: int = 0) -> Storage:
        weight = local(parameter).view(-1)
        if weight.dtype != torch.bfloat16:
            return Storage(weight)
        state = self.state[parameter]
        if self.master == "split":
            if "low" not in state:
                state["low"] = self._new_low(parameter)
            elif self.low_on_host and state["low"].device != self._low_device(weight):
                state["low"] = self._new_low(parameter).copy_(state["low"])  # trainers move states to the GPU
            return Storage(weight, low=local(state["low"]).view(-1))
        if self.master == "fp32":
            if "master" not in state:
                state["master"] = parameter.detach().float()
            return Storage(weight, master=local(state["master"]).view(-1))
        return Storage(weight, key=key if self.rounding == "stochastic" else None, offset=first_entry(parameter))

    def _new_low(self, like: Tensor) -> Tensor:
        """Zeros as wide as the low half; of a DTensor, with its sharding."""
        device = self._low_device(like)
        if device == like.device:
            return torch.zeros_like(like, dtype=torch.int16, requires_grad=False)
        return torch.zeros(like.shape, dtype=torch.int16, device=device, pin_memory=True)

    def _low_device(self, like: Tensor) -> torch.device:
        return torch.device("cpu") if self.low_on_host else like.device

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state, each tensor in its own dtype (torch's would turn it into the parameter's).

        Raises:
            ValueError: the state is not of these parameters, or of another `master`.
        """
        groups, saved = state_dict["param_groups"], state_dict["state"]
        super().load_state_dict({"state": {}, "param_groups": groups})
        ids = chain.from_iterable(group["params"] for group in groups)
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(ids, parameters, strict=True):
            for name, value in saved.get(key, {}).items():
                self._restore(parameter, name, value)

    def _restore(self, parameter: Tensor, name: str, value: Tensor) -> None:
        expected = {"split": "low", "fp32": "master"}.get(self.master)
        if name != expected or parameter.dtype != torch.bfloat16:
            raise ValueError(f"the saved optimizer state holds {name!r}, which master: {self.master} does not use")
        if value.shape != parameter.shape:
            raise ValueError(f"the saved {name!r} has shape {tuple(value.shape)}, the weight {tuple(parameter.shape)}")
        mine = self._new_low(parameter) if name == "low" else torch.empty_like(parameter.detach(), dtype=torch.float32)
        self.state[parameter][name] = mine.copy_(value)
