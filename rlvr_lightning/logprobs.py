"""Token log-probabilities and entropies without the [tokens, vocabulary] tensor.

Logits of 4096 tokens over 150k words take 2.3 GiB in fp32, and autograd would keep several such tensors. Here the last
linear layer runs over a slice of the vocabulary at a time, with a running log-sum-exp; the backward pass computes the
same logits again and turns them into gradients in place. What is kept between the passes is two numbers a token. Each
slice of the layer's gradient is summed over all tokens in fp32 and rounded once to the weight's dtype, so a 16-bit
weight needs no fp32 gradient of its size; nor is it ever cast whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlvr_lightning.compute import cast

BLOCK_BYTES = 32 << 20  # of fp32 logits at a time: enough for full matmul speed
CAST_BYTES = 4 << 20  # of cast weights at a time, and of the fp32 sums of their gradient
MOST_TOKENS = 16384  # whose logits over a slice exist at once


@dataclass(frozen=True, kw_only=True)
class Head:
    """The last layer of a causal LM, as numbers: logits = cap(scale * (hidden @ weight.T + bias))."""

    weight: Tensor
    """[V, H], float."""
    bias: Tensor | None = None
    """[V] or None."""
    scale: float = 1.0
    """Multiplies the logits (Cohere, Granite)."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap) (Gemma)."""


def token_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float = 1.0, block: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, differentiable in both.

    With z the logits of a token divided by the temperature and p = softmax(z): the log-probability is z[target] -
    logsumexp(z), the entropy (in nats) is logsumexp(z) - sum(p * z).

    Args:
        hidden: float [N, H], hidden states that predict the targets.
        head: the output layer; gradients flow to its weight and bias.
        targets: int64 [N].
        temperature: divides the logits; must be positive.
        block: tokens and words whose logits exist at once; by default as many words as fill `BLOCK_BYTES`.

    Returns:
        float32 [N] log-probabilities and float32 [N] entropies.

    Example:
        >>> uniform = Head(weight=torch.zeros(5, 3))
        >>> logprob, entropy = token_logprobs(torch.ones(2, 3), uniform, torch.tensor([0, 4]))
        >>> [round(x, 4) for x in (*logprob.tolist(), *entropy.tolist())]  # ln 5 = 1.6094
        [-1.6094, -1.6094, 1.6094, 1.6094]
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive to compute log-probabilities, got {temperature}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # the backward pass runs outside autocast and must compute the same logits
        hidden = hidden.to(torch.get_autocast_dtype(device))
    scale = head.scale / temperature
    # Softcap acts before the temperature: fold both into cap(x) = softcap/T * tanh(x * T / softcap), x = logits / T.
    softcap = head.softcap / temperature if head.softcap else None
    settings = _Settings(scale, softcap, *(block or _block(hidden, head.weight)))
    logprob, entropy = _TokenLogprobs.apply(hidden, head.weight, head.bias, targets, settings)
    return logprob, entropy


class _Settings(NamedTuple):
    scale: float
    softcap: float | None
    tokens: int
    words: int


