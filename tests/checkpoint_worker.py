"""Kills a training process again and again: `python checkpoint_worker.py MODEL FOLDER KILLS [SEED]` prints a record.

One process imports everything and forks the ones that train, so that no kill is spent on the start of an interpreter.
Each of them resumes from the newest checkpoint, saves after every step, and is killed with SIGKILL at a random moment
after its first checkpoint: two in three at any time, one in three just after a half-written file is seen.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from test_grpo import fit, module

from rlvr_lightning.checkpoint import DeltaCheckpointIO
from rlvr_lightning.checkpoint.state import Reader
from rlvr_lightning.delta.digest import digest_state
from rlvr_lightning.export import kept_steps
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim import SGD
from rlvr_lightning.schema import Sampling

STEPS_PER_KILL = 6
WINDOW_STEPS = 3  # a process is killed within the time of so many steps after its first checkpoint


def digest(model) -> str:
    low = [state["low"] for state in model.trainer.optimizers[0].state.values()]
    return digest_state([*model.policy.state_dict().items(), *((str(i), low) for i, low in enumerate(low))])


class Digests(Callback):
    """Writes the digest of weights and low halves after each step; when resuming, compares with `expected` first."""

    def __init__(self, file: Path, expected: list[str]) -> None:
        self.file, self.expected, self.found = file, expected, []

    def on_train_start(self, trainer, pl_module) -> None:
        if trainer.global_step and digest(pl_module) != self.expected[trainer.global_step - 1]:
            raise AssertionError(f"resumed at step {trainer.global_step} with other weights")

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.found.append(digest(pl_module))
        if self.file:
            self.file.write_text(json.dumps(self.found))


def train(folder: str, out: Path, steps: int, expected: list[str]) -> None:
    settings = {"dtype": "bfloat16", "optimizer": partial(SGD, lr=0.05), "objective": Objective(kl_coef=0.1)}
    settings |= {"sampling": Sampling(max_tokens=4), "warmup_steps": 3}
    saved = out / "ckpt"
    newest = str(kept_steps(saved)[-1].path) if any(saved.glob("*.ckpt")) else None
    keep = ModelCheckpoint(saved, save_last=True, every_n_train_steps=1, save_top_k=-1)
    trainer = {"callbacks": [keep, Digests(out / "digests.json", expected)], "enable_checkpointing": True}
    model = module(folder, **settings)
    fit(model, out, steps, 2, ckpt_path=newest, plugins=[DeltaCheckpointIO()], max_epochs=-1, **trainer)
    (out / "final").write_text(digest(model))


def forked(work: Callable[[], None], log: Path) -> int:
    """Start a process; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            work()
            status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)
    return 0


def ended(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def kill_at_random(pid: int, saved: Path, dice: random.Random, window_s: float) -> int:
    """Kill a training process; returns its exit status (-9 unless it ended by itself)."""
    before = {path: path.stat().st_mtime_ns for path in saved.glob("*.ckpt")}
    while (status := ended(pid)) is None:
        if any(path.stat().st_mtime_ns != before.get(path) for path in saved.glob("*.ckpt")):
            break
        time.sleep(0.001)
    if status is not None:
        return status
    time.sleep(dice.uniform(0, window_s))
    if dice.random() < 1 / 3:
        give_up = time.monotonic() + 2
        while not any(name.endswith(".part") for name in os.listdir(saved)) and time.monotonic() < give_up:
            pass
        time.sleep(dice.uniform(0, 0.004))
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: str, out: str, kills: str, seed: str = "0") -> None:
    torch.set_num_threads(1)
    root, dice, steps = Path(out), random.Random(int(seed)), STEPS_PER_KILL * int(kills) + 5
    whole, killed = root / "whole", root / "killed"
    for run in (whole, killed):
        (run / "ckpt").mkdir(parents=True)
    began = time.monotonic()
    _, status = os.waitpid(forked(partial(train, folder, whole, steps, []), root / "whole.log"), 0)
    assert status == 0, (root / "whole.log").read_text()
    step_s = (time.monotonic() - began) / steps
    expected = json.loads((whole / "digests.json").read_text())
    command = f"OMP_NUM_THREADS=1 python tests/checkpoint_worker.py {folder} FOLDER {kills} {seed}"
    record = {"command": command, "kills": 0, "left_half_written": 0, "steps": steps, "resumed_from": []}
    while record["kills"] < int(kills):
        pid = forked(partial(train, folder, killed, steps, expected), root / "killed.log")
        status = kill_at_random(pid, killed / "ckpt", dice, WINDOW_STEPS * step_s)
        assert status == -signal.SIGKILL, (status, (root / "killed.log").read_text()[-3000:])
        record["kills"] += 1
        record["left_half_written"] += any(killed.glob("ckpt/.*.part"))
        record["resumed_from"].append(kept_steps(killed / "ckpt")[-1].step)
        for path in killed.glob("ckpt/*.ckpt"):
            if path.stat().st_mtime > time.time() - 5:
                Reader(path)  # every file under its final name is complete
    _, status = os.waitpid(forked(partial(train, folder, killed, steps, expected), root / "killed.log"), 0)
    assert status == 0, (root / "killed.log").read_text()[-3000:]
    record["steps_by_the_last_process"] = steps - record["resumed_from"][-1]
    record["bit_identical"] = (killed / "final").read_text() == (whole / "final").read_text() == expected[-1]
    record["temporary_files_left"] = len(list(killed.glob("ckpt/.*.part")))
    record["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
