"""CISPO: clipped importance sampling policy optimization (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

    loss = -(1 / tokens) sum_i sum_t constant(clip(ratio_t, 1 - clip_low, 1 + clip_high)) * A_i * log policy_t

What differs from GRPO: the ratio is a weight, not part of what is differentiated. It is cut off above, and a token
whose ratio is cut off keeps its gradient, where PPO's surrogate gives it none: those are often the rare tokens at which
a completion takes a turn. The paper has no lower bound (`clip_low: 1` is none) and does not say its upper one; weights
of up to 5 are our choice. On strictly on-policy batches (one minibatch, one pass) every ratio is 1, and the gradient is
GRPO's; set `batching.minibatches` above 1. `tokens` are those of the whole step, of groups without signal included.

Run it: ``python -m rlvr_lightning fit --config sgd.yaml --model rlvr_lightning.cispo.CISPO``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlvr_lightning.grpo import GRPO
from rlvr_lightning.losses import Objective


@dataclass(frozen=True, kw_only=True)
class CISPOObjective(Objective):
    """That of CISPO."""

    surrogate: Literal["clip", "weight"] = "weight"
    clip_low: float = 1.0
    clip_high: float = 4.0


class CISPO(GRPO):
    """Train a causal LM on verifiable rewards with clipped importance weights.

    Args:
        objective: the loss.
        kwargs: as of GRPO.
    """

    def __init__(self, *, objective: CISPOObjective = CISPOObjective(), **kwargs: Any) -> None:
        super().__init__(objective=objective, **kwargs)
