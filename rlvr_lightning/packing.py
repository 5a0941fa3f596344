"""Rows for one forward pass: a prompt once, its completions behind it, each blind to the others.

A row holds ``prompt | completion | completion | ...``. Every completion continues the prompt's positions and attends to
the prompt and to itself, so the hidden states are those of separate rows, but the prompt is computed once. With one
completion to a row this is the ordinary layout and needs no mask but the causal one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlvr_lightning.schema import Rollouts


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Inputs of a causal LM, and where to read its predictions. B rows of L tokens."""

    input_ids: Tensor
    """int64 [B, L]"""
    position_ids: Tensor
    """int64 [B, L]"""
    mask: Tensor | None
    """bool [B, 1, L, L], True = query may see key; None where the causal mask is all that is needed."""
    predictors: Tensor
    """int64 [N]: flat index (row * L + column) of the hidden state that predicts each completion token."""
    targets: Tensor
    """int64 [N]: those tokens, in the order of `completion_mask`'s True entries."""


def completions_per_row(rollouts: Rollouts, linear_to_attention: float) -> int:
    """The divisor of G that makes the forward pass cheapest.

    A packed row saves prompt tokens but its attention covers all completions of the row. The cost of a row of L tokens
    is taken as L * linear_to_attention + L^2 for a packed row, and half the square for a causal one.

    Args:
        rollouts: what is to be packed.
        linear_to_attention: multiply-adds of a layer's matrices per token over those of attention per pair of tokens.

    Example:
        >>> import torch
        >>> def rollouts(prompt, length):
        ...     ids = torch.zeros(4, length, dtype=torch.long)
        ...     return Rollouts(prompt_ids=[[0] * prompt], completion_ids=ids, completion_mask=ids == 0,
        ...                     rollout_logprobs=ids.float(), truncated=torch.zeros(4, dtype=torch.bool))
        >>> completions_per_row(rollouts(100, 10), 2000.0), completions_per_row(rollouts(10, 4000), 2000.0)
        (4, 1)
    """
    group = rollouts.group
    prompt = max(map(len, rollouts.prompt_ids))
    completion = rollouts.completion_mask.shape[1]

    def cost(per_row: int) -> float:
        length = prompt + per_row * completion
        pairs = length**2 if per_row > 1 else length**2 / 2
        return (length * linear_to_attention + pairs) / per_row

    return min((k for k in range(1, group + 1) if group % k == 0), key=cost)


def pack(rollouts: Rollouts, per_row: int) -> Packed:
    """Lay rollouts out in rows of `per_row` completions of one prompt.

    Args:
        rollouts: P prompts with G completions each.
        per_row: completions to a row; divides G.

    Raises:
        ValueError: `per_row` does not divide the group.
    """
    group = rollouts.group
    if group % per_row:
        raise ValueError(f"per_row must divide the group of {group}, got {per_row}")
    lengths: list[int] = rollouts.lengths.tolist()
    device = rollouts.completion_ids.device
    rows = [range(r, r + per_row) for r in range(0, len(lengths), per_row)]
    prompts = [rollouts.prompt_ids[row[0] // group] for row in rows]
    width = max(len(p) + sum(lengths[r] for r in row) for p, row in zip(prompts, rows, strict=True))

    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)
    if per_row == 1:  # also behind the end: for transformers a 0 there begins another sequence, which takes a mask
        position_ids = torch.arange(width).repeat(len(rows), 1)
    segment = torch.full((len(rows), width), -1, dtype=torch.long)  # 0 prompt, 1.. completions, -1 padding
    completion_ids = rollouts.completion_ids.cpu()
    predictors = []
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        end = len(prompt)
        input_ids[i, :end] = torch.tensor(prompt)
        position_ids[i, :end] = torch.arange(end)
        segment[i, :end] = 0
        for k, r in enumerate(row):
            start, end = end, end + lengths[r]
            input_ids[i, start:end] = completion_ids[r, : lengths[r]]
            position_ids[i, start:end] = torch.arange(len(prompt), len(prompt) + lengths[r])
            segment[i, start:end] = k + 1
            # The first token is predicted at the prompt's end, the others at the token before.
            at = torch.arange(start - 1, end - 1)
            at[:1] = len(prompt) - 1
            predictors.append(i * width + at)
    return Packed(
        input_ids=input_ids.to(device),
        position_ids=position_ids.to(device),
        mask=tree_mask(segment.to(device)) if per_row > 1 else None,
        predictors=torch.cat(predictors).to(device),
        targets=rollouts.completion_ids[rollouts.completion_mask],
    )


def tree_mask(segment: Tensor) -> Tensor:
    """Who may see whom: earlier tokens of the prompt and of one's own completion.

    Args:
        segment: int64 [B, L]: 0 prompt, k > 0 the k-th completion, -1 padding.

    Returns:
        bool [B, 1, L, L]; padding sees itself, so that no row of the softmax is empty.

    Example:
        >>> tree_mask(torch.tensor([[0, 1, 2, -1]]))[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    """
    query, key = segment[:, :, None], segment[:, None, :]
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    shared = (key == query) | ((key == 0) & (query > 0))
    own = torch.eye(length, dtype=torch.bool, device=segment.device)
    return ((causal & shared & (query >= 0)) | own)[:, None]
