"""Gradients released in the backward pass: against gradients that are kept, counted, and what cannot work."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from precision_modes import MODES, WHOLE, same
from test_grpo import Constant, Recorder, fit, folder, module, weights  # noqa: F401 (a fixture)

from rlvr_lightning import compute, heap
from rlvr_lightning.callbacks import UpdateSparsity
from rlvr_lightning.compute import compute_in
from rlvr_lightning.experience import Batching
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim import SGD, GradientRelease, update
from rlvr_lightning.optim.updates import Updates
from rlvr_lightning.profiling.allocations import AllocationCounter
from rlvr_lightning.strategy import Sharded
from rlvr_lightning.trainer_checks import check_batches, check_trainer


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
        check_trainer(SimpleNamespace(world_size=1, strategy=None, precision="16-mixed"), torch.float32)
    with pytest.raises(ValueError, match=r"DDPStrategy is not supported in 2 processes; set it to .*Sharded"):
        check_trainer(SimpleNamespace(world_size=2, strategy=DDPStrategy(), precision="32-true"), torch.float32)
    with pytest.raises(ValueError, match=r"set model\.compute_dtype: bfloat16"):
        check_trainer(SimpleNamespace(world_size=2, strategy=Sharded(), precision="bf16-mixed"), torch.float32)


def test_a_released_minibatch_may_fall_on_one_process_alone() -> None:
    """It is drawn from the prompts of all: 8 of 16 may all be one process's."""
    minibatches = Batching(minibatches=2, micro_batch=32)
    with pytest.raises(ValueError, match=r"micro_batch is 32 and a step has 64 completions; raise it to 64"):
        check_batches(16, 8, minibatches, GradientRelease(), ranks=2)
    check_batches(16, 8, replace(minibatches, micro_batch=64), GradientRelease(), ranks=2)


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
