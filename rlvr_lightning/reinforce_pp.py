"""REINFORCE++: REINFORCE with PPO's clipping and advantages normalized over the whole batch (arXiv 2501.03262).

    A_t = reward - kl_coef * sum over s >= t of log(policy / reference)_s, minus its mean, over its standard deviation

What differs from GRPO: no baseline by group, so `group_size: 1` and many prompts will do; the KL term is taken off the
reward of each token, so that a token pays for itself and what comes behind it; mean and standard deviation are those of
all tokens of the batch, over all ranks, which is less noisy than a group's few and favours no problem.

With `baseline: mean` the group's mean is taken off each reward first (REINFORCE++-baseline, for groups of several); the
paper has the KL term in the loss then: `objective: {kl_in: loss, kl_estimator: k2}`.

Run it: ``python -m rlvr_lightning fit --config sgd.yaml --model rlvr_lightning.reinforce_pp.ReinforcePP``
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlvr_lightning.advantage import gae, group_advantages, standardized, token_rewards
from rlvr_lightning.experience import Experience
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.losses import Objective
from rlvr_lightning.rewards.score import Scores


@dataclass(frozen=True, kw_only=True)
class ReinforcePPObjective(Objective):
    """That of REINFORCE++."""

    kl_in: Literal["loss", "reward"] = "reward"


class ReinforcePP(GRPO):
    """Train a causal LM on verifiable rewards with advantages normalized over the whole batch.

    Args:
        objective: the loss.
        baseline: what is taken off a reward: nothing, or the mean of its group.
        kwargs: as of GRPO.

    Raises:
        ValueError: a baseline of groups of one.
    """

    least_group = 1

    def __init__(
        self,
        *,
        objective: ReinforcePPObjective = ReinforcePPObjective(),
        baseline: Literal["none", "mean"] = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(objective=objective, advantage="mean", **kwargs)
        if baseline == "mean" and self.group_size < 2:
            raise ValueError("baseline: mean needs group_size of at least 2; raise it, or set baseline: none")
        self.baseline = baseline

    def credit(self, found: Experience, rewards: Tensor, scores: Scores) -> Experience:
        """Returns to go of rewards and KL penalties, normalized over all tokens of all ranks."""
        if self.baseline == "mean":
            rewards = group_advantages(rewards, self.group_size, "mean")
        of_tokens = token_rewards(rewards, found.mask, self.kl_penalty(found))
        returns = gae(of_tokens, torch.zeros_like(of_tokens), found.mask)
        return replace(found, advantages=standardized(returns, found.mask, self.ranks))
