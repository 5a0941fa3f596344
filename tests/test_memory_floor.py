"""Gradient release, the reference as a delta and computing in another dtype: each against what it replaces."""

from __future__ import annotations

import copy
import math
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_rollouts, tiny_causal_lm
from lightning.pytorch.callbacks import ModelCheckpoint
from test_grpo import Constant, Recorder, fit, folder, module, weights  # noqa: F401 (a fixture)

from rlvr_lightning import compute, heap
from rlvr_lightning.callbacks import UpdateSparsity
from rlvr_lightning.compute import compute_in
from rlvr_lightning.experience import Batching
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim import SGD, GradientRelease, tensorwise, update
from rlvr_lightning.optim.updates import Updates
from rlvr_lightning.policy import TINY, LoRA, Policy
from rlvr_lightning.profiling.allocations import AllocationCounter
from rlvr_lightning.reference import Reference
from rlvr_lightning.trainer_checks import check_trainer

WHOLE = Batching(micro_batch=24)
MODES = {
    "split": partial(SGD, lr=0.5),
    "fp32": partial(SGD, lr=0.5, master="fp32"),
    "nearest": partial(SGD, lr=0.5, master="none"),
    "stochastic": partial(SGD, lr=0.5, master="none", rounding="stochastic"),
}


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


# ---- gradient release ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("max_grad_norm", [1e-2, 0.0])
def test_released_equals_plain_bit_for_bit(folder, tmp_path: Path, mode, checkpointing, max_grad_norm) -> None:  # noqa: F811
    trained = []
    for release in (None, GradientRelease()):
        model = module(
            folder,
            dtype="bfloat16",
            optimizer=MODES[mode],
            gradient_release=release,
            batching=WHOLE,
            max_grad_norm=max_grad_norm,
            activation_checkpointing=checkpointing,
            warmup_steps=2,
        )
        trainer = fit(model, tmp_path, steps=3)
        trained.append((model, float(trainer.callback_metrics["update/grad_norm"])))
    (plain, plain_norm), (released, released_norm) = trained
    assert plain_norm == released_norm > 1e-2
    assert same(plain, released)
    assert all(p.grad is None for p in released.parameters())


def test_fp32_and_split_masters_learn_the_same_bits(folder, tmp_path: Path) -> None:  # noqa: F811
    trained = [module(folder, dtype="bfloat16", optimizer=MODES[m], batching=WHOLE) for m in ("split", "fp32")]
    for model in trained:
        fit(model, tmp_path, steps=4)
    assert same(*trained)


def test_delayed_clips_by_the_step_before_and_each_tensor_by_itself() -> None:
    weight, other = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    sgd = SGD([weight, other], lr=1.0)
    updates = released(sgd, clip="delayed")

    def step(a: float, b: float) -> tuple[float, float]:
        before = float(weight), float(other)
        updates.begin(1)
        updates.backward((a * weight + b * other).sum())
        updates.finish(sgd.step)
        return before[0] - float(weight), before[1] - float(other)

    assert step(3.0, 4.0) == pytest.approx((0.6, 0.8), rel=1e-5)  # the first step measures: norm 5, exact
    assert step(0.3, 0.4) == pytest.approx((0.06, 0.08), rel=1e-5)  # by the norm before, 5
    assert step(0.3, 0.4) == pytest.approx((0.3, 0.4), rel=1e-5)  # the norm before was 0.5: not clipped
    assert step(300.0, 0.4) == pytest.approx((1.0, 0.4), rel=1e-5)  # no tensor moves further than the limit
    assert step(math.nan, 0.4)[1] == pytest.approx(0.4 / 300.0, rel=1e-4)
    assert not torch.isnan(weight).any()


def released(optimizer: SGD, max_norm: float = 1.0, **release) -> Updates:
    def backward(loss, retain_graph=False):
        loss.backward(retain_graph=retain_graph)

    return Updates(optimizer, backward, max_norm, GradientRelease(**release))


