"""Policy-gradient losses on tokens. Pure functions: tensors in, tensors out.

Every loss is a weighted *sum* over tokens, and the weights come from counts of the whole optimizer step (all
micro-batches, all ranks). So accumulation and sharding cannot change a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlvr_lightning.schema import LossOutput

KLEstimator = Literal["k1", "k2", "k3"]
Normalization = Literal["token", "sequence", "constant"]
KL_NAMES: dict[str, KLEstimator] = {"kl": "k3", "kl_k1": "k1", "kl_k2": "k2"}
"""Metrics where there is a reference; which estimator a KL term itself takes is another matter."""
Correction = Literal["none", "truncate", "mask"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The clipped surrogate and its terms."""

    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token (GRPO), or the geometric mean over its completion (GSPO)."""
    surrogate: Literal["clip", "weight"] = "clip"
    """clip: -min(ratio A, clip(ratio) A), so that what is clipped has no gradient (PPO); weight: -clip(ratio) A log p
    with the clipped ratio held constant, so that every token keeps one (CISPO)."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low. GSPO wants about 3e-4."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high (DAPO: 0.28). GSPO wants about 4e-4."""
    normalization: Normalization = "token"
    """token: every token weighs 1 / all tokens of the step; sequence: every completion weighs the same;
    constant: every token weighs 1 / (completions * max_tokens), free of length bias (Dr. GRPO)."""
    kl_coef: float = 0.0
    """Weight of KL(policy || reference). 0: no reference is built at all."""
    kl_estimator: KLEstimator = "k3"
    """k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, where d = log policy - log reference."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL term is: added to the loss; or k1 of every sampled token taken off the reward (RLOO, REINFORCE++,
    PPO), and then no gradient flows through it and `kl_estimator` is not used."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    correction: Literal["auto", "none", "truncate", "mask"] = "auto"
    """Of a sampler that is not quite the policy, by another program's rounding or by being older. none: the ratio's
    denominator is the sampler's log-prob; truncate: it is the trainer's own before the update, and each token's term is
    weighed by trainer over sampler, at most `correction_cap`; mask: tokens where that is outside 1/cap..cap are left
    out. auto: truncate with vLLM, else none."""
    correction_cap: float = 2.0

    def __post_init__(self) -> None:
        if self.correction_cap < 1:
            raise ValueError(f"objective.correction_cap must be at least 1, got {self.correction_cap}")
        for name in ("clip_low", "clip_high", "kl_coef", "entropy_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"objective.{name} must not be negative, got {getattr(self, name)}")

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss has a KL term."""
        return self.kl_coef > 0 and self.kl_in == "loss"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of one optimizer step, over all its micro-batches and ranks."""

    tokens: int
    """Completion tokens that count in the loss."""
    completions: int
    """Completions with at least one such token."""
    max_tokens: int
    """The limit on a completion's length."""


def kl_divergence(policy_logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimates of KL(policy || reference) from tokens drawn from the policy (Schulman, "Approximating KL divergence").

    With d = policy - reference: `k1` = d is unbiased and noisy; `k2` = d^2 / 2 is biased, of low variance, and its
    gradient is that of the true KL; `k3` = exp(-d) - 1 + d is unbiased and never negative.

    Args:
        policy_logprobs: float, any shape.
        ref_logprobs: same shape.
        estimator: k1, k2 or k3.

    Example:
        >>> d = torch.tensor([0.0, 1.0])
        >>> [[round(x, 4) for x in kl_divergence(d, torch.zeros(2), k).tolist()] for k in ("k1", "k2", "k3")]
        [[0.0, 1.0], [0.0, 0.5], [0.0, 0.3679]]
    """
    d = policy_logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.exp(-d) - 1 + d
    raise ValueError(f"objective.kl_estimator must be k1, k2 or k3, got {estimator!r}")


def token_weights(mask: Tensor, normalization: Normalization, counts: Counts) -> Tensor:
    """What each token weighs in the loss, float32 [R, T]; the weights of a whole step sum to 1 (`constant`: at most 1).

    Args:
        mask: bool [R, T], tokens that count.
        normalization: see `Objective`.
        counts: of the whole step, not of these R completions.

    Example:
        >>> mask = torch.tensor([[True, True, True], [True, False, False]])
        >>> token_weights(mask, "sequence", Counts(tokens=4, completions=2, max_tokens=5))[:, 0].tolist()
        [0.1666666716337204, 0.5]
    """
    ones = mask.float()
    if normalization == "token":
        return ones / max(counts.tokens, 1)
    if normalization == "sequence":
        return ones / ones.sum(1, keepdim=True).clamp(min=1) / max(counts.completions, 1)
    if normalization == "constant":
        return ones / max(counts.completions * counts.max_tokens, 1)
    raise ValueError(f"objective.normalization must be token, sequence or constant, got {normalization!r}")


def importance_ratio(policy_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, level: str) -> Tensor:
    """Policy over sampler: [R, T] by token, or [R, 1] by sequence (exp of the mean log-ratio; GSPO, 2507.18071)."""
    log_ratio = (policy_logprobs - rollout_logprobs) * mask
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return log_ratio.exp()


def correction_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, kind: Correction, cap: float) -> Tensor:
    """What each token's term is multiplied by, float32 [R, T], for the sampler not being the policy.

    Truncated importance sampling (Yao et al., "Your efficient RL framework secretly brings you off-policy RL
    training", 2025), and its harder kin that leaves tokens out.

    Args:
        old_logprobs: of the trainer, before the update.
        rollout_logprobs: of the sampler, same shape.
        kind: truncate or mask.
        cap: see `Objective.correction_cap`.

    Example:
        >>> old, rollout = torch.tensor([0.1, 0.6, 0.2]).log(), torch.tensor([0.4, 0.2, 0.16]).log()
        >>> correction_weights(old, rollout, "truncate", 2.0), correction_weights(old, rollout, "mask", 2.0)
        (tensor([0.2500, 2.0000, 1.2500]), tensor([0.0000, 0.0000, 1.2500]))
    """
    weights = (old_logprobs - rollout_logprobs).exp()
    if kind == "truncate":
        return weights.clamp(max=cap)
    return weights * ((weights <= cap) & (weights >= 1 / cap))


def policy_loss(  # noqa: PLR0913 (what there is to know of a token)
    policy_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    objective: Objective,
    counts: Counts,
    *,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
) -> LossOutput:
    """The clipped surrogate of PPO: the loss of GRPO and, by its settings and its advantages, of its kin.

    Sum over tokens of w * (-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_coef * KL -
    entropy_coef * entropy), with w from `token_weights` (arXiv 2402.03300, eq. 3, up to the normalization). With
    `surrogate: weight` the first term is -clip(ratio) * A * log policy, the clipped ratio held constant (arXiv
    2506.13585, eq. 4).

    Args:
        policy_logprobs: float32 [R, T], with gradient.
        rollout_logprobs: float32 [R, T], of the distribution the tokens were drawn from.
        advantages: float32 [R], or [R, T] where each token has its own.
        mask: bool [R, T].
        objective: which variant.
        counts: of the whole optimizer step.
        entropy: float32 [R, T] of the policy's distributions.
        ref_logprobs: float32 [R, T]; needed for a KL term in the loss, else only measured.
        old_logprobs: float32 [R, T], the trainer's before the first update on these rollouts, for a `correction`; None
            if this is that update.

    Returns:
        The loss, and sums over valid tokens of `ratio` (policy over sampler), `clipped`, `kl`, `entropy`, `rollout_kl`
        (k3 of sampler against policy), `rollout_gap` (|log policy - log sampler|), `corrected` (1 where the correction
        truncates or leaves out): divide by the token count to log; and of `rollout_gap` the maximum.
    """
    assert ref_logprobs is not None or not objective.kl_in_loss, "a KL term needs reference log-probs"
    # Filled, not multiplied by the mask: a masked token may hold an infinite value, and 0 * inf is NaN.
    policy_logprobs = policy_logprobs.masked_fill(~mask, 0.0)
    rollout_logprobs = rollout_logprobs.masked_fill(~mask, 0.0)
    valid = mask.float()
    per_token, metrics = _surrogate(policy_logprobs, rollout_logprobs, old_logprobs, advantages, mask, objective)
    if ref_logprobs is not None:
        ref_logprobs = ref_logprobs.masked_fill(~mask, 0.0)
        if objective.kl_in_loss:
            kl = kl_divergence(policy_logprobs, ref_logprobs, objective.kl_estimator)
            per_token = per_token + objective.kl_coef * kl
        for name, estimator in KL_NAMES.items():
            metrics[name] = (kl_divergence(policy_logprobs.detach(), ref_logprobs, estimator) * valid).sum()
    if entropy is not None:
        if objective.entropy_coef > 0:
            per_token = per_token - objective.entropy_coef * entropy
        metrics["entropy"] = (entropy.detach() * valid).sum()
    weights = token_weights(mask, objective.normalization, counts)
    gap = (policy_logprobs.detach() - rollout_logprobs).abs()
    metrics["rollout_gap"] = gap.sum()
    maxima = {"rollout_gap": gap.max() if gap.numel() else gap.sum()}
    return LossOutput(loss=(per_token * weights).sum(), metrics=metrics, maxima=maxima)


def _surrogate(
    policy_logprobs: Tensor,
    rollout_logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    objective: Objective,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped term of each token [R, T], and what is told of it; log-probs are 0 where masked."""
    metrics: dict[str, Tensor] = {}
    gain = advantages if advantages.ndim == 2 else advantages[:, None]
    denominator, weight = rollout_logprobs, mask.float()
    if objective.correction in ("truncate", "mask"):
        denominator = policy_logprobs.detach() if old_logprobs is None else old_logprobs.masked_fill(~mask, 0.0)
        weight = correction_weights(denominator, rollout_logprobs, objective.correction, objective.correction_cap)
        metrics["corrected"] = (((denominator - rollout_logprobs).exp() != weight) * mask).sum()
    ratio = importance_ratio(policy_logprobs, denominator, mask, objective.ratio)
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    with torch.no_grad():
        to_sampler = importance_ratio(policy_logprobs, rollout_logprobs, mask, objective.ratio)
        metrics["ratio"] = (to_sampler.expand_as(mask) * mask).sum()
        matters = (ratio * gain > clipped * gain) | (objective.surrogate == "weight")
        metrics["clipped"] = (((ratio != clipped) & matters).expand_as(mask) * mask).sum()
        metrics["rollout_kl"] = (kl_divergence(rollout_logprobs, policy_logprobs, "k3") * mask).sum()
    if objective.surrogate == "weight":
        return -clipped.detach() * gain * policy_logprobs * weight, metrics
    return -torch.minimum(ratio * gain, clipped * gain) * weight, metrics


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float) -> LossOutput:
    """Half the squared error of a value function, the larger of the clipped and the plain one.

    As in the PPO of OpenAI's baselines, which is not in the paper (arXiv 1707.06347).

    Sum over tokens of w / 2 * max((v - G)^2, (old + clip(v - old, -clip, clip) - G)^2): a value that has moved by more
    than `clip` towards its return has no gradient until the next rollouts.

    Args:
        values: float32 [R, T], with gradient; of the state in which each token was drawn.
        old_values: float32 [R, T], before the first update on these rollouts.
        returns: float32 [R, T], what the values should have been.
        weights: float32 [R, T], see `token_weights`; 0 where masked.
        clip: how far a value may move; 0 does not clip.

    Returns:
        The loss, and over valid tokens the sums of `value_loss` (unweighted) and `value_clipped`.

    Example:
        >>> v, old, returns = torch.tensor([[0.5, 1.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> out = value_loss(v, old, returns, torch.tensor([[0.5, 0.5]]), clip=0.2)
        >>> round(float(out.loss), 4), float(out.metrics["value_clipped"])  # (0.8^2 + 0.8^2) / 2 / 2
        (0.32, 2.0)
    """
    valid = weights > 0
    values, old_values, returns = (x.masked_fill(~valid, 0.0) for x in (values, old_values, returns))
    error = (values - returns).square() / 2
    if clip:
        held = (old_values + (values - old_values).clamp(-clip, clip) - returns).square() / 2
        clipped = held > error
        error = torch.maximum(error, held)
    else:
        clipped = torch.zeros_like(valid)
    metrics = {"value_loss": error.detach().sum(), "value_clipped": clipped.sum().float()}
    return LossOutput(loss=(error * weights).sum(), metrics=metrics)


def outcome_loss(process_rewards: Tensor, labels: Tensor, mask: Tensor, completions: int) -> LossOutput:
    """Cross-entropy of an implicit reward model: PRIME (arXiv 2502.01456), eq. 2 and 3.

    The logit of a completion being right is the sum of its tokens' rewards, beta * log(model / reference).

    Args:
        process_rewards: float32 [R, T], with gradient.
        labels: float32 [R], from 0 (wrong) to 1 (right).
        mask: bool [R, T]; completions without a token count as nothing.
        completions: that have one, in the whole step: the loss is their mean.

    Returns:
        The loss, and over completions the sums of `prm_loss` and `prm_right` (1 where the likelier side is the label,
        one half where neither is).

    Example:
        >>> out = outcome_loss(torch.zeros(2, 3), torch.tensor([1.0, 0.0]), torch.ones(2, 3).bool(), completions=4)
        >>> round(float(out.loss), 4), float(out.metrics["prm_right"])  # 2 ln 2 / 4
        (0.3466, 1.0)
    """
    logits = process_rewards.masked_fill(~mask, 0.0).sum(1)
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none") * mask.any(1)
    right = torch.where(logits == 0, 0.5, ((logits > 0) == (labels > 0.5)).float()) * mask.any(1)
    metrics = {"prm_loss": each.detach().sum(), "prm_right": right.sum()}
    return LossOutput(loss=each.sum() / max(completions, 1), metrics=metrics)
