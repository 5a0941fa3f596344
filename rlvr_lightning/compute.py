"""Compute in one dtype on weights stored in another, without a second copy of the model.

A CPU without bf16 arithmetic is about five times faster in fp32, yet bf16 weights take half the memory. So each layer
casts its weights when it runs, a few million entries at a time, and casts them again in the backward pass instead of
keeping them. Gradients come out in the weights' dtype, each rounded once from fp32 sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from rlvr_lightning.heap import scratch

BLOCK_ENTRIES = 1 << 20
"""Weights cast at a time: 4 MiB in fp32."""


def compute_in(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Make a model compute in `dtype`, whatever its weights are stored in.

    Linear and embedding layers cast block by block; a tied embedding, cast or not, adds its part of the gradient in
    place. Any other module with weights of its own (norms, convolutions, fused experts) has them cast whole while it
    runs, and autograd keeps that cast until the backward pass.

    Args:
        model: changed in place; parameters stay what and where they are.
        dtype: of activations and of arithmetic.

    Returns:
        Names of modules of the second kind with more than 2**20 entries, whose casts cost memory in training.
    """
    costly = []
    uses: Counter[Tensor] = Counter(p for m in model.modules() for p in m.parameters(recurse=False))
    for name, module in model.named_modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if p.is_floating_point()}
        if not own:
            continue
        if type(module) is nn.Linear and module.weight.dtype != dtype:
            module.forward = partial(_linear, module, dtype)  # type: ignore[method-assign]
        elif type(module) is nn.Embedding and (module.weight.dtype != dtype or uses[module.weight] > 1):
            tied = _TiedRows(module.weight) if uses[module.weight] > 1 and module.weight.requires_grad else None
            module.forward = partial(_embed, module, dtype, tied)  # type: ignore[method-assign]
        elif any(p.dtype != dtype for p in own.values()):
            _cast_while_running(module, dtype)
            if sum(p.numel() for p in own.values()) > 1 << 20:
                costly.append(name)
    return costly


def cast(block: Tensor, dtype: torch.dtype) -> Tensor:
    """A block of a weight in another dtype, for use at once: on a CPU the next call overwrites it."""
    if block.dtype == dtype:
        return block
    if block.device.type != "cpu":
        return block.to(dtype)
    return scratch("cast", block.numel(), dtype).view(block.shape).copy_(block)


def blocks(weight: Tensor) -> Iterator[slice]:
    """Row slices of a matrix [V, H] with about `BLOCK_ENTRIES` entries each, at least one row."""
    rows = max(1, BLOCK_ENTRIES // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        yield slice(start, start + rows)


def _linear(module: nn.Linear, dtype: torch.dtype, x: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.to(dtype)
    out: Tensor = _CastLinear.apply(x.to(dtype), module.weight)
    return out if bias is None else out + bias


class _CastLinear(torch.autograd.Function):
    """x [..., H] times the transpose of weight [V, H], computed in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        parts = [functional.linear(x, cast(weight[rows], x.dtype)) for rows in blocks(weight)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        flat, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        grad_x = torch.zeros_like(inputs) if wants_x else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        for rows in blocks(weight):
            if grad_x is not None:
                grad_x.addmm_(flat[:, rows], cast(weight[rows], x.dtype))
            if grad_weight is not None:
                grad_weight[rows] = flat[:, rows].t() @ inputs
        return None if grad_x is None else grad_x.view_as(x), grad_weight


def _embed(module: nn.Embedding, dtype: torch.dtype, tied: _TiedRows | None, ids: Tensor) -> Tensor:
    return _CastEmbedding.apply(ids, module.weight, dtype, module.padding_idx, tied)


class _TiedRows:
    """The part of a tied table's gradient that comes from looking rows up, waiting for the output layer's dense part.

    Autograd would make a third tensor to add the two. Here the few rows are added into the dense gradient in place,
    once, when it is about to be accumulated.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.waiting: list[tuple[Tensor, Tensor]] = []
        weight.register_hook(self._add)

    def put(self, rows: Tensor, sums: Tensor) -> None:
        """Take rows of the gradient, during a backward pass."""
        self.waiting.append((rows, sums))
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    @torch.no_grad()
    def _add(self, grad: Tensor | None) -> None:
        if grad is None:  # the output layer had no part in this pass: `_finish` will see to it
            return
        for rows, sums in self.waiting:
            grad[rows] = (grad[rows].float() + sums).to(grad.dtype)
        self.waiting = []

    @torch.no_grad()
    def _finish(self) -> None:
        """After a pass in which the output layer had no part: the rows are the whole gradient."""
        if self.waiting:
            if self.weight.grad is None:
                self.weight.grad = torch.zeros_like(self.weight)
            self._add(self.weight.grad)


class _CastEmbedding(torch.autograd.Function):
    """Rows of a table, cast; their gradients are summed in fp32."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, dtype: torch.dtype, padding: int | None, tied: _TiedRows | None
    ) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.padding, ctx.tied = padding, tied
        return functional.embedding(ids, weight.detach()).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, weight = ctx.saved_tensors
        rows, place = ids.flatten().unique(return_inverse=True)
        sums = torch.zeros(len(rows), grad.shape[-1], dtype=torch.float32, device=grad.device)
        sums.index_add_(0, place, grad.flatten(0, -2).float())
        if ctx.padding is not None:
            sums[rows == ctx.padding] = 0
        if ctx.tied is not None:
            ctx.tied.put(rows, sums)
            return (None,) * 5
        return None, torch.zeros_like(weight).index_copy_(0, rows, sums.to(weight.dtype)), None, None, None


def _cast_while_running(module: nn.Module, dtype: torch.dtype) -> list[RemovableHandle]:
    """Let a module see its parameters in another dtype, from before its forward to after it."""
    names = [n for n, p in module.named_parameters(recurse=False) if p.is_floating_point()]

    def before(m: nn.Module, _: Any) -> None:
        for name in names:
            m.__dict__[name] = m._parameters[name].to(dtype)  # type: ignore[union-attr]

    def after(m: nn.Module, *_: Any) -> None:
        for name in names:
            m.__dict__.pop(name, None)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
