"""`fit --ckpt_path last`: killed at any moment, a run goes on to the same weights, metrics and prompts."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_checkpoint_file import saved
from test_grpo import Prompts, fit, folder, module  # noqa: F401 (a fixture)

from rlvr_lightning.__main__ import main
from rlvr_lightning.checkpoint.last import find_last
from rlvr_lightning.checkpoint.resume import check_settings, random_state, restore_random_state
from rlvr_lightning.experience import Batching
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim import SGD
from rlvr_lightning.policy import LoRA


@pytest.mark.parametrize(
    ("kills", "ranks", "seed"),
    [
        (4, 1, 0),
        (2, 2, 1),
        *(pytest.param(30, ranks, seed, marks=pytest.mark.slow) for ranks in (1, 4) for seed in (0, 1)),
    ],
)
def test_killed_at_any_moment_a_run_goes_on(folder, tmp_path: Path, kills: int, ranks: int, seed: int) -> None:  # noqa: F811
    worker = str(Path(__file__).with_name("resume_worker.py"))
    done = subprocess.run(
        [sys.executable, worker, folder, str(tmp_path), str(kills), str(ranks), str(seed)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    record = json.loads(done.stdout)
    assert record["kills"] == kills
    assert (record["same_weights"], record["same_metrics"], record["same_prompts"]) == (True, True, True)
    if kills >= 30:
        assert {"rollout", "reward", "backward", "optimizer", "save"} <= set(record["in_phase"])


# ---- which checkpoint is the last ----


def older(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path, capsys) -> None:
    runs = tmp_path / "runs" / "sgd"
    names = [f"version_{i}/checkpoints/{name}.ckpt" for i, name in enumerate(["a", "b", "c", "d"])]
    for age, name in enumerate(reversed(names)):
        (runs / name).parent.mkdir(parents=True)
        saved(runs / name)
        older(runs / name, 100 * (1 + age))
    assert find_last([runs]) == runs / names[3]
    whole = (runs / names[3]).read_bytes()
    (runs / names[3]).write_bytes(whole[:-1])
    (runs / names[2]).write_bytes(b"")
    for name in names[2:]:
        older(runs / name, 1)
    assert find_last([runs]) == runs / names[1]
    told = capsys.readouterr().err
    assert told.count("passed over: checkpoint:") == 2
    assert "d.ckpt is truncated or altered" in told
    torch.save({"a": torch.ones(3)}, runs / names[0])
    assert find_last([runs]) == runs / names[0]
    content = bytearray((runs / names[0]).read_bytes())
    content[content.index(b"\x00\x00\x80?") + 1] ^= 1  # in the middle of the tensor
    (runs / names[0]).write_bytes(content)
    assert find_last([runs]) == runs / names[1]
    (runs / names[1]).write_bytes(b"no")
    with pytest.raises(ValueError, match=r"every checkpoint under .*sgd is damaged"):
        find_last([runs])
    assert find_last([tmp_path / "nowhere"]) is None


def test_the_command_line_finds_the_runs_of_its_config(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"data.prompts_per_step": 2, "trainer.limit_val_batches": 0, "trainer.enable_progress_bar": False}
    options |= {"model.sampling.max_tokens": 4, "model.group_size": 2, "ckpt_path": "last"}
    command = ["--config=sgd.yaml", *(f"--{name}={value}" for name, value in options.items())]
    assert main(["validate", *command[:1], "--ckpt_path=last"]) == 2
    assert "there is no checkpoint under runs/sgd" in capsys.readouterr().err
    assert main(["fit", *command, "--trainer.max_steps=2"]) == 0
    assert "no checkpoint under runs/sgd yet: starting afresh" in capsys.readouterr().err
    Path("runs/sgd/version_0/checkpoints/newer.ckpt").write_bytes(b"cut")
    assert main(["fit", *command, "--trainer.max_steps=3"]) == 0
    told = capsys.readouterr().err
    assert "passed over: checkpoint: runs/sgd/version_0/checkpoints/newer.ckpt" in told
    assert "resuming from runs/sgd/version_0/checkpoints/last.ckpt" in told
    assert find_last([Path("runs")]) == Path("runs/sgd/version_1/checkpoints/last.ckpt")
    assert main(["fit", *command, "--trainer.max_steps=4", "--data.init_args.seed=9"]) == 2
    assert "data.seed: runs/sgd/version_1/checkpoints/last.ckpt was made with 0, now it is 9" in capsys.readouterr().err


# ---- settings ----

MADE_WITH = {"dtype": "bfloat16", "optimizer": partial(SGD, lr=0.5), "lora": None, "warmup_steps": 3, "seed": 4}
CHANGES = {
    "model.dtype": {"dtype": "float32"},
    "model.seed": {"seed": 5},
    "model.group_size": {"group_size": 2},
    "model.lora.rank": {"lora": LoRA(rank=3)},
    "model.optimizer": {"optimizer": partial(torch.optim.SGD, lr=0.5)},
    "model.optimizer.lr": {"optimizer": partial(SGD, lr=0.25)},
    "model.optimizer.master": {"optimizer": partial(SGD, lr=0.5, master="fp32")},
    "model.scheduler": {"warmup_steps": 4},
}


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: F811
    path = tmp_path_factory.mktemp("settings")
    keep = ModelCheckpoint(path, filename="{step}", every_n_train_steps=2)
    fit(module(folder, **MADE_WITH), path, 2, callbacks=[keep], enable_checkpointing=True)
    return str(path / "step=2.ckpt")


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_setting_that_cannot_be_resumed_is_named(folder, tmp_path: Path, checkpoint: str, field: str) -> None:  # noqa: F811
    model = module(folder, **MADE_WITH | CHANGES[field])
    with pytest.raises(ValueError, match=rf"^{field}: .*step=2.ckpt was made with .*: cannot resume; set it as then"):
        fit(model, tmp_path, 3, ckpt_path=checkpoint)


def test_so_is_changed_data(folder, tmp_path: Path, checkpoint: str, monkeypatch) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=r"^data.prompts_per_step: .* was made with 6, now it is 4"):
        fit(module(folder, **MADE_WITH), tmp_path, 3, 4, ckpt_path=checkpoint)
    for prompts in (Prompts(13), [*Prompts(11), {"prompt": "9"}]):
        monkeypatch.setattr("test_grpo.Prompts", lambda prompts=prompts: prompts)
        with pytest.raises(ValueError, match=r"^data.train: .* was made with \"12 prompts, sha256 \w+\", now"):
            fit(module(folder, **MADE_WITH), tmp_path, 3, ckpt_path=checkpoint)


def test_what_may_change_is_said(folder, tmp_path: Path, checkpoint: str) -> None:  # noqa: F811
    with pytest.warns(UserWarning, match=r"model.objective.kl_coef: from here on 0.2, up to this checkpoint 0.0"):
        fit(module(folder, **MADE_WITH | {"objective": Objective(kl_coef=0.2)}), tmp_path, 3, ckpt_path=checkpoint)
    smaller = MADE_WITH | {"batching": Batching(micro_batch=4, rollout_batch=5)}
    fit(module(folder, **smaller), tmp_path, 3, ckpt_path=checkpoint)


def test_settings_are_compared_both_ways() -> None:
    for then, now in (({"model.seed": 1}, {}), ({}, {"model.seed": 1})):
        with pytest.raises(ValueError, match=r"model.seed: x was made with (1, now it is not there|not there, now)"):
            check_settings(then, now, "x")
    check_settings({"model.seed": 1}, {"model.seed": 1}, "x")


# ---- random numbers ----


def test_all_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    draw()
    torch.save(random_state(), tmp_path / "state")
    drawn = draw()
    assert draw() != drawn
    restore_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == drawn
