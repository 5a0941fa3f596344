"""The reference as a delta: against a copy, bit for bit, under every optimizer."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import random_rollouts, tiny_causal_lm
from precision_modes import MODES, same
from test_grpo import Constant, Recorder, fit, folder, module, weights  # noqa: F401 (a fixture)

from rlvr_lightning.callbacks import UpdateSparsity
from rlvr_lightning.compute import compute_in
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim import SGD, tensorwise, update
from rlvr_lightning.policy import TINY, LoRA, Policy
from rlvr_lightning.reference import Reference


@pytest.mark.parametrize(
    "optimizer",
    [
        *MODES.values(),
        partial(torch.optim.SGD, lr=0.5, momentum=0.9),
        partial(torch.optim.AdamW, lr=1e-4),
        partial(torch.optim.RMSprop, lr=1e-4),
    ],
)
@pytest.mark.parametrize("max_density", [1.0, 0.05])
def test_delta_reference_equals_a_copy_bit_for_bit(folder, tmp_path, monkeypatch, optimizer, max_density) -> None:  # noqa: F811
    """Log-probs at every step, and what is learnt, with deltas kept as they are or turned into copies on the way."""
    for emitter in (update, tensorwise):
        monkeypatch.setattr(emitter, "DENSE", max_density)

    class Observed(Recorder):
        def configure_model(self) -> None:
            super().configure_model()
            self.reference.max_density = max_density

    trained = []
    for kind in ("delta", "copy"):
        model = Observed(
            folder,
            module(folder).scorer.rewards,
            optimizer,
            group_size=4,
            dtype="bfloat16",
            reference=kind,
            objective=Objective(kl_coef=0.1),
            activation_checkpointing=True,
        )
        fit(model, tmp_path, steps=4)
        trained.append(model)
    delta, copied = trained
    for a, b in zip(delta.seen, copied.seen, strict=True):
        assert torch.equal(a.ref_logprobs, b.ref_logprobs)
    assert same(delta, copied)
    as_deltas = [p for p, kept in delta.reference._kept.items() if not isinstance(kept, torch.Tensor)]
    assert bool(as_deltas) == (max_density == 1.0) or 0 < len(as_deltas) < len(delta.reference._kept)
    fresh = module(folder, dtype="bfloat16")
    fresh.configure_model()
    for p, start in zip(delta.policy.parameters(), weights(fresh), strict=True):
        assert torch.equal(delta.reference.start(p), start)


def test_optimizers_stepped_tensor_by_tensor_learn_the_same_bits(folder, tmp_path: Path) -> None:  # noqa: F811
    for optimizer in (partial(torch.optim.AdamW, lr=1e-3), partial(torch.optim.SGD, lr=0.5, momentum=0.9)):
        settings = {"dtype": "bfloat16", "optimizer": optimizer, "objective": Objective(kl_coef=0.1), "warmup_steps": 2}
        steps = []
        trained = []
        for kind in ("delta", "copy"):
            model = module(folder, reference=kind, **settings)
            trainer = fit(model, tmp_path, steps=3, callbacks=[UpdateSparsity(every_n_steps=1)])
            steps.append((trainer.global_step, float(trainer.callback_metrics["update/changed_frac/bf16"])))
            trained.append(model)
        assert same(*trained)
        assert steps[0] == steps[1]


def test_the_policys_weights_come_back_under_exceptions() -> None:
    policy = Policy(tiny_causal_lm("qwen3").to(torch.bfloat16))
    reference = Reference(policy, max_density=0.5)
    parameters = list(policy.parameters())
    sgd = SGD(parameters, lr=0.05)
    reference.listen(sgd)
    for p in parameters:
        p.grad = torch.randn_like(p)
    sgd.step()
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(KeyboardInterrupt), reference.in_place():
        assert any(not torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
        raise KeyboardInterrupt
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert 0 < reference.nbytes < 6 * sum(p.numel() for p in parameters)


@pytest.mark.parametrize("cast", [False, True])
def test_tied_embeddings_have_one_delta_and_the_same_logprobs(cast: bool) -> None:
    policy = Policy(tiny_causal_lm("qwen3", tie_word_embeddings=True).to(torch.bfloat16))
    start = copy.deepcopy(policy)
    if cast:
        for p in (policy, start):
            compute_in(p.model, torch.float32)
    reference, rollouts = Reference(policy, max_density=1.0), random_rollouts()
    sgd = SGD(policy.parameters(), lr=0.05)
    reference.listen(sgd)
    for _ in range(3):
        policy(rollouts).logprobs.sum().backward()
        sgd.step()
        sgd.zero_grad()
        with torch.no_grad():
            assert torch.equal(reference.logprobs(rollouts), start(rollouts).logprobs)
            assert not torch.equal(policy(rollouts).logprobs, start(rollouts).logprobs)
    assert len(reference._kept) == len(list(policy.parameters()))


def test_a_dense_delta_becomes_a_copy_once_and_says_so(caplog) -> None:
    policy = Policy(tiny_causal_lm("qwen3").to(torch.bfloat16))
    reference = Reference(policy)
    parameters = list(policy.parameters())
    sgd = SGD(parameters, lr=1.0)
    reference.listen(sgd)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.randn_like(p)
        sgd.step()
    assert reference.nbytes == sum(p.nbytes for p in parameters)
    assert [r.getMessage().split(":")[0] for r in caplog.records if "reference" in r.getMessage()] == ["reference"]
    assert not reference.follows_changes


def test_without_a_kl_term_there_is_no_reference_and_none_refuses_one(folder) -> None:  # noqa: F811
    model = module(folder, reference="delta")
    model.configure_model()
    assert model.reference is None
    with pytest.raises(ValueError, match=r"reference: none leaves objective.kl_coef nothing to compare with"):
        module(folder, reference="none", objective=Objective(kl_coef=0.1))


def test_lora_trains_on_a_tied_model_computed_in_fp32(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tied = module(str(TINY), lora=LoRA(rank=2), dtype="bfloat16", objective=Objective(kl_coef=0.1))
    trainer = fit(tied, tmp_path, steps=2)
    assert trainer.global_step == 2


def test_lora_needs_no_delta(folder, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("peft")
    model = module(folder, lora=LoRA(rank=2), dtype="bfloat16", objective=Objective(kl_coef=0.1))
    fit(model, tmp_path, steps=2)
    assert model.reference.nbytes == 0
    rollouts = random_rollouts(prompt_lengths=(5, 3), group=2)
    fresh = module(folder, dtype="bfloat16")
    fresh.configure_model()
    with torch.no_grad():
        assert torch.equal(model.reference.logprobs(rollouts), fresh.policy(rollouts).logprobs)
