"""What ends a run, and that it ends: gradients that are not finite, processes that die, processes that disagree."""

from __future__ import annotations

import csv
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
        def _forward_backward(self, loss_of, part):
            return super()._forward_backward(loss_of, part) | {"loss": math.inf}

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


# ---- processes ----

HERE = Path(__file__).parent
FIT = ["-m", "rlvr_lightning", "fit", "--config", "fsdp.yaml", "--trainer.accelerator=cpu", "--trainer.max_steps=3"]
FIT += [
    "--ckpt_path=last",
    "--data.val.arithmetic.num=8",
    "--validate_first=false",
    "--trainer.enable_progress_bar=false",
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def start(how: str, cwd: Path, *options: str, launcher: list[str] = TORCHRUN, **environment: str):
    """A fit in two processes, or a part of one, with `failing.Fails` in it."""
    fails = ["--trainer.callbacks+=failing.Fails", f"--trainer.callbacks.how={how}"]
    clean = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK")}
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *launcher, *FIT, *fails, *(f"--trainer.{option}" for option in options)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment,
    )


def ending(process) -> tuple[str, float, dict[int, int]]:
    """What it printed, the seconds it took from the first failure on, and pids of failing processes by rank."""
    lines, failed_s, pids = [], None, {}
    for line in process.stdout:
        lines.append(line)
        if found := re.match(r"FAILS rank (\d+) pid (\d+)", line):
            failed_s = failed_s or time.monotonic()
            pids[int(found[1])] = int(found[2])
    process.wait(timeout=60)
    assert failed_s, "".join(lines)
    return "".join(lines), time.monotonic() - failed_s, pids


def ours(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_killed_process_is_named_and_ends_the_others_under_torchrun(tmp_path):
    process = start("kill", tmp_path)
    text, seconds, pids = ending(process)
    assert process.returncode == 1
    [line] = ours(text)
    assert re.match(rf"error: rank 1 \(host \S+, pid {pids[1]}\) is gone without a word: killed", line)
    assert "[rank" not in text  # no traceback of the survivor's
    assert seconds < 60


@pytest.mark.slow
def test_an_exception_is_told_by_the_process_that_has_it_and_named_by_the_others(tmp_path):
    process = start("raise", tmp_path, launcher=[])
    text, seconds, pids = ending(process)
    assert process.returncode == 1
    [line] = ours(text)
    assert line.startswith("error: rank 1 (host ")
    assert f"pid {pids[1]}) raised RuntimeError: boom of seven" in line
    assert "[rank1]: RuntimeError: boom of seven" in text
    assert "[rank0]" not in text
    assert seconds < 60


def test_machines_without_a_common_launcher_miss_each_other(tmp_path):
    apart = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 10000)}
    options = ["devices=1", "num_nodes=2", "callbacks.apart=5"]
    nodes = [start("kill", tmp_path, *options, launcher=[], NODE_RANK=rank, **apart) for rank in "01"]
    _, _, pids = ending(nodes[1])
    text, _ = nodes[0].communicate(timeout=60)
    assert nodes[1].returncode == -signal.SIGKILL
    assert nodes[0].returncode == 1
    [line] = ours(text)
    assert f"pid {pids[1]}) has not answered for 5 s" in line


def test_preemption_saves_with_all_processes_in_step(tmp_path):
    """SIGTERM to the launcher and to both processes, as SLURM sends it; the launcher passes it on once more."""
    process = start("wait", tmp_path, "callbacks.rank=-1")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.match(r"FAILS rank \d+ pid (\d+)", line):
            os.kill(int(found[1]), signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    text = "".join(lines)
    assert process.returncode not in (0, None)
    assert text.count("Interrupted after step 2.") == 1
    assert not ours(text)
    checkpoint = tmp_path / "runs/fsdp/version_0/checkpoints/interrupted.ckpt"
    assert f"--ckpt_path {checkpoint.relative_to(tmp_path)}" in text
    assert len(list(checkpoint.iterdir())) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["lightning", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_preemption_of_one_process_saves_too(launcher, rank, tmp_path):
    process = start("SIGTERM", tmp_path, f"callbacks.rank={rank}", launcher=launcher)
    text, _, _ = ending(process)
    assert process.returncode == (1 if launcher else 143)
    assert text.count("Interrupted after step 2.") == 1
    assert not ours(text)


@pytest.mark.slow
def test_slurm_requeues_a_job_that_goes_on_from_what_it_saved(tmp_path):
    """Tasks as srun starts them; a program that writes down its arguments stands for `scontrol`."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    slurm = {"JOB_ID": "4217", "JOB_NAME": "fit", "NTASKS": "2", "NTASKS_PER_NODE": "2", "NODELIST": "127.0.0.1"}
    slurm |= {"NODEID": "0", "JOB_NUM_NODES": "1"}
    shared = {f"SLURM_{name}": value for name, value in slurm.items()}
    shared |= {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "MASTER_PORT": str(21000 + os.getpid() % 9000)}

    def tasks(how: str, *options: str):
        ids = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
        return [start(how, tmp_path, *options, launcher=[], **shared, **one) for one in ids]

    texts = [task.communicate(timeout=120)[0] for task in tasks("SIGUSR1", "callbacks.rank=-1")]
    assert (tmp_path / "requeued").read_text() == "requeue 4217\n"
    assert sum(text.count("Interrupted after step 2.") for text in texts) == 1
    assert not ours("".join(texts))

    again = tasks("wait", "callbacks.at=99", "max_steps=3", "logger=true")
    texts = [task.communicate(timeout=120)[0] for task in again]
    assert [task.returncode for task in again] == [0, 0], texts
    assert "3 optimizer steps in" in texts[0]
    with (tmp_path / "runs/fsdp/version_1/metrics.csv").open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["reward/mean"]]
    assert steps[-1] == "2"
    assert "0" not in steps  # it did not begin anew; the row of the step after which it stopped may be there again


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_named_and_ends_the_others_under_lightning(rank, tmp_path):
    process = start("kill", tmp_path, f"callbacks.rank={rank}", launcher=[])
    text, seconds, pids = ending(process)
    assert process.returncode == (-signal.SIGKILL if rank == 0 else 1)
    [line] = ours(text)
    assert f"pid {pids[rank]})" in line
    assert rank == 0 or "was killed by SIGKILL" in line
    assert seconds < 60


@pytest.mark.slow
def test_a_collective_call_that_the_others_do_not_make_is_an_error(tmp_path):
    process = start("disagree", tmp_path, "strategy.timeout_s=15")
    text, seconds, _ = ending(process)
    assert process.returncode == 1
    [line] = ours(text)
    assert "within trainer.strategy.timeout_s" in line
    assert seconds < 60


@pytest.mark.slow
def test_processes_stop_together_though_one_alone_has_an_infinite_loss(tmp_path, capsys):
    process = start("infinite", tmp_path, "max_steps=9")
    text, _, _ = ending(process)
    assert process.returncode == 1
    [line] = ours(text)
    assert line.startswith("error: loss or gradient were not finite in 5 optimizer steps in a row")
    kept = tmp_path / "runs/fsdp/version_0/not_finite/step_6"
    assert sorted(path.name for path in kept.iterdir()) == [
        f"rank{rank}.{end}" for rank in (0, 1) for end in ("json", "safetensors")
    ]
    assert replay([str(kept)]) == 0
    [amiss] = [line for line in capsys.readouterr().out.splitlines() if "not finite:" in line]
    assert amiss.split()[:2] == ["1", "0"]
