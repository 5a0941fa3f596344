"""How far predicted and simulated memory are from counted real steps: `python -m rlvr_lightning.profiling.errors`.

Models with random weights, of the shapes of the packaged tiny model, SmolLM2-135M and Qwen3-0.6B; SGD, AdamW and LoRA,
with and without layers recomputed. Each cell is two real GRPO steps on a CPU, every storage counted by owner
(`owners`), of 2 prompts x 6 completions of the longest length. Writes `results/profile_errors.json`: the rows of the
models named, beside those it has of others.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rlvr_lightning.callbacks.optimizer_state import optimizer_state_bytes
from rlvr_lightning.profiling.find_model import find_model
from rlvr_lightning.profiling.ledger import Ledger
from rlvr_lightning.profiling.memory_worker import Shaped
from rlvr_lightning.profiling.owners import Owners
from rlvr_lightning.profiling.predict import predict
from rlvr_lightning.profiling.settings import Run
from rlvr_lightning.profiling.shares import sizes
from rlvr_lightning.profiling.simulate import module_of, simulate, trainer_of, write_model
from rlvr_lightning.rollout import HFEngine
from rlvr_lightning.study.running import environment_record

MODELS = ("tiny", "smollm2-135m", "qwen3-0.6b")
SIZES: dict[str, Any] = {
    "compute_dtype": "float32",
    "group_size": 6,
    "step_completions": 12,
    "rollout_batch": 7,
    "prompt_tokens": 31,
    "max_tokens": 17,
    "device": "cpu",
}
MODES: dict[str, dict[str, Any]] = {
    "SGD, fp32": {"optimizer": "sgd", "micro_batch": 6},
    "SGD, split, released": {
        "optimizer": "sgd_split",
        "dtype": "bfloat16",
        "gradient_release": True,
        "micro_batch": 12,
    },
    "AdamW, fp32": {"optimizer": "adamw", "micro_batch": 6},
    "LoRA of rank 1, AdamW": {"optimizer": "adamw", "lora_rank": 1, "micro_batch": 6},
}
TOLERATED = {"predicted": 0.05, "simulated": 0.02}
"""Of the peak; the prediction for the tiny model, most of which are small tensors, may be off by twice as much."""
OUT = Path("results/profile_errors.json")


class Longest(Shaped):
    """No completion ends before its limit."""

    def configure_model(self) -> None:
        """See `GRPO`."""
        super().configure_model()
        assert isinstance(self.engine, HFEngine)
        self.engine.stopped = _never  # type: ignore[method-assign]


def _never(rows: Tensor, counts: Tensor, tokens: Tensor) -> Tensor:
    return torch.zeros_like(tokens, dtype=torch.bool)


def run_of(mode: str, recomputed: bool) -> Run:
    """The settings of a cell."""
    return Run(**SIZES, **MODES[mode], activation_checkpointing=recomputed)


def counted(config: Mapping[str, Any], run: Run) -> tuple[Longest, Ledger]:
    """The module after two real steps, and what they held; the first, of one prompt, makes the optimizer's state.

    Args:
        config: of the model, whose weights are drawn.
        run: settings, of one process.
    """
    owners = Owners()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), config)
        torch.manual_seed(0)
        module, trainer = module_of(Longest, Path(folder), run), trainer_of(run)
        ids = [1 + k % 5 for k in range(run.prompt_tokens)]
        prompts = run.completions // run.group_size
        batch: list[Any] = [{"prompt": "", "prompt_ids": ids, "index": k} for k in range(prompts)]
        batches: Any = DataLoader([batch[:1], batch], batch_size=None)  # type: ignore[arg-type]
        with owners.watching(module):
            trainer.fit(module, train_dataloaders=batches)
    return module, owners.ledger()


def cell(model: str, mode: str, recomputed: bool) -> dict[str, Any]:
    """One row of the record, as JSON."""
    config, run = find_model(model)[0], run_of(mode, recomputed)
    seconds = time.perf_counter()
    module, real = counted(config, run)
    took = {"measured_s": time.perf_counter() - seconds}
    seconds = time.perf_counter()
    ledgers = {"measured": real, "predicted": predict(config, run), "simulated": simulate(config, run)}
    took["simulated_s"] = time.perf_counter() - seconds
    peaks = {name: ledger.peak_bytes for name, ledger in ledgers.items()}
    return {
        "model": model,
        "mode": mode,
        "recomputed": recomputed,
        "run": asdict(run),
        "peak_bytes": peaks,
        "error": {name: peaks[name] / peaks["measured"] - 1 for name in TOLERATED},
        "exact": exact(config, run, module, real),
        "held_at_peak": {
            name: {"instant": ledger.peak.name} | ledger.peak.held.owners() for name, ledger in ledgers.items()
        },
        **{name: round(value, 1) for name, value in took.items()},
    }


def exact(config: Mapping[str, Any], run: Run, module: Longest, real: Ledger) -> dict[str, list[int]]:
    """Predicted and real bytes of what has a closed form without an error; gradients at the optimizer step."""
    fixed = sizes(config, run)
    stepping = next(instant.held for instant in real.instants if instant.name == "optimizer")
    return {
        "weights": [fixed.weights, sum(p.nbytes for p in module.policy.parameters())],
        "gradients": [0 if run.gradient_release else fixed.gradients, stepping.gradients],
        "optimizer_state": [sum(fixed.state.values()), optimizer_state_bytes(module.trainer.optimizers[0])],
    }


def tolerated(row: Mapping[str, Any], what: str) -> float:
    """The largest error of a row's peak that is let pass."""
    return TOLERATED[what] * (2 if what == "predicted" and row["model"] == "tiny" else 1)


def main(argv: list[str]) -> int:
    """Make the record, or some models' part of it anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    before = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    rows = {name: [row for row in before if row["model"] == name] for name in MODELS}
    for model in args.models:
        rows[model] = []
        for mode, recomputed in product(MODES, (False, True)):
            rows[model].append(cell(model, mode, recomputed))
            print(f"{model}, {mode}, recomputed {recomputed}: {rows[model][-1]['error']}", file=sys.stderr)
            _write(args.out, [*chain(*rows.values())])
            gc.collect()
    return 0


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    command = "python -m rlvr_lightning.profiling.errors"
    record = {"command": command, "tolerated": TOLERATED, "environment": environment_record(), "rows": rows}
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
