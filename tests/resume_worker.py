"""Kills runs of the command line again and again: `python resume_worker.py MODEL FOLDER KILLS RANKS [SEED]`.

One process imports everything and forks those that train, so that no kill is spent on the start of an interpreter. Each
attempt is `fit --ckpt_path last` in so many processes. When a chosen phase (rollout, reward, backward, optimizer, save,
or any moment) has been seen a few times, one of the processes is killed with SIGKILL, a little later the others. After
the last kill the run goes on to its end. Prints a record; fails if anything differs from the run that was left alone.
"""

from __future__ import annotations

import csv
import json
import mmap
import os
import random
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
import yaml
from checkpoint_worker import forked
from lightning.pytorch import Callback, Trainer
from test_grpo import Digits

import rlvr_lightning.cli  # noqa: F401 (before forking)
from rlvr_lightning.__main__ import main as command
from rlvr_lightning.checkpoint.last import find_last
from rlvr_lightning.data.prompts import PromptSource
from rlvr_lightning.delta.digest import digest_state
from rlvr_lightning.export import kept_steps, restored
from rlvr_lightning.rewards.base import Reward

PHASES = ["start", "rollout", "reward", "reference", "forward", "backward", "optimizer", "", "save"]
AIMS = ["rollout", "reward", "backward", "optimizer", "save", "any"]
STEPS_PER_KILL = 2
UNREPEATABLE = ("time/", "memory/", "tokens/per_s", "update/measure", "update/changed_frac")
"""Columns that are of the clock or of the process; changed_frac_total is since the start of a process."""
seen = mmap.mmap(-1, 2)  # phase of the first rank, and how often it was entered; shared with those who look


def tell(phase: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        number = PHASES.index(phase)
        seen[1] = (seen[1] + 1) % 256
        seen[0] = number


class Noisy(Reward):
    """Draws from every global generator: they must go on where they were."""

    def __call__(self, samples):
        noise = [random.random() + np.random.rand() + torch.rand(()).item() for _ in samples]
        return [d + 0.1 * n for d, n in zip(Digits()(samples), noise, strict=True)]


class Sums(PromptSource):
    def __init__(self, num: int = 20) -> None:
        self.records = [{"prompt": f"{10 + 7 * i % 83}+{i % 9}="[: 3 + i % 4], "answer": "1"} for i in range(num)]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


class Tell(Callback):
    """Says where the process is, and which prompts it was given."""

    def on_train_start(self, trainer, pl_module) -> None:
        pl_module.phase_listeners.append(tell)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.is_global_zero:
            with Path("prompts.jsonl").open("a") as file:
                file.write(json.dumps([pl_module.rollout_step, [record["index"] for record in batch]]) + "\n")


def config(model: str, steps: int, ranks: int, delta: bool) -> dict:
    """Two validations in five steps, two optimizer steps in a batch, warm-up, everything that has a state."""
    sums = {"class_path": "resume_worker.Sums"}
    module = {
        "model": model,
        "rewards": {"noisy": {"class_path": "resume_worker.Noisy"}},
        "group_size": 2,
        "dtype": "bfloat16",
        "sampling": {"max_tokens": 4},
        "objective": {"kl_coef": 0.1},
        "batching": {"minibatches": 2, "micro_batch": 8},
        "warmup_steps": 5,
        "optimizer": {"class_path": "rlvr_lightning.optim.SGD", "init_args": {"lr": 0.05}},
    }
    trainer = {
        "max_steps": 2 * steps,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "resume_worker.Tell"}],
        "accelerator": "cpu",
        "devices": ranks,
    }
    if ranks > 1:
        init = {"timeout_s": 60}
        trainer["strategy"] = {"class_path": "rlvr_lightning.strategy.Sharded", "init_args": init}
    if delta:
        trainer["plugins"] = "rlvr_lightning.checkpoint.DeltaCheckpointIO"
    data = {"tokenizer": model, "prompts_per_step": 8, "train": sums, "val": {"sums": sums | {"init_args": {"num": 3}}}}
    return {
        "seed_everything": 3,
        "model": {"class_path": "rlvr_lightning.grpo.GRPO", "init_args": module},
        "data": {"class_path": "rlvr_lightning.data.prompts.PromptData", "init_args": data},
        "trainer": trainer,
        "checkpoint": {"every_n_train_steps": 2, "save_top_k": 2, "monitor": "step", "mode": "max"},
    }


def rank_of_run(folder: Path, rank: int, ranks: int, port: int) -> None:
    """What one process does."""
    os.chdir(folder)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "resume"}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks)}
        from lightning.pytorch.utilities import rank_zero_only

        rank_zero_only.rank = rank
    save = Trainer.save_checkpoint

    def telling(*args, **kwargs):
        tell("save")
        save(*args, **kwargs)
        tell("")

    Trainer.save_checkpoint = telling
    tell("start")
    status = command(["fit", "--config=run.yaml", "--ckpt_path=last"])
    if status:
        raise SystemExit(status)


