"""PPO: proximal policy optimization with a value head and generalized advantages (arXiv 1707.06347, 1506.02438).

    r_t = -kl_coef * log(policy / reference)_t, and the reward on top of a completion's last token
    A_t = sum over k of (gamma lam)^k delta_(t+k),    delta_t = r_t + gamma v_(t+1) - v_t, standardized over the batch
    loss = -(1 / tokens) sum_t min(ratio A_t, clip(ratio) A_t) + (1 / tokens) sum_t value loss_t

What differs from GRPO: a value function says what a completion is worth so far, so that each token has an advantage of
its own and no group is needed (`group_size: 1` will do); groups without signal are learned from, too.

The value function is a linear head on the policy's last hidden states, which it reads and does not shape
(`value_head.py`): a separate critic would double the memory for weights, gradients and optimizer state, which is what
this package is there to save, but could tell more. `memory/critic_bytes` says what the head takes and
`value/explained_variance` what it is worth. It is a parameter group of the same optimizer, with a rate of its own, and
shares the policy's backward pass; `max_grad_norm` is of both together.

That advantages are standardized and values are clipped is of OpenAI's baselines, not of the paper.

With `gamma: 1` and `lam: 1`, the defaults, an advantage is what the completion earned less what was expected then.

Run it: ``python -m rlvr_lightning fit --config ppo.yaml``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from rlvr_lightning.advantage import gae, standardized, token_rewards
from rlvr_lightning.experience import Experience
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.losses import Counts, Objective, token_weights, value_loss
from rlvr_lightning.policy import Policy, TokenLogprobs
from rlvr_lightning.rewards.score import Scores
from rlvr_lightning.schema import LossOutput
from rlvr_lightning.telling import trained_bytes


@dataclass(frozen=True, kw_only=True)
class PPOObjective(Objective):
    """That of PPO."""

    kl_in: Literal["loss", "reward"] = "reward"


class PPO(GRPO):
    """Train a causal LM on verifiable rewards with a value head.

    Args:
        objective: the loss.
        gamma: discount of a token.
        lam: of generalized advantage estimation: 1 trusts the rewards alone, lower values the value head more.
        value_lr: learning rate of the value head; the optimizer's own by default. Up to 1 under SGD, about 0.05 under
            AdamW.
        value_clip: how far a value may move in the updates on one batch of rollouts; 0 does not hold it.
        kwargs: as of GRPO.

    Raises:
        ValueError: a setting out of its range.
    """

    least_group = 1
    beside = ("policy.value_head.",)

    def __init__(
        self,
        *,
        objective: PPOObjective = PPOObjective(),
        gamma: float = 1.0,
        lam: float = 1.0,
        value_lr: float | None = None,
        value_clip: float = 0.2,
        **kwargs: Any,
    ) -> None:
        for name, value in (("gamma", gamma), ("lam", lam)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if value_clip < 0 or (value_lr is not None and value_lr < 0):
            raise ValueError(f"value_lr and value_clip must not be negative, got {value_lr} and {value_clip}")
        super().__init__(objective=objective, advantage="mean", **kwargs)
        self.gamma, self.lam, self.value_lr, self.value_clip = gamma, lam, value_lr, value_clip

    def _new_policy(self, empty: bool) -> Policy:
        policy = super()._new_policy(empty)
        policy.add_value_head()
        return policy

    def groups(self) -> list[Any]:
        """The policy, and the value head as a group of its own."""
        head = list(cast(torch.nn.Module, self.policy.value_head).parameters())
        rate = {} if self.value_lr is None else {"lr": self.value_lr}
        of_policy = [p for p in self.policy.model.parameters() if p.requires_grad]
        return [{"params": of_policy}, {"params": head, "critic": True} | rate]

    def credit(self, found: Experience, rewards: Tensor, scores: Scores) -> Experience:
        """Generalized advantages by the values of now, standardized over all tokens of all ranks."""
        self._phase("values")
        values = self._without_grad(lambda some, heat: cast(Tensor, self.policy(some, heat).values), found.rollouts)
        of_tokens = token_rewards(rewards, found.mask, self.kl_penalty(found))
        advantages = gae(of_tokens, values, found.mask, self.gamma, self.lam)
        returns = advantages + values
        self.log_dict(self._about_values(values, returns, found.mask))
        advantages = standardized(advantages, found.mask, self.ranks)
        return replace(found, advantages=advantages, old_values=values, returns=returns)

    @property
    def needs_all(self) -> bool:
        """The value head learns from every token."""
        return True

    def loss_of_tokens(self, now: TokenLogprobs, micro: Experience, counts: Counts) -> LossOutput:
        """The policy's loss and the value head's."""
        out = super().loss_of_tokens(now, micro, counts)
        weights = token_weights(micro.mask, self.objective.normalization, counts)
        values, old_values, returns = (cast(Tensor, x) for x in (now.values, micro.old_values, micro.returns))
        more = value_loss(values, old_values, returns, weights, self.value_clip)
        return replace(out, loss=out.loss + more.loss, metrics=out.metrics | more.metrics)

    def _about_values(self, values: Tensor, returns: Tensor, mask: Tensor) -> dict[str, float]:
        """How well the values of now foretell the returns, over the tokens of all ranks."""
        v, g = values[mask].double(), returns[mask].double()
        parts = [v.new_tensor(len(v)), v.sum(), g.sum(), g.square().sum(), (g - v).sum(), (g - v).square().sum()]
        count, sum_v, sum_g, squares_g, sum_off, squares_off = self.ranks.sum(torch.stack(parts)).tolist()
        count = max(count, 1)
        told = {"value/mean": sum_v / count, "value/return_mean": sum_g / count}
        if (variance := squares_g / count - (sum_g / count) ** 2) > 1e-12:
            unexplained = squares_off / count - (sum_off / count) ** 2
            told["value/explained_variance"] = 1 - unexplained / variance
        return told

    def tell(self, made: Mapping[str, float]) -> dict[str, float]:
        """Of all updates of a batch: the value head's loss, and what it takes."""
        sums = torch.tensor([made.get(name, 0.0) for name in ("value_loss", "value_clipped", "tokens")]).double()
        loss, clipped, tokens = self.ranks.sum(sums).tolist()
        told = {"value/loss": loss / max(tokens, 1), "value/clip_frac": clipped / max(tokens, 1)}
        head = list(cast(torch.nn.Module, self.policy.value_head).parameters())
        return told | {"memory/critic_bytes": trained_bytes(self, head, self.updates.optimizer)}
