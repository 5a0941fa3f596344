"""Masks of subnetworks: what a run changed, chosen at random, by magnitude, or by the diagonal Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from rlvr_lightning.analysis.first_step import FirstStep
from rlvr_lightning.analysis.matching import Matched, match, spec_of
from rlvr_lightning.analysis.weights import Weights, gather
from rlvr_lightning.checkpoint.start import model_name
from rlvr_lightning.delta.tensor import bits
from rlvr_lightning.offline import Text, rollouts_of
from rlvr_lightning.optim.subnetwork import Subnetwork, pack
from rlvr_lightning.schema import Rollouts

View = Literal["bf16", "stored"]
"""As what weights are compared: rounded to bfloat16, or as they are stored."""


def differ(old: Tensor, new: Tensor, view: View) -> Tensor:
    """Where the bits differ: bool [n].

    >>> differ(torch.tensor([1.0, 1.0]), torch.tensor([1.0001, 2.0]), "bf16").tolist()
    [False, True]
    """
    if view == "bf16":
        old, new = old.to(torch.bfloat16), new.to(torch.bfloat16)
    return bits(old) != bits(new)


def matched(*models: Weights) -> Matched:
    """The tensors of models of which a mask can be made: those of all, whole.

    Raises:
        ValueError: one has entries that another has not.
    """
    found = match(*models)
    if found.left_out:
        one = found.left_out[0]
        raise ValueError(
            f"{one.entries:,} entries of {one.tensor!r} in {one.model}: {one.reason}; a mask is of one model"
        )
    return found


def from_start(found: Matched, name: str) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of a tensor of a base and of runs, the base's rounded as the first run held it from its start."""
    held = spec_of(found.models[1], name)
    assert held is not None
    for old, *runs in found.pieces(name):
        yield old.to(held.dtype).to(old.dtype), *runs


def changed(base: Weights, tuned: Weights, view: View = "bf16") -> Subnetwork:
    """The entries in which a run differs from its base, a piece in memory at a time."""
    found = matched(base, tuned)
    packed = {
        name: torch.cat([pack(differ(old, new, view)) for old, new in from_start(found, name)])
        if spec.entries
        else torch.zeros(0, dtype=torch.uint8)
        for name, spec in found.tensors.items()
    }
    shapes = {name: spec.shape for name, spec in found.tensors.items()}
    return Subnetwork(packed, shapes, f"changed from {base.label} to {tuned.label} ({view})")


def shares(like: Subnetwork | None, density: float | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """How many entries of each tensor are to be trained: as many as of another mask, or the same share of all.

    Raises:
        ValueError: the other mask is of another model, or the share is none.
    """
    if like is None:
        if density is None or not 0 < density <= 1:
            raise ValueError(f"--density must be above 0 and at most 1, got {density}")
        return {name: max(1, round(density * prod(shape))) if prod(shape) else 0 for name, shape in shapes.items()}
    if dict(like.shapes) != dict(shapes):
        odd = next(name for name in {**shapes, **like.shapes} if like.shapes.get(name) != shapes.get(name))
        raise ValueError(
            f"--like: {odd!r} is {like.shapes.get(odd)} there, {shapes.get(odd)} here; it is of another model"
        )
    return {name: trained for name, (trained, _) in like.counts().items()}


def highest(
    shapes: Mapping[str, tuple[int, ...]], counts: Mapping[str, int], score: Callable[[str], Tensor], made: str
) -> Subnetwork:
    """The entries of each tensor with the highest scores.

    Args:
        shapes: of all tensors.
        counts: how many of each.
        score: of a tensor's entries, flat.
        made: for the file.
    """
    packed = {}
    for name, shape in shapes.items():
        mask = torch.zeros(prod(shape), dtype=torch.bool)
        mask[score(name).topk(counts[name], sorted=False).indices.cpu()] = True
        packed[name] = pack(mask)
    return Subnetwork(packed, dict(shapes), made)


def at_random(like: Subnetwork, seed: int) -> Subnetwork:
    """As many entries of each tensor as another mask has, drawn evenly."""
    dice = torch.Generator().manual_seed(seed)
    counts = shares(like, None, like.shapes)
    made = f"at random, seed {seed}, as dense as: {like.made}"
    return highest(like.shapes, counts, lambda name: torch.rand(prod(like.shapes[name]), generator=dice), made)


def by_magnitude(model: Weights, like: Subnetwork | None, density: float | None, largest: bool) -> Subnetwork:
    """The smallest or the largest weights of each tensor."""
    shapes = {name: spec.shape for name, spec in matched(model).tensors.items()}
    sign = 1 if largest else -1
    made = f"{'largest' if largest else 'smallest'} weights of {model.label}"
    counts = shares(like, density, shapes)
    return highest(shapes, counts, lambda name: sign * gather(model, name, torch.float32).abs(), made)


def fisher(step: FirstStep, like: Subnetwork | None, density: float | None) -> Subnetwork:
    """The entries of each tensor with the largest diagonal Fisher information.

    That is the mean over completions of the squared gradient of a completion's log-probability (arXiv 2609.36262), here
    over those that the first optimizer step would learn from: sampled ones, or demonstrations.
    """
    named = step.module.named_parameters()
    parameters = {model_name(name): p for name, p in named if name.startswith("policy.model.") and p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    counts = shares(like, density, shapes)
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    number = 0
    for one in completions(step):
        step.module.policy(
            one, getattr(getattr(step.module, "sampling", None), "temperature", 1.0)
        ).logprobs.sum().backward()
        for name, p in parameters.items():
            if p.grad is not None:
                squares[name].addcmul_(p.grad, p.grad)
                p.grad = None
        number += 1
    made = f"diagonal Fisher information of {number} completions, {step.module.model_name}"
    return highest(shapes, counts, lambda name: squares[name].view(-1), made)


def completions(step: FirstStep) -> Iterator[Rollouts]:
    """Each completion that a step learns from, by itself.

    Raises:
        ValueError: it learns from something else.
    """
    for part in step.parts:
        texts = isinstance(part, list) and all(isinstance(text, Text) for text in part)
        found: Any = rollouts_of(part, step.module.device) if texts else getattr(part, "rollouts", None)
        if not isinstance(found, Rollouts):
            raise ValueError(f"{type(step.module).__name__} learns from no completions one by one; take GRPO or SFT")
        alone, counts = found.split_groups(found.group), getattr(part, "mask", found.completion_mask).any(1)
        yield from (alone.select([row]) for row in range(len(alone.prompt_ids)) if counts[row])
