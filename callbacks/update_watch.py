"""What one optimizer does to a sample of its parameters' entries. Knows tensors, no Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rlvr_lightning.callbacks.change_counts import layer_of, matrix_of
from rlvr_lightning.callbacks.entry_sample import EntrySample
from rlvr_lightning.callbacks.tensors import distinct, first_copy, local_part
from rlvr_lightning.callbacks.update_scale import (
    BINS,
    COUNTS,
    cosine,
    moments,
    spread_record,
    spread_sums,
    update_counts,
    update_record,
)

BETA1, BETA2 = 0.9, 0.999
"""Of the averages kept beside the run: AdamW's defaults in torch."""
PARTS = (len(COUNTS) + BINS, 3, 3 + BINS, 3 + BINS, 1)
"""Of a row of sums: `update_counts`, `moments`, `spread_sums` twice, and the squared norm of the gradient."""


class UpdateWatch:
    """Averages of sampled gradients, and what each step adds to the sampled weights.

    Args:
        optimizer: any; its distinct trainable parameters are sampled.
        names: the name of a parameter by its id().
        entries: sampled in this process, about.
        seed: of the sample.
        first_rank: whether this process samples parameters that all processes hold alike.
    """

    def __init__(
        self, optimizer: Optimizer, names: Mapping[int, str], entries: int, seed: int = 0, first_rank: bool = True
    ) -> None:
        self.optimizer = optimizer
        trained = distinct(p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
        self.kinds = sorted({matrix_of(names.get(id(p), "")) for p in trained})
        self.layers = sorted(
            {layer_of(names.get(id(p), "")) for p in trained}, key=lambda n: (not n.isdigit(), len(n), n)
        )
        # plain parameters are the same in all processes: the first samples them; of shards, each samples its own
        self.parameters = [p for p in trained if first_copy(p, first_rank)]
        self.names = [names.get(id(p), "") for p in self.parameters]
        self.sample = EntrySample(self.parameters, entries, seed)
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self.grad, self.momentum, self.square, self.old = torch.zeros(4, self.sample.entries, device=device)
        self.observed = self.skipped = 0
        self.measuring = True
        """Whether the next step will be asked for `sums`."""
        self._found: dict[int, Tensor | None] = {}
        self._sums: Tensor | None = None
        self._handles = [self._before_last(p, index) for index, p in enumerate(self.parameters) if _taken_early(p)]

    @property
    def nbytes(self) -> int:
        """Bytes kept beside the run in this process: positions, gradients, both averages, old values."""
        return self.sample.nbytes + sum(kept.nbytes for kept in (self.grad, self.momentum, self.square, self.old))

    def close(self) -> None:
        """Leave the parameters alone again."""
        for handle in self._handles:
            handle.remove()

    def _before_last(self, parameter: Tensor, index: int) -> RemovableHandle:
        """Look at a gradient before the hook that was registered last, which uses it up and drops it."""
        hooks: Any = parameter._post_accumulate_grad_hooks
        last = next(reversed(hooks))
        handle = parameter.register_post_accumulate_grad_hook(lambda p: self._take(index, p.grad))
        hooks[last] = hooks.pop(last)  # autograd goes by the order of insertion
        return handle

    def _take(self, index: int, grad: Tensor | None) -> None:
        if grad is None:
            return
        self.grad[self.sample.places[index]] = self.sample.of(index, grad).float()
        norm = torch.linalg.vector_norm(local_part(grad), dtype=torch.float32) if self.measuring else None
        self._found[index] = norm

    @torch.no_grad()
    def before_step(self) -> None:
        """Keep the sampled weights of now, if the step is measured."""
        if self.measuring:
            self.old = self._each(self._exact)

    @torch.no_grad()
    def after_step(self) -> None:
        """Take in the step's gradients, where they were not taken in the backward pass."""
        for index, p in enumerate(self.parameters):
            self._take(index, p.grad)
        for index, place in enumerate(self.sample.places):
            if index not in self._found:
                self.grad[place] = 0
        self.grad *= getattr(self.optimizer, "grad_scale", 1.0)  # ours clips by scaling as it steps
        if not self._found or not bool(self.grad.isfinite().all()):
            self.skipped += 1
            self._sums = self.empty()
        else:
            if self.measuring:
                self._sums = self._measure()
            self.momentum.lerp_(self.grad, 1 - BETA1)
            self.square.lerp_(self.grad.square(), 1 - BETA2)
            self.observed += 1
        self._found = {}

    def empty(self) -> Tensor:
        """Zeros of the shape of `sums`."""
        return torch.zeros(len(self.kinds) + len(self.layers), sum(PARTS), dtype=torch.float64)

    def sums(self) -> Tensor:
        """Of the last step, if it was `measuring`: float64 [kinds + layers, sum(PARTS)], this process's part."""
        return self.empty() if self._sums is None else self._sums

    def _measure(self) -> Tensor:
        """Before the averages take in the gradient: their cosine is with what came before."""
        new = self._each(self._exact)
        update = new - self.old
        stored_old, root = self.old.clone(), self._root()
        rows = self.empty()
        for index, (p, name, place) in enumerate(zip(self.parameters, self.names, self.sample.places, strict=True)):
            grad, before = self.grad[place], stored_old[place]
            step = update[place] if self._lossless(p) else self._intended(index)
            parts = [
                update_counts(before, new[place], step, grad).double(),
                moments(self.momentum[place], grad),
                spread_sums(root[place]),
                spread_sums(self._own_root(index)),
                self._squared_norm(index),
            ]
            row = torch.cat([part.cpu() for part in parts])
            rows[self.kinds.index(matrix_of(name))] += row
            rows[len(self.kinds) + self.layers.index(layer_of(name))] += row
        return rows

    def _each(self, of: Callable[[int, Tensor], Tensor]) -> Tensor:
        found = [of(index, p) for index, p in enumerate(self.parameters)]
        return torch.cat(found) if found else torch.zeros(0)

    def _exact(self, index: int, parameter: Tensor) -> Tensor:
        """float32: the weights, or what a master in the optimizer's state knows of them more exactly."""
        state = self.optimizer.state.get(parameter, {})
        if "master" in state:
            return self.sample.of(index, state["master"]).to(parameter.device).float()
        weight = self.sample.of(index, parameter)
        if "low" not in state:
            return weight.float()
        low = self.sample.of(index, state["low"]).to(weight.device)  # the lower half of the bits, signed
        return ((weight.view(torch.int16).int() << 16) + low).view(torch.float32)

    def _lossless(self, parameter: Tensor) -> bool:
        """Whether small updates are seen in what is kept of a parameter."""
        state = self.optimizer.state.get(parameter, {})
        return parameter.dtype.itemsize >= 4 or "master" in state or "low" in state

    def _intended(self, index: int) -> Tensor:
        """What the step of a 16-bit weight without master wanted to add, from the optimizer's state, without decay.

        NaN where the optimizer's rule is not known.
        """
        parameter, grad = self.parameters[index], self.grad[self.sample.places[index]]
        if index not in self._found:  # optimizers pass over what has no gradient
            return torch.zeros_like(grad)
        group = next(g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"]))
        state = self.optimizer.state.get(parameter, {})
        held = {key: self._state(index, key) for key, kept in state.items() if kept is not None and key != "step"}
        wanted = None
        if all(kept is not None for kept in held.values()):  # in a form that can be read
            wanted = _wanted(self.optimizer, group, grad, self._own_root(index), held, float(state.get("step", 0)))
        return torch.full_like(grad, math.nan) if wanted is None else -float(group["lr"]) * wanted

    def _state(self, index: int, key: str) -> Tensor | None:
        """Sampled entries of a tensor of the optimizer's state; None if there is none of the parameter's shape."""
        parameter = self.parameters[index]
        value = self.optimizer.state.get(parameter, {}).get(key)
        if not isinstance(value, Tensor) or value.shape != parameter.shape or type(local_part(value)) is not Tensor:
            return None
        return self.sample.of(index, value).float().to(parameter.device)

    def _own_root(self, index: int) -> Tensor:
        """The root of the optimizer's own average of squares, corrected as it does; empty if it has none."""
        parameter = self.parameters[index]
        if (square := self._state(index, "exp_avg_sq")) is not None:
            group = next(g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"]))
            return (square / (1 - group["betas"][1] ** float(self.optimizer.state[parameter]["step"]))).sqrt()
        square = self._state(index, "square_avg")
        return self.grad[:0] if square is None else square.sqrt()

    def _root(self) -> Tensor:
        """The same of the average kept beside the run, this step's gradient included."""
        after = self.square.lerp(self.grad.square(), 1 - BETA2)
        return (after / (1 - BETA2 ** (self.observed + 1))).sqrt()

    def _squared_norm(self, index: int) -> Tensor:
        norm, scale = self._found.get(index), getattr(self.optimizer, "grad_scale", 1.0)
        return torch.zeros(1, dtype=torch.float64) if norm is None else (scale * norm.double()).square().view(1)


def _wanted(
    optimizer: Optimizer, group: Mapping[str, Any], grad: Tensor, root: Tensor, held: Mapping[str, Any], step: float
) -> Tensor | None:
    """What the rate is multiplied with; None of rules other than torch's SGD, Adam, AdamW and RMSprop, and our SGD."""
    names = set(held)
    if isinstance(optimizer, torch.optim.Adam) and names == {"exp_avg", "exp_avg_sq"}:
        return held["exp_avg"] / (1 - group["betas"][0] ** step) / (root + group["eps"])
    if isinstance(optimizer, torch.optim.RMSprop) and names == {"square_avg"}:
        return grad / (root + group["eps"])
    if isinstance(optimizer, torch.optim.RMSprop) and names == {"square_avg", "momentum_buffer"}:
        return held["momentum_buffer"]  # of gradients that are divided already
    if isinstance(optimizer, torch.optim.SGD) and names == {"momentum_buffer"}:
        buffer = held["momentum_buffer"]
        return grad + group["momentum"] * buffer if group["nesterov"] else buffer
    plain = isinstance(optimizer, torch.optim.SGD) or hasattr(optimizer, "grad_scale")  # which ours has
    return grad if plain and not names else None


def _taken_early(parameter: Tensor) -> bool:
    """Whether a hook takes the gradient as soon as it is complete."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def as_record(kinds: Sequence[str], layers: Sequence[str], sums: Tensor) -> dict[str, Any]:
    """Names for what `UpdateWatch.sums` returns, summed over processes: overall, by kind, and by layer in short."""
    by_kind, by_layer = sums[: len(kinds)], sums[len(kinds) :]
    return {
        "all": _row_record(by_kind.sum(0)),
        "kinds": {kind: _row_record(row) for kind, row in zip(kinds, by_kind, strict=True)},
        "layers": {layer: _short(_row_record(row)) for layer, row in zip(layers, by_layer, strict=True)},
    }


def _row_record(row: Tensor) -> dict[str, Any]:
    counts, products, root, own, squared = row.split(PARTS)
    return {
        "update": update_record(counts.long()),
        "momentum_cosine": cosine(products),
        "sqrt_v": spread_record(root),
        "sqrt_v_own": spread_record(own),
        "grad_norm": math.sqrt(float(squared)),
    }


def _short(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "absorbed_frac": record["update"]["absorbed_frac"],
        "momentum_cosine": record["momentum_cosine"],
        "sqrt_v_std": (record["sqrt_v"] or {}).get("std"),
        "grad_norm": record["grad_norm"],
    }
