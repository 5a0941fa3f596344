"""Pure functions that turn logits and a counter into a token: no state, no global random numbers.

Every token has its own uniform number, a hash of (seed of the prompt, number of the completion, position). So a
completion does not change with what else is sampled in the same batch, nor with the order in which it is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlvr_lightning.schema import Sampling

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the step of splitmix64's counter
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
BLOCK = 128  # tokens of the vocabulary whose probabilities are summed first; divides the common vocabulary sizes


def signed(value: int) -> int:
    """The int64 with the low 64 bits of an integer of any size."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def splitmix64(x: Tensor) -> Tensor:
    """The finaliser of the generator splitmix64: a bijection of int64 that spreads every input bit.

    Example:
        >>> splitmix64(torch.tensor([signed(GOLDEN)])).item() == signed(0xE220A8397B1DCDAF)  # first output of seed 0
        True
    """
    for shift, factor in MIX:
        x = (x ^ _shift_right(x, shift)) * signed(factor)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def stream_keys(seeds: Sequence[int], group: int) -> Tensor:
    """One key a completion, from which the uniform numbers of all its tokens follow.

    Args:
        seeds: P integers of any size; their low 64 bits count.
        group: G.

    Returns:
        int64 [P * G], group-major.
    """
    by_prompt = splitmix64(torch.tensor([signed(s + GOLDEN) for s in seeds], dtype=torch.long))
    # Hashed before the completion's number is added: neighbouring seeds must not share keys.
    return splitmix64(by_prompt[:, None] + signed(GOLDEN) * torch.arange(1, group + 1)).flatten()


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """A uniform number in [0, 1) for each token.

    Args:
        keys: int64 [n], of the completions.
        positions: int64 [n], number of the token within its completion, from 0.

    Returns:
        float64 [n], multiples of 2^-53.
    """
    return _shift_right(splitmix64(keys + signed(GOLDEN) * (positions + 1)), 11).double() * 2.0**-53


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw a token from each row of logits.

    Args:
        logits: float [n, V].
        uniform: float64 [n] in [0, 1); unused when greedy.
        sampling: temperature 0 takes the most likely token; else logits are divided by the temperature, then top-k,
            then top-p keep some tokens, whose probabilities are renormalised.

    Returns:
        int64 [n] tokens and float32 [n] log-probabilities under the distribution drawn from; greedy: at temperature 1.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    probs = logits.softmax(-1)
    if 0 < sampling.top_k < probs.shape[1]:
        probs = top_k(probs, sampling.top_k)
    if sampling.top_p < 1:
        probs = top_p(probs, sampling.top_p)
    token, total = inverse_cdf(probs, uniform)
    return token, (probs.gather(1, token[:, None])[:, 0].double() / total).log().float()


def inverse_cdf(probs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the cumulative sum first exceeds `uniform` times the total: never one of probability 0.

    Sums go over blocks of the vocabulary first, in float64 from there on: a float32 cumulative sum over 50,000 tokens
    would lose the rare ones, a float64 one would be slow.

    Args:
        probs: float32 [n, V], not negative; need not sum to 1.
        uniform: float64 [n] in [0, 1).

    Returns:
        int64 [n] tokens and float64 [n] totals.

    Example:
        >>> inverse_cdf(torch.tensor([[0.0, 0.25, 0.0, 0.75]] * 3), torch.tensor([0.0, 0.25, 0.999]).double())[0]
        tensor([1, 3, 3])
    """
    rows, vocab = probs.shape
    if vocab % BLOCK:
        probs = torch.nn.functional.pad(probs, (0, -vocab % BLOCK))
    blocks = probs.view(rows, -1, BLOCK)
    upto = blocks.sum(-1).double().cumsum(-1)
    total = upto[:, -1]
    target = (uniform * total)[:, None]
    block = _first_above(upto, target)
    before = torch.where(block > 0, upto.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].double().cumsum(-1)
    return (block * BLOCK + _first_above(inside, target - before))[:, 0], total


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """int64 [n, 1]: first index whose cumulative sum exceeds the target; if rounding leaves none, last with mass."""
    above = (cumulative <= target).sum(-1, keepdim=True)
    return above.minimum((cumulative < cumulative[:, -1:]).sum(-1, keepdim=True))


def top_k(probs: Tensor, k: int) -> Tensor:
    """Zero all but the k largest of each row; of equal ones the first count.

    Args:
        probs: float32 [n, V].
        k: at most V.

    Returns:
        float32 [n, V], not renormalised.

    Example:
        >>> top_k(torch.tensor([[0.2, 0.3, 0.2, 0.3]]), 3)
        tensor([[0.2000, 0.3000, 0.0000, 0.3000]])
    """
    smallest = probs.topk(k).values[:, -1:]
    return _keep(probs, smallest, torch.full_like(smallest, k, dtype=torch.long))


def top_p(probs: Tensor, p: float) -> Tensor:
    """Zero all but the smallest set of largest entries that makes up a share p of each row's sum.

    Args:
        probs: float32 [n, V].
        p: in (0, 1).

    Returns:
        float32 [n, V], not renormalised.

    Example:
        >>> top_p(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 0.65)
        tensor([[0.0000, 0.4000, 0.0000, 0.3000]])
    """
    needed = p * probs.sum(-1, keepdim=True, dtype=torch.float64)
    most = min(1024, probs.shape[1])  # nearly always enough, and sorting a whole vocabulary takes 10 times as long
    largest = probs.topk(most).values
    if most < probs.shape[1] and (largest.sum(-1, keepdim=True, dtype=torch.float64) < needed).any():
        largest = probs.sort(-1, descending=True).values
    count = (largest.double().cumsum(-1) < needed).sum(-1, keepdim=True).add(1).clamp(max=largest.shape[1])
    return _keep(probs, largest.gather(1, count - 1), count)


def _keep(probs: Tensor, smallest: Tensor, count: Tensor) -> Tensor:
    """Keep what is larger than `smallest`, and of what equals it the first few, `count` in all. Both are [n, 1]."""
    equal = probs == smallest
    spare = count - (probs > smallest).sum(-1, keepdim=True)
    if (equal.sum(-1, keepdim=True) > spare).any():
        equal &= equal.cumsum(-1) <= spare
    return probs.where((probs > smallest) | equal, 0.0)
