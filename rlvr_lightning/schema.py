"""The words every room shares: the legend of axes and the few dataclasses that cross rooms.

Legend of axes (no other letters are used for tensor shapes anywhere):

    P  prompts            G  completions of one prompt (the group)
    R  rollouts = P * G, group-major: rollout r belongs to prompt r // G
    S  prompt tokens      T  completion tokens, padded on the right
    V  vocabulary         H  hidden size
    L  tokens of a packed row (a prompt and some of its completions)

Policies are never confused: ``policy_logprobs`` (being trained), ``rollout_logprobs`` (the sampler's, when the tokens
were drawn), ``ref_logprobs`` (the frozen reference). In every mask True means "counts".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn."""

    max_tokens: int = 64
    """Hard limit on the tokens of a completion, the stop token included."""
    temperature: float = 1.0
    """Logits are divided by it; 0 means greedy."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"sampling.max_tokens must be at least 1, got {self.max_tokens}")
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k must be 0 (off) or more, got {self.top_k}")


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Completions sampled for P prompts, G for each, as an engine returns them."""

    prompt_ids: list[list[int]]
    """P prompts, token ids, unpadded."""
    completion_ids: Tensor
    """int64 [R, T]: sampled tokens, the stop token included, padded on the right."""
    completion_mask: Tensor
    """bool [R, T]: True where a token was sampled."""
    rollout_logprobs: Tensor
    """float32 [R, T]: log-probability of each token under the distribution it was drawn from; 0 where masked."""
    truncated: Tensor
    """bool [R]: True where the length limit, not a stop token, ended the completion."""

    @property
    def group(self) -> int:
        """Completions per prompt, G."""
        return self.completion_ids.shape[0] // max(1, len(self.prompt_ids))

    @property
    def lengths(self) -> Tensor:
        """int64 [R]: sampled tokens of each completion."""
        return self.completion_mask.sum(-1)

    def split_groups(self, parts: int) -> Rollouts:
        """The same rollouts seen as P * parts prompts with G / parts completions each."""
        if self.group % parts:
            raise ValueError(f"parts must divide the group of {self.group}, got {parts}")
        return replace(self, prompt_ids=[p for p in self.prompt_ids for _ in range(parts)])

    def rows(self, prompts: Sequence[int]) -> Tensor:
        """int64: the rollouts of some prompts, whole groups, in the order given."""
        group = self.group
        rows = [p * group + g for p in prompts for g in range(group)]
        return torch.tensor(rows, dtype=torch.long, device=self.completion_ids.device)

    def select(self, prompts: Sequence[int]) -> Rollouts:
        """The rollouts of some prompts, whole groups, in the order given."""
        rows = self.rows(prompts)
        return Rollouts(
            prompt_ids=[self.prompt_ids[p] for p in prompts],
            completion_ids=self.completion_ids[rows],
            completion_mask=self.completion_mask[rows],
            rollout_logprobs=self.rollout_logprobs[rows],
            truncated=self.truncated[rows],
        )

    def with_replaced(self, prompts: Sequence[int], new: Rollouts) -> Rollouts:
        """These rollouts with the groups of some prompts exchanged for newly sampled ones."""
        width = max(self.completion_ids.shape[1], new.completion_ids.shape[1])
        rows = self.rows(prompts)

        def merged(old: Tensor, fresh: Tensor) -> Tensor:
            out = torch.nn.functional.pad(old, (0, width - old.shape[1]))
            out[rows] = torch.nn.functional.pad(fresh, (0, width - fresh.shape[1]))
            return out

        return replace(
            self,
            completion_ids=merged(self.completion_ids, new.completion_ids),
            completion_mask=merged(self.completion_mask, new.completion_mask),
            rollout_logprobs=merged(self.rollout_logprobs, new.rollout_logprobs),
            truncated=self.truncated.index_copy(0, rows, new.truncated),
        )


def one_token(token: int, device: torch.device) -> Rollouts:
    """The smallest rollouts there are: a prompt and a completion of one token each."""
    one = torch.full((1, 1), token, device=device)
    return Rollouts(
        prompt_ids=[[token]],
        completion_ids=one,
        completion_mask=torch.ones_like(one, dtype=torch.bool),
        rollout_logprobs=torch.zeros_like(one, dtype=torch.float32),
        truncated=torch.zeros(1, dtype=torch.bool, device=device),
    )


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """A loss and what is worth logging of it."""

    loss: Tensor
    """Scalar, differentiable."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars, *summed* over valid tokens, so that micro-batches add up; divide by the token count to log."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars, the largest over valid tokens; of several micro-batches the largest counts."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a reward sees of one completion."""

    prompt: str
    text: str
    """The decoded completion, without special tokens."""
    token_ids: list[int]
    """The sampled tokens, the stop token included."""
    record: Mapping[str, Any]
    """The data record the prompt came from: `answer`, `task`, and whatever else the data set holds."""
    truncated: bool = False


class RolloutEngine(Protocol):
    """Draws completions from the current policy."""

    def generate(
        self, prompts: Sequence[Sequence[int]], group: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Rollouts:
        """Sample `group` completions of each prompt.

        Args:
            prompts: P lists of token ids.
            group: G, completions per prompt.
            sampling: limits and temperature.
            seeds: P integers. Completion g of prompt p depends on the weights, `prompts[p]`, `seeds[p]` and g alone:
                neither on the other prompts of the call nor on how the engine batches them.
        """
        ...
