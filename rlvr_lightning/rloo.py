"""RLOO: REINFORCE with a leave-one-out baseline (arXiv 2402.14740), over GRPO's step.

    A_i = R_i - mean of R_j over the others j of the group,    R = reward - kl_coef * sum_t log(policy / reference)_t
    loss = -(1 / completions) sum_i A_i log policy(completion i), up to the constant factor max_tokens

What differs from GRPO: the baseline leaves the completion itself out and nothing is divided by a standard deviation;
the KL term is part of the reward; a completion is one action, so its tokens' log-probs are summed and not averaged.
With `batching.minibatches` or `passes` above 1 the tokens' ratios are clipped, as in PPO; the paper takes one step.

Tokens weigh less than in GRPO, and advantages are not divided: the rate has to be higher, on the tiny run 10 times.

Run it, with ``--model.optimizer.lr 0.6``:
``python -m rlvr_lightning fit --config sgd.yaml --model rlvr_lightning.rloo.RLOO``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlvr_lightning.grpo import GRPO
from rlvr_lightning.losses import Normalization, Objective


@dataclass(frozen=True, kw_only=True)
class RLOOObjective(Objective):
    """That of RLOO."""

    normalization: Normalization = "constant"
    kl_in: Literal["loss", "reward"] = "reward"


class RLOO(GRPO):
    """Train a causal LM on verifiable rewards with a leave-one-out baseline.

    Args:
        objective: the loss.
        kwargs: as of GRPO.
    """

    def __init__(self, *, objective: RLOOObjective = RLOOObjective(), **kwargs: Any) -> None:
        super().__init__(objective=objective, advantage="leave_one_out", **kwargs)
