"""What is sent to an engine after each step leads it to the policy's weights, bit for bit."""

from __future__ import annotations

import hashlib

import pytest
import torch
from conftest import tiny_causal_lm

from rlvr_lightning.optim import SGD
from rlvr_lightning.policy import Policy
from rlvr_lightning.rollout.vllm.sync import MAX_DENSITY, WeightSync


def apply(held: dict[str, torch.Tensor], sync: WeightSync, parts: int | None = None) -> int:
    """Take in an update, or its first parts only; returns the bytes."""
    size = 0
    for number, part in enumerate(sync.parts()):
        if number == parts:
            raise ConnectionError("cut off")
        for name, shape in part.shapes.items():
            if name in part.tensors:
                held[name] = part.tensors[name].float().clone()
            else:
                indices = part.tensors[name + "/indices"]
                assert indices.dtype == torch.int32
                held[name].view(-1)[indices.long()] = part.tensors[name + "/values"].float()
            assert held[name].shape == shape
        size += part.nbytes
    sync.arrived()
    return size


def same(held: dict[str, torch.Tensor], policy: Policy) -> bool:
    return all(torch.equal(held[name], p.float()) for name, p in policy.causal_lm.named_parameters())


def step(policy: Policy, optimizer: torch.optim.Optimizer, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_entries_lead_to_the_policy_through_several_steps_at_a_time(family: str) -> None:
    policy = Policy(tiny_causal_lm(family).bfloat16())
    optimizer, sync = SGD(policy.parameters(), lr=1e-3), WeightSync(policy, torch.float32)
    assert sync.follow(optimizer)
    held: dict[str, torch.Tensor] = {}
    assert apply(held, sync) == sync.dense_bytes == 2 * sum(p.numel() for p in policy.parameters())
    for number in range(7):
        for part in range(1 + number % 3):
            step(policy, optimizer, 0.02, 10 * number + part)
        assert sync.sparse
        sent = apply(held, sync)
        assert 0 < sent < 0.7 * sync.dense_bytes
        assert same(held, policy)
    assert apply(held, sync) == 0, "nothing moved"


def test_dense_changes_are_sent_whole() -> None:
    policy = Policy(tiny_causal_lm("qwen3").bfloat16())
    optimizer, sync = SGD(policy.parameters(), lr=1.0), WeightSync(policy, torch.bfloat16)
    sync.follow(optimizer)
    held: dict[str, torch.Tensor] = {}
    apply(held, sync)
    step(policy, optimizer, 0.02, 0)
    assert apply(held, sync) == sync.dense_bytes and same(held, policy)
    assert MAX_DENSITY < 1 / 3, "6 bytes an entry against 2"
    step(policy, optimizer, 1e-5, 1)
    assert 0 < apply(held, sync) < sync.dense_bytes and same(held, policy), "entries again, when they are few again"


def test_an_update_that_was_cut_off_is_followed_by_everything() -> None:
    policy = Policy(tiny_causal_lm("qwen3").bfloat16())
    optimizer, sync = SGD(policy.parameters(), lr=1e-3), WeightSync(policy, torch.float32)
    sync.follow(optimizer)
    held: dict[str, torch.Tensor] = {}
    apply(held, sync)
    step(policy, optimizer, 0.02, 0)
    with pytest.raises(ConnectionError):
        apply(held, sync, parts=0)
    sync.forget()
    held = {name: torch.full_like(tensor, torch.nan) for name, tensor in held.items()}
    step(policy, optimizer, 0.02, 1)
    assert apply(held, sync) == sync.dense_bytes and same(held, policy)


def test_a_change_after_an_update_began_is_not_lost() -> None:
    """Steps between two updates, of which the first brought nothing yet."""
    policy = Policy(tiny_causal_lm("qwen3").bfloat16())
    optimizer, sync = SGD(policy.parameters(), lr=1e-3), WeightSync(policy, torch.float32)
    sync.follow(optimizer)
    step(policy, optimizer, 0.02, 0)  # before the first update: everything is sent anyway
    held: dict[str, torch.Tensor] = {}
    apply(held, sync)
    assert same(held, policy)


def test_other_optimizers_and_other_weights() -> None:
    policy = Policy(tiny_causal_lm("qwen3").bfloat16())
    adamw, sync = torch.optim.AdamW(policy.parameters(), lr=1e-6), WeightSync(policy, torch.float32)
    assert sync.follow(adamw), "any of torch's can be asked what it changed"
    held: dict[str, torch.Tensor] = {}
    apply(held, sync)
    for seed in range(3):
        step(policy, adamw, 0.02, seed)
        apply(held, sync)
        assert same(held, policy)
    whole = Policy(tiny_causal_lm("qwen3"))
    sync = WeightSync(whole, torch.bfloat16)
    assert not sync.follow(torch.optim.SGD(whole.parameters(), lr=1.0)), "float32 weights change nearly everywhere"
    assert [part.tensors["model.norm.weight"].dtype for part in sync.parts()] == [torch.bfloat16]
    sync.arrived()
    assert not sync.sparse


def test_digests_are_of_the_engines_dtype() -> None:
    policy = Policy(tiny_causal_lm("qwen3").bfloat16())
    weight = policy.causal_lm.model.norm.weight
    expected = hashlib.sha256(weight.detach().float().numpy().tobytes()).hexdigest()
    assert dict(WeightSync(policy, torch.float32).digests())["model.norm.weight"] == expected