def test_each_micro_batch_is_a_smaller_step() -> None:
    """Two micro-batches are two steps by hand, each on the weights as they are then, clipped to half of the norm."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    by_hand = weight.detach().clone()
    sgd = SGD([weight], lr=0.5)
    updates = released(sgd, accumulation="each")
    updates.begin(2)
    for target in (3.0, 0.0):
        gradient = 2 * (by_hand - target)
        by_hand -= 0.5 * gradient * min(1.0, 0.5 / float(gradient.norm()))
        updates.backward((weight - target).square().sum())
    assert "grad_norm" in updates.finish(sgd.step)
    assert weight.tolist() == pytest.approx(by_hand.tolist(), rel=1e-5)
    assert sgd.param_groups[0]["steps"] == 1


@pytest.mark.parametrize(("clip", "max_norm"), [("two_pass", 1.0), ("two_pass", 0.0), ("delayed", 1.0)])
def test_a_released_gradient_that_is_not_finite(clip: str, max_norm: float) -> None:
    """`first` gets its gradient before the infinite one, `last` after it."""
    last, bad, first = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))
    sgd = SGD([last, bad, first], lr=0.1)
    updates = released(sgd, max_norm, clip=clip)
    hidden = last * 1.0
    order = []
    for name, p in (("last", last), ("bad", bad), ("first", first)):
        p.register_hook(lambda g, name=name: order.append(name))
    updates.begin(1)
    if clip == "delayed":  # the norm before is known
        sgd.param_groups[0]["last_norm"] = 1.0
    updates.backward(((hidden * 1.0 * bad) * first * 1.0).sum() + (bad * math.inf).sum())
    assert updates.finish(sgd.step)["nonfinite"] == 1
    assert float(bad) == 1.0
    if clip == "two_pass" and max_norm:
        assert float(first) == float(last) == 1.0
    assert all(p.grad is None for p in (last, bad, first))
    updates.begin(1)
    updates.backward((last + bad + first).sum())  # and the run goes on
    assert "grad_norm" in updates.finish(sgd.step)


def test_whole_refuses_a_second_micro_batch() -> None:
    updates = released(SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(ValueError, match="whole needs one micro-batch per optimizer step, got 2"):
        updates.begin(2)


def test_a_second_fit_works_and_no_signal_changes_nothing(folder, tmp_path: Path) -> None:  # noqa: F811
    settings = {"dtype": "bfloat16", "optimizer": partial(SGD, lr=0.5), "gradient_release": GradientRelease()}
    model = module(folder, batching=WHOLE, **settings)
    fit(model, tmp_path, steps=1)
    before = weights(model)
    fit(model, tmp_path, steps=1)
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    dull = module(folder, batching=WHOLE, rewards={"constant": Constant()}, **settings)
    trainer = fit(dull, tmp_path, steps=3, callbacks=[UpdateSparsity(every_n_steps=1)])
    assert trainer.callback_metrics["update/changed_frac/bf16"] == 0
    assert trainer.callback_metrics["update/measured_step"] == 3


def test_scaled_losses_and_several_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="16-mixed scales the loss"):  # on a CPU the trainer turns it into bf16-mixed
        check_trainer(SimpleNamespace(world_size=1, precision="16-mixed"), torch.float32)
    with pytest.raises(ValueError, match="one process so far, not in 2"):
        check_trainer(SimpleNamespace(world_size=2, precision="32-true"), torch.float32)


@pytest.mark.parametrize(
    ("precision", "dtype", "message"),
    [
        ("bf16-mixed", "bfloat16", "bf16-mixed is for float32 weights"),
        ("bf16-true", "float32", "bf16-true is not supported"),
    ],
)
def test_precisions_that_would_not_do_what_they_say(folder, tmp_path, precision, dtype, message) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=message):
        fit(module(folder, dtype=dtype), tmp_path, precision=precision)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batching": Batching(micro_batch=8)}, r"micro_batch is 8 and a step has 24 completions; raise it to 24"),
        ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, r"needs optimizer: rlvr_lightning.optim.SGD, got SGD"),
        ({"optimizer": partial(torch.optim.AdamW, lr=0.1)}, r"needs optimizer: .*got AdamW"),
    ],
)
def test_what_release_cannot_do_is_said_before_training(folder, tmp_path: Path, settings, message) -> None:  # noqa: F811
    defaults = {"optimizer": partial(SGD, lr=0.1), "batching": WHOLE, "gradient_release": GradientRelease()}
    with pytest.raises(ValueError, match=message):
        fit(module(folder, **defaults | settings), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_at_most_two_tensors_of_gradients_are_alive(tied: bool, monkeypatch) -> None:
    """Twelve matrices of 128 KiB in bf16, computed with in fp32; every byte that backward and update make."""
    monkeypatch.setattr(compute, "BLOCK_ENTRIES", 1 << 9)  # the matrices are small: so must be what is cast at once
    monkeypatch.setattr(heap, "_buffers", threading.local())
    monkeypatch.setitem(update.CHUNK_ENTRIES, "cpu", 1 << 8)
    peaks = {}
    for release in (None, GradientRelease()):
        layers = [torch.nn.Linear(256, 256, bias=False) for _ in range(12)]
        model = torch.nn.Sequential(torch.nn.Embedding(256, 256), *layers).to(torch.bfloat16)
        if tied:
            model[12].weight = model[0].weight
        compute_in(model, torch.float32)
        parameters = list(model.parameters())
        sgd = SGD(parameters, lr=0.1)
        for p in parameters:
            sgd._storage(p, 0)  # the low halves are there already: only what the step adds is counted
        updates = Updates(sgd, lambda loss, retain_graph=False: loss.backward(retain_graph=retain_graph), 1.0, release)
        updates.begin(1)
        loss = model(torch.arange(3)).square().sum()
        with AllocationCounter() as counter:
            counter.own("held before", [*parameters, *(sgd.state[p]["low"] for p in parameters)])
            updates.backward(loss)
            updates.finish(sgd.step)
        held = 2 * sum(p.nbytes for p in parameters)
        assert counter.peak_by_owner["held before"] == held
        peaks[release is not None] = (counter.peak_bytes - held) / parameters[0].nbytes
    assert peaks[False] > len(parameters)
    assert 1 < peaks[True] <= (2.1 if tied else 1.1)  # the tied one waits for its second part; and chunks


def test_a_tied_table_without_its_output_layer_still_gets_its_gradient() -> None:
    table, head = torch.nn.Embedding(11, 5), torch.nn.Linear(5, 11, bias=False)
    head.weight = table.weight
    model = torch.nn.ModuleList([table, head]).to(torch.bfloat16)
    compute_in(model, torch.float32)
    for times in (1, 2):
        (3 * table(torch.tensor([1, 4, 1]))).sum().backward()
        assert table.weight.grad[:, 0].tolist() == [0, 6.0 * times, 0, 0, 3.0 * times, *[0] * 6]


def test_resuming_a_released_run_continues_bit_for_bit(folder, tmp_path: Path) -> None:  # noqa: F811
    settings = {
        "dtype": "bfloat16",
        "optimizer": partial(SGD, lr=0.02),  # so low that the reference stays a delta
        "gradient_release": GradientRelease(clip="delayed"),
        "batching": WHOLE,
        "warmup_steps": 3,
        "objective": Objective(kl_coef=0.1),
    }
    whole, first, second = (module(folder, **settings) for _ in range(3))
    fit(whole, tmp_path, steps=5)
    keep = ModelCheckpoint(tmp_path / "ckpt", save_last=True, every_n_train_steps=3, save_top_k=-1)
    fit(first, tmp_path, steps=3, callbacks=[keep], enable_checkpointing=True)
    fit(second, tmp_path, steps=5, ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"))
    assert same(whole, second)
    assert whole.reference.follows_changes
    for p, q in zip(whole.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(whole.reference.start(p), second.reference.start(q))


def test_update_sparsity_sees_released_updates(folder, tmp_path: Path) -> None:  # noqa: F811
    fractions = []
    for release in (None, GradientRelease()):
        model = module(folder, dtype="bfloat16", optimizer=MODES["split"], gradient_release=release, batching=WHOLE)
        trainer = fit(model, tmp_path, steps=1, callbacks=[UpdateSparsity(every_n_steps=1)])
        fractions.append(float(trainer.callback_metrics["update/changed_frac/bf16"]))
    assert fractions[0] == fractions[1] > 0


# ---- the reference ----


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


# ---- computing in another dtype ----


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
