"""Chunked log-probabilities and the packed forward pass against plain ones."""

from __future__ import annotations

import pytest
import reference
import torch
from conftest import random_rollouts, tiny_causal_lm
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import find_packed_sequence_indices

from rlvr_lightning.logprobs import Head, token_logprobs
from rlvr_lightning.packing import pack, tree_mask
from rlvr_lightning.policy import Policy


def head_case(bias: bool = True, tokens: int = 11, hidden: int = 5, vocab: int = 13):
    h = torch.randn(tokens, hidden, requires_grad=True)
    w = torch.randn(vocab, hidden, requires_grad=True)
    b = torch.randn(vocab, requires_grad=True) if bias else None
    return h, w, b, torch.randint(0, vocab, (tokens,))


@pytest.mark.parametrize("block", [(1, 5), (3, 1), (11, 13), (50, 4), None])
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, True), (0.7, 2.0, False), (1.3, 5.0, True)])
def test_values_and_gradients_equal_autograd(
    block: tuple[int, int] | None, scale: float, softcap: float | None, bias: bool
) -> None:
    h, w, b, targets = head_case(bias)
    temperature = 0.6
    logits = scale * torch.nn.functional.linear(h, w, b)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    plain = (logits / temperature).log_softmax(-1)
    expected = plain.gather(1, targets[:, None])[:, 0], -(plain.exp() * plain).sum(-1)
    inputs = [x for x in (h, w, b) if x is not None]
    mix = torch.randn(2, len(h))
    wanted = torch.autograd.grad((mix[0] * expected[0] + mix[1] * expected[1]).sum(), inputs)

    out = token_logprobs(h, Head(weight=w, bias=b, scale=scale, softcap=softcap), targets, temperature, block)
    for got, want in zip(out, expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    got_grads = torch.autograd.grad((mix[0] * out[0] + mix[1] * out[1]).sum(), inputs)
    for got, want in zip(got_grads, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["bf16 weights", "autocast"])
def test_bf16_is_near_fp32(mode: str) -> None:
    h, w, b, targets = head_case(tokens=40, hidden=16, vocab=50)
    exact = token_logprobs(h, Head(weight=w, bias=b), targets, 1.0, (7, 9))
    wanted = torch.autograd.grad((exact[0] + 0.3 * exact[1]).sum(), (h, w, b))
    if mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            out = token_logprobs(h, Head(weight=w, bias=b), targets, 1.0, (7, 9))
    else:
        out = token_logprobs(h.bfloat16(), Head(weight=w.bfloat16(), bias=b.bfloat16()), targets, 1.0, (7, 9))
    assert out[0].dtype == torch.float32
    got = torch.autograd.grad((out[0] + 0.3 * out[1]).sum(), (h, w, b))
    for a, e in zip((*out, *got), (*exact, *wanted), strict=True):
        assert (a - e).norm() < 0.03 * e.norm()


def test_values_equal_naive_floats() -> None:
    h, w, _, targets = head_case(bias=False)
    logprob, entropy = token_logprobs(h, Head(weight=w), targets, 1.0, (4, 3))
    for i, logits in enumerate((h @ w.T).tolist()):
        assert float(logprob[i]) == pytest.approx(reference.log_softmax(logits)[targets[i]], abs=1e-5)
        assert float(entropy[i]) == pytest.approx(reference.entropy(logits), abs=1e-5)


def test_huge_logits_stay_finite() -> None:
    weight = torch.eye(4) * 1e4
    logprob, entropy = token_logprobs(torch.eye(4), Head(weight=weight), torch.tensor([0, 1, 2, 0]))
    assert logprob.tolist() == [0.0, 0.0, 0.0, -1e4]
    assert entropy.tolist() == [0.0] * 4


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest_bytes = max(self.largest_bytes, x.nbytes)
        return out


def test_no_tensor_grows_with_vocabulary_times_tokens() -> None:
    largest = {}
    for tokens in (64, 1024):
        h, w = torch.randn(tokens, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True)
        with LargestTensor() as seen:
            logprob, entropy = token_logprobs(h, Head(weight=w), torch.zeros(tokens, dtype=torch.long), 1.0, (16, 64))
            (logprob + entropy).sum().backward()
        largest[tokens] = seen.largest_bytes
    assert largest[64] == 4096 * 8 * 4  # the gradient of the weight; all logits would take 1 MiB
    assert largest[1024] == 4096 * 8 * 4  # here 16 MiB


def plain_logprobs(model, rollouts, temperature: float):
    """One unpadded row at a time through the whole model."""
    for r, length in enumerate(rollouts.lengths.tolist()):
        prompt = rollouts.prompt_ids[r // rollouts.group]
        ids = torch.tensor([prompt + rollouts.completion_ids[r, :length].tolist()])
        logprobs = (model(ids).logits[0] / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
        yield logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("per_row", [1, 2, 6])
def test_packed_forward_equals_plain(kind: str, per_row: int) -> None:
    model = tiny_causal_lm(kind)
    rollouts = random_rollouts(prompt_lengths=(5, 1, 9), group=6)
    out = Policy(model)(rollouts, temperature=0.7, per_row=per_row)
    loss = sum((lp.sum() + 0.3 * ent.sum()) for lp, ent in plain_logprobs(model, rollouts, 0.7))
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    got = torch.autograd.grad(out.logprobs.sum() + 0.3 * out.entropy.sum(), list(model.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
    with torch.no_grad():
        for r, (lp, ent) in enumerate(plain_logprobs(model, rollouts, 0.7)):
            torch.testing.assert_close(out.logprobs[r, : len(lp)], lp, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(out.entropy[r, : len(ent)], ent, atol=2e-5, rtol=1e-5)
            assert out.logprobs[r, len(lp) :].abs().sum() == 0


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_attention_that_reads_masks_otherwise_gets_none(kind: str) -> None:
    """Eager attention would add our mask of true and false to its scores, without a word."""
    model, rollouts = tiny_causal_lm(kind), random_rollouts(prompt_lengths=(5, 1, 30), group=6)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = Policy(model)(rollouts, temperature=0.7)
        for r, (lp, _) in enumerate(plain_logprobs(model, rollouts, 0.7)):
            torch.testing.assert_close(out.logprobs[r, : len(lp)], lp, atol=2e-5, rtol=1e-5)


def test_packing_saves_the_prompt() -> None:
    rollouts = random_rollouts(prompt_lengths=(50,), group=6, width=7)
    tokens = {k: pack(rollouts, k).input_ids.numel() for k in (1, 6)}
    assert tokens[1] == 6 * 57
    assert tokens[6] == 50 + int(rollouts.lengths.sum())


def test_padding_is_no_sequence_of_its_own() -> None:
    rollouts = random_rollouts(prompt_lengths=(5, 1, 9), group=6)
    packed = pack(rollouts, 1)
    assert packed.mask is None
    assert find_packed_sequence_indices(packed.position_ids) is None  # else transformers makes a mask of all pairs


def test_tree_mask_equals_naive() -> None:
    segment = torch.tensor([[0, 0, 1, 1, 2, 3, 3, -1], [0, 1, 1, 1, 2, -1, -1, -1]])
    mask = tree_mask(segment)
    for b in range(2):
        for q in range(8):
            for k in range(8):
                sq, sk = int(segment[b, q]), int(segment[b, k])
                sees = q == k or (k <= q and sq >= 0 and sk in (0, sq))
                assert bool(mask[b, 0, q, k]) == sees


def test_rows_must_divide_the_group() -> None:
    with pytest.raises(ValueError, match="per_row must divide the group of 3, got 2"):
        pack(random_rollouts(), 2)
