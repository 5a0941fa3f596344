"""Delta checkpoints against Lightning's own, bytes and time: `python -m rlvr_lightning.profiling.bench_checkpoint`.

For each way of keeping precision a few steps of GRPO are run; then the very same state is saved by Lightning's
`TorchCheckpointIO` and by `DeltaCheckpointIO`. `peak_extra` is how much the process grew at its highest while saving.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning.fabric.plugins import TorchCheckpointIO

from rlvr_lightning.checkpoint import DeltaCheckpointIO
from rlvr_lightning.checkpoint.file import metadata_of
from rlvr_lightning.cli import cli_class, quieten
from rlvr_lightning.configuration import find_config

OURS = "rlvr_lightning.optim.SGD"
MODES: dict[str, dict[str, Any]] = {
    "sgd none": {"optimizer": OURS, "optimizer.lr": 0.06, "optimizer.master": "none"},
    "sgd split": {"optimizer": OURS, "optimizer.lr": 0.06, "optimizer.master": "split"},
    "sgd fp32 master": {"optimizer": OURS, "optimizer.lr": 0.06, "optimizer.master": "fp32"},
    "adamw": {"optimizer": "torch.optim.AdamW", "optimizer.lr": 1e-5},
    "sgd, float32 weights": {"optimizer": "torch.optim.SGD", "optimizer.lr": 0.06, "dtype": "float32"},
}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"config": "sgd.yaml", "trainer.max_steps": 20},
    "smollm2": {"config": "smollm2.yaml", "trainer.max_steps": 3, "data.prompts_per_step": 4}
    | {"update_sparsity.every_n_steps": 1000, "model.objective.kl_coef": 0.001},
}
SLOW = {"smollm2": ["sgd none", "sgd split"]}
"""Models of which only some modes are measured by default."""


def trained(model: str, mode: str) -> Any:
    """A trainer after some steps."""
    settings: dict[str, Any] = {"trainer.limit_val_batches": 0, "validate_first": False}
    settings |= {"trainer.plugins": "rlvr_lightning.checkpoint.DeltaCheckpointIO", "model.dtype": "bfloat16"}
    settings |= {"trainer.logger": False, "trainer.enable_progress_bar": False, "checkpoint.every_n_epochs": 1000}
    settings |= {"checkpoint.save_last": False} | MODELS[model] | {f"model.{k}": v for k, v in MODES[mode].items()}
    config = find_config(settings.pop("config"))
    return cli_class("fit", "bench")(
        ["fit", f"--config={config}", *(f"--{k}={v}" for k, v in settings.items())]
    ).trainer


def saved(trainer: Any, plugin: TorchCheckpointIO, path: Path) -> dict[str, Any]:
    """Save a checkpoint; what it took."""
    trainer.strategy.checkpoint_io = plugin
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far
    before, began = resident("VmRSS"), time.perf_counter()
    trainer.save_checkpoint(path)
    took = time.perf_counter() - began
    return {"bytes": path.stat().st_size, "seconds": took, "peak_extra_bytes": resident("VmHWM") - before}


def resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(model: str, mode: str) -> dict[str, Any]:
    """One row of the record."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        trainer = trained(model, mode)
        weights = list(trainer.lightning_module.parameters())
        ordinary = saved(trainer, TorchCheckpointIO(), Path(folder, "ordinary.ckpt"))
        delta = saved(trainer, DeltaCheckpointIO(), Path(folder, "delta.ckpt"))
        metadata = metadata_of(Path(folder, "delta.ckpt")) or {}
    parameters = sum(p.numel() for p in weights)
    row = {"model": model, "mode": mode, "steps": trainer.global_step, "parameters": parameters}
    row |= {"weights_bytes": sum(p.nbytes for p in weights), "ordinary": ordinary, "delta": delta}
    row |= {"delta_bytes_by_part": metadata["bytes"], "entries": metadata["counts"]}
    return row | {"ratio": ordinary["bytes"] / delta["bytes"]}


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES))
    parser.add_argument("--out", type=Path, default=Path("results/checkpoint_bytes.json"))
    args = parser.parse_args()
    quieten()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    here, out = Path.cwd(), args.out.resolve()
    rows = []
    for model in args.models:
        for mode in args.modes or SLOW.get(model, list(MODES)):
            rows.append(measure(model, mode))
            os.chdir(here)
    for row in rows:
        sizes = f"{row['ordinary']['bytes'] / 2**20:9.2f} {row['delta']['bytes'] / 2**20:9.2f} MiB"
        print(f"{row['model']:>8} {row['mode']:<22} {sizes} {row['ratio']:7.1f} times smaller", flush=True)
    command = "python -m rlvr_lightning.profiling.bench_checkpoint " + " ".join(sys.argv[1:])
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    out.write_text(json.dumps({"command": command.strip(), "versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