def _block(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    """Tokens and words at a time."""
    tokens = max(1, min(len(hidden), MOST_TOKENS))
    words = BLOCK_BYTES // (4 * tokens)
    words = min(words, CAST_BYTES // (4 * weight.shape[1]))
    return tokens, max(1, min(words, weight.shape[0]))


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, start + size)


class _Words(NamedTuple):
    """A slice of the output layer, in the dtype of the hidden states."""

    start: int
    weight: Tensor
    bias: Tensor | None

    def logits(self, hidden: Tensor, at: _Settings) -> Tensor:
        """Fp32 logits [n, words], scaled and capped; a fresh tensor that may be written to."""
        z = torch.nn.functional.linear(hidden, self.weight, self.bias).float()
        if at.scale != 1.0:
            z.mul_(at.scale)
        if at.softcap is not None:
            z.div_(at.softcap).tanh_().mul_(at.softcap)
        return z

    def places(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets are in this slice (bool [n]), and their columns, 0 where they are not."""
        column = targets - self.start
        inside = (column >= 0) & (column < len(self.weight))
        return inside, column.where(inside, 0)


def _words(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, size: int) -> Iterator[tuple[slice, _Words]]:
    for words in _slices(len(weight), size):
        yield words, _Words(words.start, cast(weight[words], dtype), None if bias is None else bias[words].to(dtype))


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps a running log-sum-exp; backward recomputes each block's logits, then overwrites them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, at: _Settings
    ) -> tuple[Tensor, Tensor]:
        # of each token: the largest logit so far, sum exp(z - top), sum exp(z - top) * (z - top), z[target]
        top, total, weighted, hit = hidden.new_zeros(4, len(hidden), dtype=torch.float32)
        top.fill_(float("-inf"))
        for _, words in _words(weight, bias, hidden.dtype, at.words):
            for rows in _slices(len(hidden), at.tokens):
                z = words.logits(hidden[rows], at)
                inside, column = words.places(targets[rows])
                hit[rows] += torch.where(inside, z.gather(1, column[:, None])[:, 0], 0.0)
                _fold(z, top[rows], total[rows], weighted[rows])
        log_total = total.log()
        lse, entropy = top + log_total, log_total - weighted / total
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.settings = at
        ctx.set_materialize_grads(False)
        return hit - lse, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        at = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        grad_bias = torch.empty_like(bias) if wants_bias and bias is not None else None
        # summed over tokens in fp32 (bf16 sums would round each time), in one buffer for all slices
        buffer = hidden.new_empty(at.words, weight.shape[1], dtype=torch.float32) if wants_weight else None
        for where, words in _words(weight, bias, hidden.dtype, at.words):
            sums = None if buffer is None else buffer[: len(words.weight)].zero_()
            bias_sums = torch.zeros(len(words.weight), device=hidden.device) if grad_bias is not None else None
            for rows in _slices(len(hidden), at.tokens):
                z = words.logits(hidden[rows], at)
                slope = None if at.softcap is None else 1 - (z / at.softcap).square_()
                z.sub_(lse[rows, None])  # log p
                picked = words.places(targets[rows])
                d = _logits_gradient(z, picked, grad_logprob, grad_entropy, entropy, rows)
                if slope is not None:
                    d.mul_(slope)
                d = d.mul_(at.scale).to(hidden.dtype)
                if grad_hidden is not None:
                    _add_product(grad_hidden[rows], d, words.weight)
                if sums is not None:
                    _add_product(sums, d.t(), hidden[rows])
                if bias_sums is not None:
                    bias_sums += d.sum(0, dtype=torch.float32)
            if grad_weight is not None and sums is not None:
                grad_weight[where] = sums
            if grad_bias is not None and bias_sums is not None:
                grad_bias[where] = bias_sums
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None


def _fold(z: Tensor, top: Tensor, total: Tensor, weighted: Tensor) -> None:
    """Take logits [n, words] (overwritten) into the running sums [n]."""
    new_top = torch.maximum(top, z.amax(-1))
    # sums relative to the old top become relative to the new one; before the first slice they are 0 and top is -inf
    moved = torch.where(total > 0, top - new_top, 0.0)
    factor = moved.exp()
    weighted.add_(total * moved).mul_(factor)
    total.mul_(factor)
    z.sub_(new_top[:, None])
    p = z.exp()
    total.add_(p.sum(-1))
    weighted.add_(torch.bmm(p[:, None, :], z[:, :, None])[:, 0, 0])  # a dot product: no third [n, words] tensor
    top.copy_(new_top)


def _logits_gradient(
    log_p: Tensor,
    picked: tuple[Tensor, Tensor],
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    entropy: Tensor,
    rows: slice,
) -> Tensor:
    """Gradient in the logits [n, words]: of log p[target], onehot - p; of the entropy, -p * (log p + entropy)."""
    mix = None
    if grad_entropy is not None:
        mix = (log_p + entropy[rows, None]).mul_(grad_entropy[rows, None])
    p = log_p.exp_()
    if grad_logprob is None:
        assert mix is not None
        return p.mul_(mix).neg_()
    g = grad_logprob[rows, None]
    d = p.mul_(g if mix is None else mix.add_(g)).neg_()
    inside, column = picked
    return d.scatter_add_(1, column[:, None], torch.where(inside[:, None], g, 0.0))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to an fp32 total."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total += a @ b
