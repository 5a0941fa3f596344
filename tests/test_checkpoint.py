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
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from test_grpo import fit, folder, module, weights  # noqa: F401 (a fixture)

from rlvr_lightning.__main__ import main
from rlvr_lightning.checkpoint import DeltaCheckpointIO
from rlvr_lightning.checkpoint.file import metadata_of
from rlvr_lightning.checkpoint.restore import restore_
from rlvr_lightning.checkpoint.state import Reader
from rlvr_lightning.data.arithmetic import ArithmeticDemos
from rlvr_lightning.data.prompts import PromptData
from rlvr_lightning.experience import Batching
from rlvr_lightning.export import kept_steps
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim import SGD, GradientRelease
from rlvr_lightning.policy import LoRA
from rlvr_lightning.sft import SFT

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


@pytest.mark.parametrize("objective", [KL, Objective()])
def test_a_module_that_has_trained_on_goes_back(folder, tmp_path: Path, objective) -> None:  # noqa: F811
    """Its weights are no longer the start's: those come from the reference, or from the copy on disk."""
    model, half = (module(folder, **settings("split") | {"objective": objective}) for _ in range(2))
    fit(model, tmp_path, steps=4, **saving(tmp_path, every=2))
    fit(half, tmp_path / "half", steps=2)
    [step_2] = [one.path for one in kept_steps(tmp_path / "ckpt") if one.step == 2]
    restore_(model, Reader(step_2), model.start, model.reference)
    assert same(model, half)
    if model.reference is not None:
        for p, q in zip(model.reference._kept, half.reference._kept, strict=True):
            assert torch.equal(model.reference.start(p), half.reference.start(q))
    with pytest.raises(ValueError, match="starts from other weights"):
        restore_(model, Reader(step_2))


def test_what_does_not_fit_is_said_in_one_line(folder, tmp_path: Path) -> None:  # noqa: F811
    fit(module(folder, **settings("split")), tmp_path, steps=3, **saving(tmp_path))
    last = {"ckpt_path": str(tmp_path / "ckpt" / "last.ckpt"), "plugins": [DeltaCheckpointIO()]}
    with pytest.raises(ValueError, match=r'model.dtype: .*last.ckpt was made with "bfloat16", now it is "float32"'):
        fit(module(folder, **settings("split") | {"dtype": "float32"}), tmp_path, **last)
    with pytest.raises(ValueError, match=r"model.lora.rank: .*last.ckpt was made with not there, now it is 2: cannot"):
        fit(module(folder, **settings("split") | {"lora": LoRA(rank=2)}), tmp_path, **last)
    with pytest.raises(ValueError, match=r'model.optimizer.master: .* was made with "split", now it is "fp32"'):
        fit(module(folder, **settings("fp32")), tmp_path, steps=4, **last)


def test_supervised_runs_resume_too(tmp_path: Path) -> None:
    def train(steps: int, **options) -> SFT:
        seed_everything(3, verbose=False)
        model = SFT("tiny", partial(torch.optim.AdamW, lr=1e-3))
        data = PromptData("tiny", train=ArithmeticDemos(num=12, seed=1, levels=[1]), prompts_per_step=4)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        checkpoint = options.pop("ckpt_path", None)
        trainer = Trainer(
            max_steps=steps, default_root_dir=tmp_path, **quiet | {"enable_checkpointing": False} | options
        )
        trainer.fit(model, data, ckpt_path=checkpoint)
        return model

    train(3, **saving(tmp_path))
    resumed = train(5, plugins=[DeltaCheckpointIO()], ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"))
    assert same(train(5), resumed)


def test_the_command_line_resumes(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"trainer.plugins": "rlvr_lightning.checkpoint.DeltaCheckpointIO", "data.prompts_per_step": 2}
    options |= {"trainer.limit_val_batches": 0, "trainer.enable_progress_bar": False, "model.group_size": 2}
    options |= {"model.sampling.max_tokens": 4, "model.dtype": "bfloat16"}
    command = ["fit", "--config=sgd.yaml", *(f"--{name}={value}" for name, value in options.items())]
    assert main([*command, "--trainer.max_steps=2"]) == 0
    last = "runs/sgd/version_0/checkpoints/last.ckpt"
    assert metadata_of(Path(last))["about"]["step"] == 2
    assert main([*command, "--trainer.max_steps=3", f"--ckpt_path={last}"]) == 0
    assert metadata_of(Path("runs/sgd/version_1/checkpoints/last.ckpt"))["about"]["step"] == 3
    command.remove("--trainer.plugins=rlvr_lightning.checkpoint.DeltaCheckpointIO")
    assert main([*command, f"--ckpt_path={last}"]) == 2
    assert "last.ckpt holds what changed since the start; to read it set trainer.plugins" in capsys.readouterr().err


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
