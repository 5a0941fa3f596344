"""Losses on pairs of completions, and on single ones labelled good or bad. Pure functions: tensors in, tensors out.

All take log-probabilities summed over the tokens of a completion, and return sums divided by counts of the whole
optimizer step (all micro-batches, all ranks), so that accumulation and sharding cannot change a gradient. `metrics` are
sums over pairs or completions. In a pair column 0 is the chosen side, column 1 the rejected one.

An implicit reward is what the loss takes a completion to be worth: beta * log(policy / reference) (DPO, IPO, KTO), or
beta times the mean log-probability of its tokens (SimPO), or that mean (ORPO).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlvr_lightning.schema import LossOutput

PairLoss = Literal["sigmoid", "ipo"]


def pair_metrics(rewards: Tensor) -> dict[str, Tensor]:
    """Sums over pairs of what is logged as `rewards/...`, and the number of `pairs`; equal rewards are half accurate.

    Args:
        rewards: float32 [P, 2], implicit.

    Example:
        >>> found = pair_metrics(torch.tensor([[1.0, 0.5], [0.0, 0.0]]))
        >>> {name: float(value) for name, value in found.items()}
        {'chosen': 1.0, 'rejected': 0.5, 'margin': 0.5, 'accuracy': 1.5, 'pairs': 2.0}
    """
    chosen, rejected = rewards.detach().unbind(1)
    accurate = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    found = {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected, "accuracy": accurate}
    return {name: values.sum() for name, values in found.items()} | {"pairs": torch.tensor(float(len(rewards)))}


def dpo_loss(
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    beta: float,
    pairs: int,
    kind: PairLoss = "sigmoid",
    label_smoothing: float = 0.0,
) -> LossOutput:
    """DPO (arXiv 2305.18290, eq. 7; smoothed as in its conservative form), or IPO (arXiv 2310.12036, eq. 17).

    With h = log(policy / reference) of the chosen side less that of the rejected one, a pair costs

        sigmoid:  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)      ipo:  (h - 1 / (2 beta))^2

    Args:
        policy_logprobs: float32 [P, 2], with gradient.
        ref_logprobs: float32 [P, 2].
        beta: how much the policy is held to the reference.
        pairs: of the whole optimizer step.
        kind: `sigmoid` (DPO) or `ipo`.
        label_smoothing: e, the share of labels taken to be wrong.

    Example:
        >>> same = torch.zeros(1, 2)
        >>> round(float(dpo_loss(same, same, 0.1, 1).loss), 4), float(dpo_loss(same, same, 0.1, 1, "ipo").loss)
        (0.6931, 25.0)
    """
    ratios = policy_logprobs - ref_logprobs
    h = ratios[:, 0] - ratios[:, 1]
    if kind == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        losses = -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)
    return LossOutput(loss=losses.sum() / pairs, metrics=pair_metrics(beta * ratios))


def simpo_loss(policy_logprobs: Tensor, lengths: Tensor, beta: float, margin: float, pairs: int) -> LossOutput:
    """SimPO (arXiv 2405.14734, eq. 6): no reference, rewards by the mean log-probability of a token.

    A pair costs -log sigmoid(beta (m_chosen - m_rejected) - margin), m the mean over a side's tokens.

    Args:
        policy_logprobs: float32 [P, 2], with gradient.
        lengths: int64 [P, 2], tokens.
        beta: scale of the rewards.
        margin: by which the chosen side's reward should be higher.
        pairs: of the whole optimizer step.

    Example:
        >>> even = torch.tensor([[-2.0, -6.0]])  # of 2 and 6 tokens
        >>> round(float(simpo_loss(even, torch.tensor([[2, 6]]), 2.0, 0.0, 1).loss), 4)
        0.6931
    """
    rewards = beta * policy_logprobs / lengths
    losses = -logsigmoid(rewards[:, 0] - rewards[:, 1] - margin)
    return LossOutput(loss=losses.sum() / pairs, metrics=pair_metrics(rewards))


def orpo_loss(policy_logprobs: Tensor, lengths: Tensor, weight: float, pairs: int, chosen_tokens: int) -> LossOutput:
    """ORPO (arXiv 2403.07691, eq. 6 and 7): imitation of the chosen side, and a term on the ratio of odds.

    With p the geometric mean of a side's token probabilities and odds = p / (1 - p), a step costs

        mean over all chosen tokens of -log p(token)  +  weight * mean over pairs of -log sigmoid(log(odds_c / odds_r))

    Args:
        policy_logprobs: float32 [P, 2], with gradient.
        lengths: int64 [P, 2], tokens.
        weight: of the odds' term (lambda).
        pairs: of the whole optimizer step.
        chosen_tokens: likewise, of the chosen sides.

    Example:
        >>> half = torch.full((1, 2), 0.5).log()  # one token each, odds of 1
        >>> round(float(orpo_loss(half, torch.ones(1, 2), 0.1, 1, 1).loss), 4)  # log 2 + 0.1 log 2
        0.7625
    """
    means = policy_logprobs / lengths
    odds = means - torch.log(-torch.expm1(means.clamp(max=-1e-7)))  # a certain side would have infinite odds
    nll = -policy_logprobs[:, 0].sum()
    preference = -logsigmoid(odds[:, 0] - odds[:, 1]).sum()
    told = {"nll": nll.detach(), "tokens": lengths[:, 0].sum()}
    return LossOutput(loss=nll / chosen_tokens + weight * preference / pairs, metrics=pair_metrics(means) | told)


def kto_loss(
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    good: Tensor,
    kl: float,
    beta: float,
    weights: tuple[float, float],
    completions: int,
) -> LossOutput:
    """KTO (arXiv 2402.01306, eq. 8): completions are gains or losses against the divergence from the reference.

    With r = log(policy / reference), a good completion costs w_good (1 - sigmoid(beta (r - kl))), a bad one
    w_bad (1 - sigmoid(beta (kl - r))).

    Args:
        policy_logprobs: float32 [R], with gradient.
        ref_logprobs: float32 [R].
        good: bool [R].
        kl: what `kto_kl` estimates, of the whole step; no gradient flows through it.
        beta: how sharply value saturates, and how much the policy is held to the reference.
        weights: of the good and of the bad ones.
        completions: of the whole optimizer step.

    Example:
        >>> even = torch.zeros(2)
        >>> float(kto_loss(even, even, torch.tensor([True, False]), 0.0, 0.1, (1.0, 1.0), 2).loss)
        0.5
    """
    ratios = policy_logprobs - ref_logprobs
    sign = good.float() * 2 - 1
    weight = torch.where(good, weights[0], weights[1])
    losses = weight * (1 - torch.sigmoid(beta * sign * (ratios - kl)))
    rewards, is_good = beta * ratios.detach(), good.float()
    told = {"chosen": (rewards * is_good).sum(), "rejected": (rewards * (1 - is_good)).sum()}
    told |= {"good": is_good.sum(), "bad": (1 - is_good).sum(), "completions": torch.tensor(float(len(ratios)))}
    side = sign * (ratios.detach() - kl)
    told |= {"accurate": ((side > 0).float() + 0.5 * (side == 0).float()).sum()}
    told |= {"kl": kl * told["completions"]}
    return LossOutput(loss=losses.sum() / completions, metrics=told)


def kto_kl(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KTO's estimate of KL(policy || reference) from completions behind the prompts of others; never negative.

    Args:
        policy_logprobs: float32 [R], of mismatched completions, of the whole optimizer step.
        ref_logprobs: float32 [R].

    Returns:
        A scalar; 0 of no completions.

    Example:
        >>> float(kto_kl(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -2.0]))), float(kto_kl(*torch.zeros(2, 0)))
        (0.5, 0.0)
    """
    return (policy_logprobs - ref_logprobs).sum().div(max(1, len(policy_logprobs))).clamp(min=0)
