"""DAPO: decoupled clip and dynamic sampling (arXiv 2503.14476).

    loss = -(1 / tokens) sum_i sum_t min(ratio A_i, clip(ratio, 1 - 0.2, 1 + 0.28) A_i),    A as in GRPO

What differs from GRPO, and what it is called there: the ratio may rise further than it may fall (*clip-higher*), which
keeps rare tokens alive; every token of the step weighs the same (*token-level loss*); groups that are all right or all
wrong are drawn again (*dynamic sampling*); completions that fill the last fifth of their room are docked by up to 1
(*soft overlong punishment*, `rewards.shape.LengthPenalty`); no KL term, so no reference.

What differs from the paper: it fills the batch with other problems, and goes on until it is full; here the same
problems are drawn again, at most `handling.resample_rounds` times, and what is still all right or all wrong then, and
differs by length alone, teaches nothing. Its tokens still count in the loss's denominator, which is of the whole step,
so a step on few groups is a smaller one. `reward/mean_first_draw` tells of the policy; `reward/mean` is of what was
chosen by its rewards.

Run it: ``python -m rlvr_lightning fit --config dapo.yaml``
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rlvr_lightning.advantage import has_signal
from rlvr_lightning.experience import Experience, Handling
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.losses import Objective
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.score import Scores
from rlvr_lightning.rewards.shape import LengthPenalty
from rlvr_lightning.schema import Rollouts, Sampling


@dataclass(frozen=True, kw_only=True)
class DAPOObjective(Objective):
    """That of DAPO."""

    clip_high: float = 0.28


@dataclass(frozen=True, kw_only=True)
class DAPOHandling(Handling):
    """That of DAPO."""

    resample_rounds: int = 3


class DAPO(GRPO):
    """Train a causal LM on verifiable rewards with clip-higher, dynamic sampling and overlong punishment.

    Args:
        rewards: parts of the reward by name; the first is the verifier. The overlong punishment is added as `overlong`.
        objective: the loss.
        sampling: how completions are drawn in training.
        handling: truncated completions, groups without signal, failing rewards.
        overlong_tokens: the punishment begins so many tokens before `sampling.max_tokens`; 0 punishes nothing. A fifth
            of them by default, as in the paper.
        kwargs: as of GRPO.

    Raises:
        ValueError: a reward is named `overlong` already.
    """

    def __init__(
        self,
        *,
        rewards: dict[str, Reward],
        objective: DAPOObjective = DAPOObjective(),
        sampling: Sampling = Sampling(),  # noqa: B008
        handling: DAPOHandling = DAPOHandling(),
        overlong_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        buffer = max(1, sampling.max_tokens // 5) if overlong_tokens is None else overlong_tokens
        if buffer:
            if "overlong" in rewards:
                raise ValueError("rewards.overlong is DAPO's own; rename it, or set overlong_tokens: 0")
            rewards = rewards | {"overlong": LengthPenalty(sampling.max_tokens, buffer)}
        super().__init__(rewards=rewards, objective=objective, sampling=sampling, handling=handling, **kwargs)
        self.overlong_tokens = buffer

    def credit(self, found: Experience, rewards: Tensor, scores: Scores) -> Experience:
        """As in GRPO, but of groups that are all right or all wrong: no advantages, which would be of length alone."""
        found = super().credit(found, rewards, scores)
        dull = ~self.with_signal(found.rollouts, scores).to(rewards.device).repeat_interleave(self.group_size)
        return replace(found, advantages=found.advantages.masked_fill(dull, 0.0))

    def with_signal(self, rollouts: Rollouts, scores: Scores) -> Tensor:
        """Bool [P]: groups that are neither all right nor all wrong, whatever their lengths."""
        return has_signal(scores.parts[next(iter(self.scorer.rewards))], self.group_size)
