"""Rollouts with what was worked out of their rewards, and how they are cut into optimizer steps and micro-batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlvr_lightning.ranks import ALONE, Ranks
from rlvr_lightning.schema import Rollouts, Sampling


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How a batch of rollouts is cut up."""

    micro_batch: int = 32
    """Completions in one forward and backward pass. Costs memory, changes no gradient. Divides the group size or is a
    multiple of it."""
    minibatches: int = 1
    """Optimizer steps the rollouts are split into; must divide `prompts_per_step`. 1 is strictly on-policy."""
    passes: int = 1
    """Times the rollouts are gone through."""
    rollout_batch: int = 256
    """Completions decoded at once. Bounds the KV cache, changes no completion."""

    def check(self, group_size: int) -> None:
        """Raise ValueError where the sizes cannot work with a group size."""
        micro = self.micro_batch
        if micro < 1 or (group_size % micro and micro % group_size):
            raise ValueError(
                f"batching.micro_batch ({micro}) must divide group_size ({group_size}) or be a multiple of it"
            )
        for name in ("minibatches", "passes", "rollout_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"batching.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Handling:
    """What happens to completions and groups that teach little."""

    truncated: Literal["keep", "mask", "penalize"] = "keep"
    """Completions cut by the length limit: scored as they are, left out of the loss, or docked by 1."""
    resample_rounds: int = 0
    """Times a group without reward variance is drawn again before it is skipped."""
    max_failed_frac: float = 0.1
    """Stop when a larger share of a batch's completions made a reward raise or return NaN (they score 0)."""
    max_nonfinite_steps: int = 5
    """Stop after so many optimizer steps in a row whose loss or gradient is not finite, keeping the last batch for
    `replay`; 0 goes on for ever. Such a step changes no weights, and is counted."""


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What one batch of rollouts teaches."""

    rollouts: Rollouts
    advantages: Tensor
    """float32 [R], or [R, T] where each token has its own."""
    mask: Tensor
    """bool [R, T]: tokens that count in the loss."""
    ref_logprobs: Tensor | None = None
    """float32 [R, T], or None without a KL term."""
    old_logprobs: Tensor | None = None
    """float32 [R, T], the policy's before the first update, where a correction needs them; else None."""
    old_values: Tensor | None = None
    """float32 [R, T], before the first update, where there is a value head; else None."""
    returns: Tensor | None = None
    """float32 [R, T], what those should have been."""

    def select(self, prompts: list[int]) -> Experience:
        """Some prompts' groups."""
        rows = self.rollouts.rows(prompts)
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rollouts"}
        chosen: dict[str, Any] = {name: None if tensor is None else tensor[rows] for name, tensor in tensors.items()}
        return Experience(rollouts=self.rollouts.select(prompts), **chosen)

    def minibatches(self, count: int, seed: int, ranks: Ranks = ALONE) -> Iterator[Experience]:
        """Split the prompts of all ranks, shuffled, into `count` equal parts (into one: as it is).

        Args:
            count: divides the number of prompts on all ranks together.
            seed: of the shuffling.
            ranks: rank r of n holds prompts r, r + n, r + 2n, ... of the batch, the same number on each; a part has
                what the rank holds of it, which may be none.
        """
        if count == 1:
            yield self
            return
        prompts = len(self.rollouts.prompt_ids) * ranks.size
        order = torch.randperm(prompts, generator=torch.Generator().manual_seed(seed)).tolist()
        size = prompts // count
        for start in range(0, size * count, size):
            part = sorted(order[start : start + size])
            yield self.select([p // ranks.size for p in part if p % ranks.size == ranks.rank])

    def micro_batches(self, size: int) -> Iterator[Experience]:
        """Cut into at most `size` completions; prompts of like length together, so that little is padded."""
        group = self.rollouts.group
        whole = self if size >= group else replace(self, rollouts=self.rollouts.split_groups(group // size))
        rollouts = whole.rollouts
        tokens = rollouts.lengths.view(len(rollouts.prompt_ids), -1).sum(1).tolist()
        order = sorted(range(len(tokens)), key=lambda p: tokens[p] + len(rollouts.prompt_ids[p]))
        prompts = max(1, size // group)
        for start in range(0, len(order), prompts):
            yield whole.select(order[start : start + prompts])


def check_resampling(group_size: int, handling: Handling) -> None:
    """Raise ValueError for groups of one, which never have a signal, that would be drawn again for lack of it."""
    if group_size == 1 and handling.resample_rounds:
        raise ValueError("handling.resample_rounds needs group_size of at least 2; raise it, or set the rounds to 0")


def check_settings(
    group_size: int,
    batching: Batching,
    sampling: Sampling,
    rewards: Collection[str],
    reward_weights: Collection[str] | None,
    least_group: int = 2,
) -> None:
    """Raise ValueError for settings that cannot work, before anything is loaded."""
    if group_size < least_group:
        why = ": a group of one has no baseline" if least_group > 1 else ""
        raise ValueError(f"group_size must be at least {least_group}, got {group_size}{why}")
    batching.check(group_size)
    if sampling.temperature == 0:
        raise ValueError("sampling.temperature must be positive in training: greedy groups are all alike")
    if not rewards:
        raise ValueError("rewards must name at least one reward")
    if unknown := set(reward_weights or {}) - set(rewards):
        raise ValueError(f"reward_weights names {sorted(unknown)}, rewards has {sorted(rewards)}")
