"""Dr. GRPO: GRPO done right, without its two biases (arXiv 2503.20783).

    A_i = R_i - mean(R) of the group
    loss = -(1 / (completions * max_tokens)) sum_i sum_t min(ratio A_i, clip(ratio) A_i)

What differs from GRPO: no division by the group's standard deviation, which favours problems that are too easy or too
hard; and no division by a completion's length, or by the tokens of the step, but by constants, so that long wrong
completions are not let off lightly. A token weighs less than in GRPO: the rate has to be higher by about max_tokens /
mean length, and by what the division by the standard deviation did, on the tiny run 10 times.

Run it, with ``--model.optimizer.lr 0.6``:
``python -m rlvr_lightning fit --config sgd.yaml --model rlvr_lightning.dr_grpo.DrGRPO``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlvr_lightning.grpo import GRPO
from rlvr_lightning.losses import Normalization, Objective


@dataclass(frozen=True, kw_only=True)
class DrGRPOObjective(Objective):
    """That of Dr. GRPO."""

    normalization: Normalization = "constant"


class DrGRPO(GRPO):
    """Train a causal LM on verifiable rewards, free of length and difficulty bias.

    Args:
        objective: the loss.
        kwargs: as of GRPO.
    """

    def __init__(self, *, objective: DrGRPOObjective = DrGRPOObjective(), **kwargs: Any) -> None:
        super().__init__(objective=objective, advantage="mean", **kwargs)
