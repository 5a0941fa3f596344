"""What sharding leaves in each process, and what it sends: `python -m rlvr_lightning.profiling.bench_scaling`.

Bytes by owner of the process that holds most, after a GRPO step: measured in 1, 2 and 4 real processes (gloo, on this
machine's CPU), for the tiny model and SmolLM2's shape; simulated for 8, 64 and 512, and for Qwen3-8B's shape, by the
first process of a group that does not exist, on tensors without numbers. Where there are both, both are recorded.

Traffic: bytes that a process receives in one optimizer step of the tiny model, counted collective by collective, beside
the closed form of `profiling/traffic.py`; and the closed form alone for the larger shapes. Writes
`results/bench_scaling.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rlvr_lightning.profiling.traffic import Shapes, Step

WIDTH = {"bfloat16": 2, "float32": 4}
MODES = {  # name: optimizer and dtype of weights; computed in bfloat16, reduced in float32
    "SGD, fp32 weights": ("sgd", "float32"),
    "SGD, split master": ("sgd", "bfloat16"),
    "AdamW, fp32 weights": ("adamw", "float32"),
    "AdamW, bf16 weights": ("adamw", "bfloat16"),
}
MEASURED = {"tiny": [1, 2, 4], "smollm2": [1, 2, 4]}
SIMULATED = {"tiny": [8, 64, 512], "smollm2": [8, 64, 512], "qwen3-8b": [1, 8, 64, 512]}
Record = dict[str, Any]


def memory_cases(model: str) -> list[Record]:
    """A run of each mode."""
    return [
        {
            "model": model,
            "mode": mode,
            "optimizer": optimizer,
            "weights": weights,
            "compute": "bfloat16",
            "reduce": "float32",
            "rollout": "once",
            "replicate": 1,
        }
        for mode, (optimizer, weights) in MODES.items()
    ]


def traffic_cases(processes: int) -> list[Record]:
    """Every dtype of weights and of reduction, both optimizers, both ways to gather; replicas too among four."""
    choices = product(("sgd", "adamw"), WIDTH, WIDTH, ("once", "layers"), (1, 2) if processes == 4 else (1,))
    return [
        {
            "model": "tiny",
            "optimizer": optimizer,
            "weights": weights,
            "compute": weights,
            "reduce": reduce,
            "rollout": rollout,
            "replicate": replicate,
        }
        for optimizer, weights, reduce, rollout, replicate in choices
    ]


def run(cases: list[Record], processes: int) -> list[Record]:
    """Run cases in so many real processes.

    Raises:
        RuntimeError: with the last line that the processes wrote, if they fail.
    """
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [*start, "rlvr_lightning.profiling.scaling_worker", json.dumps(cases)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"model"')]
    if done.returncode or len(found) != len(cases):
        raise RuntimeError(f"bench_scaling: {processes} processes failed: {done.stderr[-2000:]}")
    return found


def closed_form(case: Record, units: Sequence[Shapes]) -> dict[str, int]:
    """Bytes received in the step that `scaling_worker.real` counts."""
    from rlvr_lightning.profiling.scaling_worker import GROUP, MICRO_BATCH, PROMPTS

    prompts = PROMPTS // case["processes"]
    return Step(
        units=units,
        shards=case["processes"] // case["replicate"],
        replicas=case["replicate"],
        gathered_bytes=WIDTH[case["compute"]],
        reduced_bytes=WIDTH[case["reduce"]],
        micro_batches=prompts * GROUP // MICRO_BATCH,
        reference_passes=prompts,
        rollout_passes=case["rollout_passes"] if case["rollout"] == "layers" else None,
    ).received_bytes()


def measure_memory() -> Iterator[Record]:
    """Rows of bytes by owner."""
    from rlvr_lightning.profiling.scaling_worker import simulate

    for model, counts in MEASURED.items():
        for processes in counts:
            for row in run(memory_cases(model), processes):
                yield row | {"simulated_bytes": simulate(row, processes)["bytes"]}
    for model, counts in SIMULATED.items():
        for case, processes in product(memory_cases(model), counts):
            yield simulate(case, processes)


def measure_traffic() -> Iterator[Record]:
    """Rows of bytes received, counted and by the closed form."""
    from rlvr_lightning.profiling.scaling_worker import unit_shapes

    units = unit_shapes("tiny")
    for processes in (2, 4):
        for row in run(traffic_cases(processes), processes):
            del row["bytes"]
            yield row | {"closed_form_bytes": closed_form(row, units)}


def predict_traffic() -> Iterator[Record]:
    """One micro-batch a process, gathered once for the rollout, no reference."""
    from rlvr_lightning.profiling.scaling_worker import unit_shapes

    for model in ("smollm2", "qwen3-8b"):
        units = unit_shapes(model)
        for processes, compute, reduce in product((8, 64, 512), WIDTH, WIDTH):
            step = Step(
                units=units, shards=processes, gathered_bytes=WIDTH[compute], reduced_bytes=WIDTH[reduce]
            ).received_bytes()
            case = {"model": model, "processes": processes, "compute": compute, "reduce": reduce}
            yield case | {"closed_form_bytes": step}


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, print as it goes, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    import torch
    import transformers

    record: Record = {
        "command": "python -m rlvr_lightning.profiling.bench_scaling",
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.platform(),
        },
    }
    parts = {"traffic": measure_traffic, "predicted_traffic": predict_traffic, "memory": measure_memory}
    for name, rows in parts.items():
        record[name] = []
        for row in rows():
            record[name].append(row)
            print(json.dumps(row), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "bench_scaling.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
