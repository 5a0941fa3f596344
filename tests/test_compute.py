"""Computing in another dtype than the weights': against fp32 weights, and in bytes."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from conftest import random_rollouts, tiny_causal_lm
from test_grpo import Constant, Recorder, fit, folder, module, weights  # noqa: F401 (a fixture)

from rlvr_lightning import compute, heap
from rlvr_lightning.compute import compute_in
from rlvr_lightning.policy import Policy


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_bf16_weights_computed_in_fp32_equal_fp32_weights(kind: str, tied: bool) -> None:
    stored = tiny_causal_lm(kind, tie_word_embeddings=tied).to(torch.bfloat16)
    exact = copy.deepcopy(stored).float()
    compute_in(stored, torch.float32)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    rollouts = random_rollouts(prompt_lengths=(5, 1, 9), group=3)
    got, want = Policy(stored)(rollouts), Policy(exact)(rollouts)
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=2e-5, rtol=1e-5)
    ours = torch.autograd.grad(got.logprobs.sum() + 0.3 * got.entropy.sum(), list(stored.parameters()))
    theirs = torch.autograd.grad(want.logprobs.sum() + 0.3 * want.entropy.sum(), list(exact.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        a = a.to_dense()
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, atol=2e-3 * float(b.abs().max()), rtol=2**-7)


def test_no_second_copy_of_the_model_is_kept_for_the_backward_pass() -> None:
    """Bytes that autograd keeps: the same for bf16 weights cast layer by layer as for fp32 weights used as they are."""
    kept = {}
    for cast in (False, True):
        model = tiny_causal_lm("qwen3").to(torch.bfloat16 if cast else torch.float32)
        if cast:
            compute_in(model, torch.float32)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def pack(x, own=own, seen=seen):
            if x.untyped_storage().data_ptr() not in own:
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = Policy(model)(random_rollouts(prompt_lengths=(5,), group=2))
        kept[cast] = sum(seen.values())
        del out
    weights_bytes = 4 * sum(p.numel() for p in model.parameters())
    assert kept[True] - kept[False] < 0.1 * weights_bytes


def test_what_inference_mode_computed_does_not_hinder_training(monkeypatch) -> None:
    monkeypatch.setattr(heap, "_buffers", threading.local())
    model = tiny_causal_lm("qwen3").to(torch.bfloat16)
    compute_in(model, torch.float32)
    rollouts = random_rollouts()
    with torch.inference_mode():
        Policy(model)(rollouts)
    Policy(model)(rollouts).logprobs.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_large_matrices_are_cast_in_blocks(monkeypatch) -> None:
    linear = torch.nn.Linear(7, 50, bias=True).to(torch.bfloat16)
    whole = torch.nn.functional.linear(torch.ones(3, 7), linear.weight.float(), linear.bias.float())
    monkeypatch.setattr(compute, "BLOCK_ENTRIES", 21)
    assert [s.start for s in compute.blocks(linear.weight)] == list(range(0, 50, 3))
    compute_in(linear, torch.float32)
    torch.testing.assert_close(linear(torch.ones(3, 7)), whole)


def test_a_tied_table_without_its_output_layer_still_gets_its_gradient() -> None:
    table, head = torch.nn.Embedding(11, 5), torch.nn.Linear(5, 11, bias=False)
    head.weight = table.weight
    model = torch.nn.ModuleList([table, head]).to(torch.bfloat16)
    compute_in(model, torch.float32)
    for times in (1, 2):
        (3 * table(torch.tensor([1, 4, 1]))).sum().backward()
        assert table.weight.grad[:, 0].tolist() == [0, 6.0 * times, 0, 0, 3.0 * times, *[0] * 6]
