"""Advantages: of completions against the others of their group, and of single tokens. Pure functions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlvr_lightning.ranks import ALONE, Ranks

Baseline = Literal["mean", "mean_std", "leave_one_out"]


def group_advantages(rewards: Tensor, group: int, baseline: Baseline = "mean_std", eps: float = 1e-4) -> Tensor:
    """How much better each completion did than its group.

    - `mean`: r - mean(r) (Dr. GRPO, arXiv 2503.20783)
    - `mean_std`: (r - mean(r)) / (std(r) + eps), std with Bessel's correction (GRPO, arXiv 2402.03300)
    - `leave_one_out`: r - mean of the *other* rewards = G / (G - 1) * (r - mean(r)) (RLOO, arXiv 2402.14740)

    Args:
        rewards: float [R], R = P * G, group-major.
        group: G, at least 2.
        baseline: one of the above.
        eps: keeps near-constant groups from being blown up.

    Returns:
        float [R]; 0 for every completion of a group whose rewards are all equal.

    Raises:
        ValueError: a group of one has no baseline; or R is not a multiple of G.

    Example:
        >>> group_advantages(torch.tensor([3.0, 0.0, 0.0, 2.0, 2.0, 2.0]), 3, "leave_one_out").tolist()
        [3.0, -1.5, -1.5, 0.0, 0.0, 0.0]
    """
    if group < 2:
        raise ValueError(f"group_size must be at least 2 for a group baseline, got {group}")
    if len(rewards) % group:
        raise ValueError(f"rewards: {len(rewards)} are not whole groups of {group}")
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    # Equal rewards: the mean may round away from them, and a tiny std would turn that into a signal.
    centred = centred.masked_fill(~has_signal(rewards, group)[:, None], 0.0)
    if baseline == "mean_std":
        centred = centred / (grouped.std(1, keepdim=True) + eps)
    elif baseline == "leave_one_out":
        centred = centred * (group / (group - 1))
    elif baseline != "mean":
        raise ValueError(f"advantage must be mean, mean_std or leave_one_out, got {baseline!r}")
    return centred.flatten()


def has_signal(rewards: Tensor, group: int) -> Tensor:
    """Bool [P]: True for groups whose rewards are not all equal, the only ones that teach.

    Example:
        >>> has_signal(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2).tolist()
        [True, False]
    """
    grouped = rewards.view(-1, group)
    return (grouped != grouped[:, :1]).any(1)


def teaches(advantages: Tensor, mask: Tensor, group: int) -> Tensor:
    """Bool [P]: True for groups in which some token that counts has an advantage other than 0.

    Args:
        advantages: float [R] or [R, T].
        mask: bool [R, T].
        group: G.

    Example:
        >>> mask = torch.tensor([[True, False], [True, True]])
        >>> teaches(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), mask, 1).tolist(), teaches(torch.ones(2), mask, 2).tolist()
        ([False, False], [True])
    """
    each = advantages if advantages.ndim == 2 else advantages[:, None]
    return ((each != 0) & mask).any(1).view(-1, group).any(1)


def of_completions(advantages: Tensor, mask: Tensor) -> Tensor:
    """Float [R]: of completions, their own, or the mean over those of their tokens that count.

    Args:
        advantages: float [R] or [R, T].
        mask: bool [R, T].

    Example:
        >>> of_completions(torch.tensor([[1.0, 2.0], [3.0, 9.0]]), torch.tensor([[True, True], [True, False]])).tolist()
        [1.5, 3.0]
    """
    if advantages.ndim == 1:
        return advantages
    return advantages.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def token_rewards(rewards: Tensor, mask: Tensor, penalty: Tensor | None = None) -> Tensor:
    """Rewards of tokens: a completion's own at its last token that counts, less a penalty of every one.

    Args:
        rewards: float [R].
        mask: bool [R, T], left-aligned; a completion without a token loses its reward.
        penalty: float [R, T], such as a weighted KL estimate.

    Returns:
        float [R, T], 0 where masked.

    Example:
        >>> token_rewards(torch.tensor([1.0, 2.0]), torch.tensor([[True, True], [True, False]])).tolist()
        [[0.0, 1.0], [2.0, 0.0]]
    """
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    out = rewards[:, None] * last
    return out if penalty is None else (out - penalty).masked_fill(~mask, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 1.0) -> Tensor:
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16): A_t = delta_t + gamma lam A_(t+1).

    With delta_t = r_t + gamma v_(t+1) - v_t, and nothing to come behind the last token. With lam 1 the advantages plus
    the values are the discounted returns to go, and with values of 0 the advantages are.

    Args:
        rewards: float [R, T].
        values: float [R, T], of the state in which each token was drawn.
        mask: bool [R, T], left-aligned.
        gamma: discount of a token.
        lam: 1 trusts the rewards alone, 0 the values of the next state.

    Returns:
        float [R, T], 0 where masked.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.75]])
        >>> gae(rewards, values, torch.ones(1, 3).bool(), lam=0.5).tolist()  # deltas 0, 0.25, 0.25
        [[0.1875, 0.375, 0.25]]
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    later = next_value = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):  # behind the end all is 0, and stays it
        later = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * later
        advantages[:, t], next_value = later, values[:, t]
    return advantages


def standardized(values: Tensor, mask: Tensor, ranks: Ranks = ALONE, eps: float = 1e-4) -> Tensor:
    """(x - mean) / (std + eps) over the tokens that count of all ranks, std with Bessel's correction.

    Args:
        values: float [R, T] of this rank.
        mask: bool [R, T].
        ranks: that each have a share of the batch, and call this together.
        eps: keeps a nearly constant batch from being blown up.

    Returns:
        float [R, T], 0 where masked, and everywhere if all are equal.

    Example:
        >>> standardized(torch.tensor([[1.0, 2.0], [3.0, 9.0]]), torch.tensor([[True, True], [True, False]]), eps=0.0)
        tensor([[-1.,  0.],
                [ 1.,  0.]])
    """
    chosen = values[mask].double()
    count, total = ranks.sum(torch.stack([chosen.new_tensor(len(chosen)), chosen.sum()])).tolist()
    mean = chosen.new_tensor(total / max(count, 1)).to(values.dtype)  # that of equal values is their value again
    squares = float(ranks.sum((chosen - mean).square().sum()))
    std = (squares / max(count - 1, 1)) ** 0.5
    return ((values - mean) / (std + eps)).masked_fill(~mask, 0.0)


def process_advantages(process: Tensor, rewards: Tensor, mask: Tensor, group: int, gamma: float = 1.0) -> Tensor:
    """Returns to go of process rewards and outcomes, each against the others of the group: PRIME (arXiv 2502.01456).

    Eq. 5: A_t = sum over s >= t of gamma^(s - t) * (process_s - mean over others j of their mean process reward) +
    reward - mean over others j of their reward. Completions without a token that counts have no process reward, and are
    not among the others of that mean; of outcomes they are.

    Args:
        process: float [R, T], reward of each token.
        rewards: float [R], of the outcomes.
        mask: bool [R, T].
        group: G, at least 2.
        gamma: discount of a token.

    Returns:
        float [R, T], 0 where masked.

    Example:
        >>> process = torch.tensor([[0.5, 0.5], [0.1, 0.3]])
        >>> mask = torch.ones(2, 2).bool()
        >>> process_advantages(process, torch.tensor([1.0, 0.0]), mask, 2)  # baselines 0.2 and 0.5
        tensor([[ 1.6000,  1.3000],
                [-1.6000, -1.2000]])
    """
    outcome = group_advantages(rewards, group, "leave_one_out")
    means = process.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    grouped, there = means.view(-1, group), mask.any(1).view(-1, group)  # the means of the others are 0
    others = (there.sum(1, keepdim=True) - there.long()).clamp(min=1)
    baseline = ((grouped.sum(1, keepdim=True) - grouped) / others).flatten()
    returns = gae(process - baseline[:, None], torch.zeros_like(process), mask, gamma)
    return (returns + outcome[:, None]).masked_fill(~mask, 0.0)
