"""What ends a run, and that it ends: gradients that are not finite, processes that die, processes that disagree."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_grpo import SGD, Digits, fit, folder, module, weights  # noqa: F401 (a fixture)

from rlvr_lightning.experience import Handling
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.kept_batch import load_batch
from rlvr_lightning.losses import Objective
from rlvr_lightning.replay import main as replay


class Overflows(GRPO):
    """From the second batch on, the third completion's advantage is infinite."""

    def judge(self, *args):
        experience = super().judge(*args)
        if self.rollout_step > 0:
            experience.advantages[2] = -math.inf
        return experience


def overflowing(folder: str, **settings) -> GRPO:  # noqa: F811
    model = module(folder, objective=Objective(kl_coef=0.1), **settings)
    model.__class__ = Overflows
    return model


def test_a_run_stops_after_so_many_steps_and_its_batch_can_be_replayed(folder, tmp_path, capsys):  # noqa: F811
    model = overflowing(folder, handling=Handling(max_nonfinite_steps=3))
    with pytest.raises(ValueError, match=r"in 3 optimizer steps in a row.* replay (\S+)") as stopped:
        fit(model, tmp_path, steps=9)
    assert model.rollout_step == 3  # one that was learned from, two that were not; the fourth stopped it
    kept = Path(re.search(r"replay (\S+)", str(stopped.value))[1])
    assert kept.parent.parent == tmp_path
    [(experience, about)] = load_batch(kept)
    assert experience.rollouts.completion_ids.shape[0] == 24
    assert [s["advantage"] for s in about["samples"]][2] != "inf"  # as computed, before it was made infinite
    assert replay([str(kept)]) == 0
    said = capsys.readouterr().out
    amiss = [line for line in said.splitlines() if "not finite:" in line]
    assert len(amiss) == 1
    assert amiss[0].split()[1] == "2"
    assert "advantages, loss, grad_norm" in amiss[0]
    assert "1 of 24 completions are not finite" in said
    assert repr(about["samples"][2]["completion"]) in said


def test_finite_completions_add_up_to_the_step(folder, tmp_path):  # noqa: F811
    """The losses of a replay are shares of the loss that the run had, on the same weights."""
    from rlvr_lightning.kept_batch import about_batch, save_batch
    from rlvr_lightning.replay import load_policy, replay

    class Keeps(GRPO):
        def learn(self, experience):
            save_batch(tmp_path / "kept", 0, experience, about_batch(self))
            super().learn(experience)

    model = module(folder, objective=Objective(kl_coef=0.1))
    model.__class__ = Keeps
    trainer = fit(model, tmp_path, steps=1)
    parts = load_batch(tmp_path / "kept")
    rows = list(replay(load_policy(parts[0][1], None, None), parts))
    assert sum(row.loss for row in rows) == pytest.approx(float(trainer.callback_metrics["train/loss"]), abs=1e-5)
    assert all(row.finite for row in rows)


def test_steps_that_are_not_in_a_row_do_not_stop_a_run(folder, tmp_path):  # noqa: F811
    class Sometimes(GRPO):
        def judge(self, *args):
            experience = super().judge(*args)
            if self.rollout_step % 3:
                experience.advantages[2] = -math.inf
            return experience

    model = module(folder, handling=Handling(max_nonfinite_steps=3))
    model.__class__ = Sometimes
    trainer = fit(model, tmp_path, steps=9)
    assert trainer.global_step == 9


def test_a_loss_that_is_not_finite_changes_no_weight_though_its_gradient_is(folder, tmp_path):  # noqa: F811
    class Infinite(GRPO):
        def _forward_backward(self, micro, counts):
            return super()._forward_backward(micro, counts) | {"loss": math.inf}

    model = module(folder)
    model.__class__ = Infinite
    model.configure_model()
    before = weights(model)
    trainer = fit(model, tmp_path, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert trainer.callback_metrics["train/nonfinite_steps"] == 1


def test_a_damaged_batch_is_named(folder, tmp_path, capsys):  # noqa: F811
    (tmp_path / "rank0.json").write_text(json.dumps({}))
    (tmp_path / "rank0.safetensors").write_bytes(b"not tensors")
    assert replay([str(tmp_path)]) == 2
    assert "the part of rank 0 cannot be read" in capsys.readouterr().err
    assert replay([str(tmp_path / "none")]) == 2
