"""GSPO: group sequence policy optimization (arXiv 2507.18071).

    s_i = (policy(completion i) / sampler(completion i)) ^ (1 / length)
    loss = -(1 / completions) sum_i min(s_i A_i, clip(s_i, 1 - 3e-4, 1 + 4e-4) A_i),    A as in GRPO

What differs from GRPO: one importance ratio for a whole completion, the geometric mean of its tokens', clipped in a
much narrower range; every completion weighs the same, whatever its length. On strictly on-policy batches (one
minibatch, one pass) every ratio is 1, and GSPO is GRPO with `normalization: sequence`; the paper has
`batching.minibatches: 4`.

Run it: ``python -m rlvr_lightning fit --config sgd.yaml --model rlvr_lightning.gspo.GSPO``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlvr_lightning.grpo import GRPO
from rlvr_lightning.losses import Normalization, Objective


@dataclass(frozen=True, kw_only=True)
class GSPOObjective(Objective):
    """That of GSPO; the paper's clip range."""

    ratio: Literal["token", "sequence"] = "sequence"
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    normalization: Normalization = "sequence"


class GSPO(GRPO):
    """Train a causal LM on verifiable rewards with importance ratios of whole completions.

    Args:
        objective: the loss.
        kwargs: as of GRPO.
    """

    def __init__(self, *, objective: GSPOObjective = GSPOObjective(), **kwargs: Any) -> None:
        super().__init__(objective=objective, **kwargs)
