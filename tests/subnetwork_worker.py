"""Trains subnetworks in as many processes as it is started in; the first writes down the weights."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import conftest  # noqa: F401 (sets one thread)
import torch
from precision_modes import MODES, WHOLE
from test_grpo import fit, module

from rlvr_lightning.delta.tensor import whole
from rlvr_lightning.optim import GradientRelease
from rlvr_lightning.strategy import Sharded

CASES: dict[str, dict[str, Any]] = {
    "kept": {"optimizer": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)},
    "released": {
        "optimizer": partial(MODES["split"], lr=0.03),
        "dtype": "bfloat16",
        "batching": WHOLE,
        "gradient_release": GradientRelease(),
    },
}


def train(folder: str, mask: str, out: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name, settings in CASES.items():
        torch.manual_seed(0)
        model = module(folder, subnetwork=mask, max_grad_norm=0.1, **settings)
        strategy = {"strategy": Sharded(timeout_s=60), "devices": world} if world > 1 else {}
        trainer = fit(model, Path(out), 3, **strategy)
        weights = {name: whole(p.detach()).clone() for name, p in model.policy.model.named_parameters()}
        held = float(trainer.callback_metrics["memory/subnetwork_bytes"])
        if trainer.is_global_zero:
            torch.save({"weights": weights, "held": held}, Path(out, f"{name} {world}.pt"))


if __name__ == "__main__":
    train(*sys.argv[1:])
