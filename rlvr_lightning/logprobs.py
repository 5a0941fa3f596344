"""Token log-probabilities and entropies without the [tokens, vocabulary] tensor.

Logits of 4096 tokens over 150k words take 2.3 GiB in fp32, and autograd would keep several such tensors. Here the
last linear layer runs over a few hundred tokens at a time; the backward pass computes the same logits again and turns
them into gradients in place. What is kept between the passes is one number a token (the log-sum-exp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20  # of fp32 logits at a time: large enough for full matmul speed, small beside any model


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
    hidden: Tensor, head: Head, targets: Tensor, temperature: float = 1.0, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, differentiable in both.

    With z the logits of a token divided by the temperature and p = softmax(z): the log-probability is z[target] -
    logsumexp(z), the entropy (in nats) is logsumexp(z) - sum(p * z).

    Args:
        hidden: float [N, H], hidden states that predict the targets.
        head: the output layer; gradients flow to its weight and bias.
        targets: int64 [N].
        temperature: divides the logits; must be positive.
        chunk_tokens: tokens whose logits exist at once; by default as many as fill `CHUNK_BYTES`.

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
    chunk = chunk_tokens or max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))
    scale = head.scale / temperature
    # Softcap acts before the temperature: fold both into cap(x) = softcap/T * tanh(x * T / softcap), x = logits / T.
    softcap = head.softcap / temperature if head.softcap else None
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # the backward pass runs outside autocast and must compute the same logits
        hidden = hidden.to(torch.get_autocast_dtype(device))
    logprob, entropy = _TokenLogprobs.apply(hidden, head.weight, head.bias, targets, (scale, softcap, chunk))
    return logprob, entropy


def _as(hidden: Tensor, x: Any) -> Any:
    """A tensor in the dtype of the hidden states; None stays None."""
    return None if x is None else x.to(hidden.dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Fp32 logits [n, V] of a chunk, scaled and capped; a fresh tensor that may be written to."""
    z = torch.nn.functional.linear(hidden, weight, bias).float()
    if scale != 1.0:
        z.mul_(scale)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


class _TokenLogprobs(torch.autograd.Function):
    """Chunked forward; backward recomputes each chunk's logits and overwrites them with their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        settings: tuple[float, float | None, int],
    ) -> tuple[Tensor, Tensor]:
        scale, softcap, chunk = settings
        used_weight, used_bias = _as(hidden, weight), _as(hidden, bias)
        logprob, entropy, lse = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(3))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            z = _logits(hidden[rows], used_weight, used_bias, scale, softcap)
            top = z.amax(-1)
            at_target = z.gather(1, targets[rows, None])[:, 0] - top
            z.sub_(top[:, None])
            p = z.exp()
            total = p.sum(-1)
            log_total = total.log()
            logprob[rows] = at_target - log_total
            # sum(p * z) as a batched dot product: no third [n, V] tensor
            entropy[rows] = log_total - torch.bmm(p[:, None, :], z[:, :, None])[:, 0, 0] / total
            lse[rows] = top + log_total
            del z, p
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        scale, softcap, chunk = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        used_weight, used_bias = _as(hidden, weight), _as(hidden, bias)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Summed over chunks in fp32: bf16 sums of many chunks would round each time.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            z = _logits(hidden[rows], used_weight, used_bias, scale, softcap)
            slope = None if softcap is None else 1 - (z / softcap).square_()
            z.sub_(lse[rows, None])  # log p
            d = _logits_gradient(z, targets[rows], grad_logprob, grad_entropy, entropy, rows)
            if slope is not None:
                d.mul_(slope)
            d = d.mul_(scale).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(d, used_weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_outer(grad_weight, d, hidden[rows])
            if grad_bias is not None:
                grad_bias += d.sum(0, dtype=torch.float32)
            del z, d
        cast_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        cast_bias = None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, cast_weight, cast_bias, None, None


def _logits_gradient(
    log_p: Tensor,
    targets: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    entropy: Tensor,
    rows: slice,
) -> Tensor:
    """Gradient in the logits [n, V]: of log p[target], onehot - p; of the entropy, -p * (log p + entropy)."""
    mix = None
    if grad_entropy is not None:
        mix = (log_p + entropy[rows, None]).mul_(grad_entropy[rows, None])
    p = log_p.exp_()
    if grad_logprob is None:
        assert mix is not None
        return p.mul_(mix).neg_()
    g = grad_logprob[rows, None]
    d = p.mul_(g if mix is None else mix.add_(g)).neg_()
    return d.scatter_add_(1, targets[:, None], g)


def _add_outer(total: Tensor, d: Tensor, hidden: Tensor) -> None:
    """Add d.T @ hidden to an fp32 total."""
    if d.dtype == torch.float32:
        total.addmm_(d.t(), hidden)
    else:
        total += d.t() @ hidden