def start(folder: Path, ranks: int) -> list[int]:
    """All processes of an attempt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seen[0] = seen[1] = 0
    return [forked(partial(rank_of_run, folder, rank, ranks, port), folder / "log.txt") for rank in range(ranks)]


def finish(pids: list[int], folder: Path) -> None:
    for pid in pids:
        _, status = os.waitpid(pid, 0)
        assert status == 0, (folder / "log.txt").read_text()[-6000:]


def kill_at(pids: list[int], aim: str, dice: random.Random, folder: Path) -> str:
    """Kill an attempt; returns the phase in which that was."""
    times, last = dice.randint(1, 3), -1
    give_up = time.monotonic() + 120
    while times:
        now = seen[1]
        hit = (aim == "any" and seen[0] > 0) or PHASES[seen[0]] == aim
        if now != last and hit:
            times -= 1
        last = now
        for pid in pids:
            assert os.waitpid(pid, os.WNOHANG)[0] == 0, (aim, (folder / "log.txt").read_text()[-6000:])
        assert time.monotonic() < give_up, f"never saw {aim}"
        time.sleep(0.0005 if aim == "any" else 0)
    time.sleep(dice.choice([0, 0, dice.uniform(0, 0.004), dice.uniform(0, 0.03 if aim != "any" else 0.5)]))
    phase = PHASES[seen[0]]
    order = dice.sample(pids, len(pids))
    for number, pid in enumerate(order):
        os.kill(pid, signal.SIGKILL)
        if not number:
            time.sleep(dice.uniform(0, 0.1))
    for pid in pids:
        os.waitpid(pid, 0)
    return phase or "between steps"


def rows(folder: Path) -> dict[str, dict[str, str]]:
    """What was logged of each step, by all attempts; asserts that none says something else than another."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted(folder.glob("runs/run/*/metrics.csv")):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                if row.get("step") is None:  # the kill cut it
                    continue
                mine = found.setdefault(row["step"], {})
                for name, value in row.items():
                    if value and name and not name.startswith(UNREPEATABLE):
                        assert mine.setdefault(name, value) == value, (file, row["step"], name, mine[name], value)
    return found


def prompts(folder: Path) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for line in (folder / "prompts.jsonl").read_text().splitlines():
        step, indices = json.loads(line)
        assert found.setdefault(step, indices) == indices, (step, indices, found[step])
    return found


def weights(folder: Path, model: str) -> tuple[int, str]:
    """Step and digest of the newest checkpoint's weights."""
    [kept] = kept_steps(find_last([folder / "runs"]))
    policy, _ = restored(kept, model)
    return kept.step, digest_state(policy.state_dict())


def main(model: str, out: str, kills: str, ranks: str, seed: str = "0") -> None:
    torch.set_num_threads(1)
    count, dice, steps = int(ranks), random.Random(int(seed)), STEPS_PER_KILL * int(kills) + 5
    root = Path(out)
    whole, killed = root / f"whole-{ranks}", root / f"killed-{ranks}"
    for run in (whole, killed):
        run.mkdir(parents=True)
        delta = int(seed) % 2 == 1
        (run / "run.yaml").write_text(yaml.safe_dump(config(model, steps, count, delta)))
    began = time.monotonic()
    finish(start(whole, count), whole)
    arguments = f"MODEL FOLDER {kills} {ranks} {seed}"
    record = {"command": f"OMP_NUM_THREADS=1 python tests/resume_worker.py {arguments}", "processes": count}
    record |= {"checkpoints": "delta" if delta else "whole", "batches": steps, "kills": 0, "in_phase": {}}
    resumed_from = []
    while record["kills"] < int(kills):
        phase = kill_at(start(killed, count), AIMS[record["kills"] % len(AIMS)], dice, killed)
        record["kills"] += 1
        record["in_phase"][phase] = record["in_phase"].get(phase, 0) + 1
        found = find_last([killed / "runs"])
        resumed_from.append(kept_steps(found)[0].step if found else 0)
    finish(start(killed, count), killed)
    log = (killed / "log.txt").read_text()
    record["resumed_from_step"] = resumed_from
    record["passed_over"] = log.count("passed over: ")
    record["same_weights"] = weights(killed, model) == weights(whole, model)
    record["same_metrics"] = rows(killed) == rows(whole)
    record["same_prompts"] = prompts(killed) == prompts(whole)
    record["rows"] = len(rows(whole))
    record["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    sys.modules["resume_worker"] = sys.modules["__main__"]  # one module, also for the YAML
    main(*sys.argv[1:])
