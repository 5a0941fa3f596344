"""Runs cases of `test_checkpoint_sharded` in as many processes as it is started in: MODEL ROOT save|load CASES."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from conftest import tiny_causal_lm  # noqa: F401 (sets one thread)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from test_grpo import fit, module
from torch.distributed.tensor import DTensor

from rlvr_lightning.checkpoint import DeltaCheckpointIO
from rlvr_lightning.checkpoint.stored import everything, sharded_as
from rlvr_lightning.delta.digest import digest_state
from rlvr_lightning.delta.tensor import whole
from rlvr_lightning.experience import Batching
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim import SGD, GradientRelease
from rlvr_lightning.policy import LoRA
from rlvr_lightning.strategy import Sharded

WORLD = int(os.environ.get("WORLD_SIZE", 1))
KL = Objective(kl_coef=0.1)
MOMENTUM = partial(torch.optim.SGD, lr=0.5, momentum=0.9)
RELEASED = {"gradient_release": GradientRelease(clip="delayed"), "batching": Batching(micro_batch=32)}
STOCHASTIC = partial(SGD, lr=0.5, master="none", rounding="stochastic")


@dataclass
class Case:
    settings: dict
    forms: tuple[str, ...]
    """How it is saved: `sharded`, `consolidated`, `delta`."""
    strategy: dict = field(default_factory=dict)


CASES = {
    "split": Case({"optimizer": partial(SGD, lr=0.5), "objective": KL}, ("sharded", "consolidated", "delta")),
    "fp32": Case({"optimizer": partial(SGD, lr=0.5, master="fp32")}, ("sharded", "delta")),
    "stochastic": Case({"optimizer": STOCHASTIC, "objective": KL, **RELEASED}, ("consolidated", "delta")),
    "plain": Case({"optimizer": partial(torch.optim.SGD, lr=0.5), "dtype": "float32"}, ("sharded", "consolidated")),
    "momentum": Case({"optimizer": MOMENTUM}, ("sharded",)),
    "adamw": Case({"optimizer": partial(torch.optim.AdamW, lr=1e-3)}, ("sharded", "consolidated", "delta")),
    "lora": Case({"optimizer": MOMENTUM, "lora": LoRA(rank=2), "objective": KL}, ("sharded", "delta")),
    "tied": Case({"optimizer": partial(SGD, lr=0.5), "objective": KL, "model": "tied"}, ("sharded", "delta")),
    "tensor": Case({"optimizer": partial(SGD, lr=0.5)}, ("sharded", "consolidated"), {"tensor": 2}),
    "replicated": Case({"optimizer": partial(SGD, lr=0.5)}, ("sharded", "delta"), {"shard": 1, "replicate": 2}),
}
RUNS = [(name, form) for name, case in CASES.items() for form in case.forms]


def state_digest(model) -> str:
    """Of all that a checkpoint has to bring back: the same in any number of processes."""
    [optimizer] = model.trainer.optimizers
    tensors = {f"w/{name}": whole(p.detach()) for name, p in model.named_parameters()}
    saved = optimizer.state_dict()
    small = [{k: v for k, v in group.items() if k != "params"} for group in saved["param_groups"]]
    for key, values in sorted(saved["state"].items()):
        for name, value in values.items():
            tensors[f"s/{key}/{name}"] = everything(value)
    if model.reference is not None:
        for i, p in enumerate(model.reference._kept):
            tensors[f"r/{i}"] = whole(sharded_as(p.detach(), model.reference.start(p)))
    small.append({"rollout_step": model.rollout_step, "lr": [s.state_dict() for s in schedulers(model)]})
    return digest_state(iter(tensors.items())) + json.dumps(small, sort_keys=True)


def schedulers(model) -> list:
    return [config.scheduler for config in model.trainer.lr_scheduler_configs]


class OnlyShards(Sharded):
    """Fails if a tensor is put together while shards are saved."""

    def save_checkpoint(self, *args, **kwargs) -> None:
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(*args, **kwargs)
            return
        with mock.patch.object(DTensor, "full_tensor", side_effect=AssertionError("a whole tensor")):
            super().save_checkpoint(*args, **kwargs)


class Look(Callback):
    """The digest when training starts and when it ends."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.start = state_digest(pl_module)

    def on_train_end(self, trainer, pl_module) -> None:
        self.end = state_digest(pl_module)


def run(folder: str, out: Path, name: str, form: str, steps: int, load: Path | None = None, save: bool = False):
    """Train in this many processes; returns the digests at the start and the end."""
    case, look = CASES[name], Look()
    torch.manual_seed(7)  # adapters start from random numbers
    settings = {"dtype": "bfloat16", "warmup_steps": 3} | case.settings
    if "model" in settings:
        settings["model"] = str(Path(folder).parent / settings["model"])
    model = module(folder, **settings)
    options: dict = {"callbacks": [look], "devices": WORLD}
    if WORLD > 1:
        kind = {"checkpoints": "consolidated"} if form == "consolidated" else {}
        spread = case.strategy if case.strategy.get("replicate") in (None, WORLD) else {"replicate": 2}
        options["strategy"] = OnlyShards(timeout_s=60, **kind, **spread)
    if form == "delta" or (load and load.is_dir()):
        options["plugins"] = [DeltaCheckpointIO()] if form == "delta" or WORLD == 1 else []
    if save:
        keep = ModelCheckpoint(out / "ckpt", filename="{step}", every_n_train_steps=2, save_top_k=-1)
        options |= {"callbacks": [look, keep], "enable_checkpointing": True}
    fit(model, out, steps, 8, ckpt_path=load and str(load), **options)
    return look.start, look.end


def place(root: Path, name: str, form: str, world: int) -> Path:
    return root / f"{name}-{form}-{world}"


def main(folder: str, root: Path, what: str, names: list[str]) -> dict:
    found = {}
    for name, form in RUNS:
        if name not in names:
            continue
        if what == "save":
            out = place(root, name, form, WORLD)
            found[f"{name} {form}"] = run(folder, out, name, form, 4, save=True)
            found[f"{name} {form} again"] = run(folder, root, name, form, 4, out / "ckpt/step=2.ckpt")
        else:
            for world in (1, 2):
                file = place(root, name, form, world) / "ckpt/step=2.ckpt"
                found[f"{name} {form} {world}"] = run(folder, root, name, form, 3, file)[0]
    if what == "load" and "tensor" in names:  # the same settings, other shards
        file = place(root, "replicated", "delta", 2) / "ckpt/step=2.ckpt"
        found["replicated delta 2 by tensor"] = run(folder, root, "tensor", "sharded", 3, file)[0]
    return found


if __name__ == "__main__":
    folder, root, what, *names = sys.argv[1:]
    found = main(folder, Path(root), what, names or list(CASES))
    if int(os.environ.get("RANK", 0)) == 0:
        (Path(root) / f"{what} {WORLD}.json").write_text(json.dumps(found))
