"""Delta checkpoints: resumed runs against uninterrupted ones, what is stored, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_grpo import fit, folder, module, weights  # noqa: F401 (a fixture)

from rlvr_lightning.checkpoint import DeltaCheckpointIO
from rlvr_lightning.experience import Batching
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim import SGD, GradientRelease
from rlvr_lightning.policy import LoRA

KL = Objective(kl_coef=0.1)
RELEASE = {"gradient_release": GradientRelease(clip="delayed"), "batching": Batching(micro_batch=24)}
STOCHASTIC = partial(SGD, lr=0.5, master="none", rounding="stochastic")
MOMENTUM = partial(torch.optim.SGD, lr=0.5, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-3)
MODES = {
    "split": {"optimizer": partial(SGD, lr=0.5)},
    "split-release-kl": {"optimizer": partial(SGD, lr=0.5), "objective": KL, **RELEASE},
    "fp32": {"optimizer": partial(SGD, lr=0.5, master="fp32")},
    "fp32-release": {"optimizer": partial(SGD, lr=0.5, master="fp32"), **RELEASE},
    "nearest-kl": {"optimizer": partial(SGD, lr=0.5, master="none"), "objective": KL},
    "nearest-release": {"optimizer": partial(SGD, lr=0.5, master="none"), **RELEASE},
    "stochastic": {"optimizer": STOCHASTIC},
    "stochastic-release-kl": {"optimizer": STOCHASTIC, "objective": KL, **RELEASE},
    "adamw-kl": {"optimizer": ADAMW, "objective": KL},
    "momentum": {"optimizer": MOMENTUM},
    "float32": {"optimizer": partial(SGD, lr=0.5), "dtype": "float32", "objective": KL},
    "float32-adamw": {"optimizer": ADAMW, "dtype": "float32"},
    "lora": {"optimizer": MOMENTUM, "lora": LoRA(rank=2), "objective": KL},
}


def settings(mode: str) -> dict:
    return {"dtype": "bfloat16", "warmup_steps": 3} | MODES[mode]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def saving(tmp_path: Path, every: int = 3) -> dict:
    keep = ModelCheckpoint(tmp_path / "ckpt", save_last=True, every_n_train_steps=every, save_top_k=-1)
    return {"callbacks": [keep], "enable_checkpointing": True, "plugins": [DeltaCheckpointIO()]}


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_the_uninterrupted_run(folder, tmp_path: Path, mode) -> None:  # noqa: F811
    trained = []
    for part in range(3):
        torch.manual_seed(7)  # adapters start from random numbers
        model = module(folder, **settings(mode))
        trained.append(model)
        if part == 0:
            fit(model, tmp_path / "whole", steps=5)
        elif part == 1:
            fit(model, tmp_path, steps=3, **saving(tmp_path))
        else:
            torch.manual_seed(8)
            last = str(tmp_path / "ckpt" / "last.ckpt")
            trainer = fit(model, tmp_path / "on", steps=5, ckpt_path=last, **saving(tmp_path / "on", every=1))
            assert trainer.global_step == 5
    whole, stopped, resumed = trained
    assert same(whole, resumed)
    assert not same(stopped, resumed)
    if whole.reference is not None:
        for p, q in zip(whole.reference._kept, resumed.reference._kept, strict=True):
            assert torch.equal(whole.reference.start(p), resumed.reference.start(q))


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_run_goes_on_to_the_same_weights(folder, tmp_path: Path, kills: int) -> None:  # noqa: F811
    command = [sys.executable, str(Path(__file__).with_name("checkpoint_worker.py")), folder, str(tmp_path), str(kills)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["kills"] == kills
    assert record["bit_identical"]
    assert record["temporary_files_left"] == 0
    if kills == 50:
        assert record["left_half_written"] >= 5
