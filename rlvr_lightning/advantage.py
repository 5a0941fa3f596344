"""Advantages of completions against the others of their group. Pure functions."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

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
        >>> import torch
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
        >>> import torch
        >>> has_signal(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2).tolist()
        [True, False]
    """
    grouped = rewards.view(-1, group)
    return (grouped != grouped[:, :1]).any(1)
