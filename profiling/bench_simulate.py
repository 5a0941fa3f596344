"""What a simulated step costs, and says: `python -m rlvr_lightning.profiling.bench_simulate`.

Steps of 16 completions of 1,024 tokens on prompts of 1,024, 8 at a time, rollouts of 64, layers recomputed, gathered
one by one where they are sharded; each in a process of its own, on one thread. Writes `results/simulate.json`: seconds
of the clock and of the processor (libraries loaded), the most that was resident, and the peaks simulated and predicted.
What a simulation says is held against real steps by `profiling/errors.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlvr_lightning.profiling.find_model import find_model
from rlvr_lightning.profiling.predict import predict
from rlvr_lightning.profiling.settings import Run
from rlvr_lightning.study.running import environment_record

SIZES: dict[str, Any] = {
    "micro_batch": 8,
    "step_completions": 16,
    "rollout_batch": 64,
    "prompt_tokens": 1024,
    "max_tokens": 1024,
    "activation_checkpointing": True,
    "rollout": "layers",
}
SPLIT: dict[str, Any] = {"optimizer": "sgd_split", "dtype": "bfloat16"}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3-8b", SPLIT),
    ("qwen3-8b", SPLIT | {"gradient_release": True, "step_completions": 8}),
    ("qwen3-8b", {"optimizer": "adamw", "shard": 8}),
    ("llama-3.1-70b", SPLIT | {"shard": 64}),
    ("llama-3.1-70b", {"optimizer": "adamw", "shard": 64}),
]


def one(name: str, run: Run) -> dict[str, Any]:
    """Simulate in this process."""
    import torch

    torch.set_num_threads(1)
    started, config = time.perf_counter(), find_model(name)[0]
    from rlvr_lightning.profiling.simulate import simulate

    ledgers = {"simulated": simulate(config, run), "predicted": predict(config, run)}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "model": name,
        "run": asdict(run),
        "clock_s": round(time.perf_counter() - started, 1),
        "processor_s": round(usage.ru_utime + usage.ru_stime, 1),
        "resident_bytes": usage.ru_maxrss << 10,
        "ledgers": {kind: [asdict(instant) for instant in ledger.instants] for kind, ledger in ledgers.items()},
        "peak_bytes": {kind: ledger.peak_bytes for kind, ledger in ledgers.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run each case in a process and write the record; or, given a case, run it here and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help="print this one's row")
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    if args.case is not None:
        name, settings = CASES[args.case]
        print(json.dumps(one(name, Run(**{**SIZES, **settings}))))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"command": "python -m rlvr_lightning.profiling.bench_simulate", "environment": environment_record()}
    rows: list[dict[str, Any]] = []
    for number, (name, settings) in enumerate(CASES):
        command = [sys.executable, "-m", "rlvr_lightning.profiling.bench_simulate", "--case", str(number)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ.copy())
        rows.append(row := json.loads(done.stdout.splitlines()[-1]))
        print(f"{name} {settings}: {row['clock_s']} s, {row['resident_bytes'] / 2**30:.2f} GiB", flush=True)
        (args.out / "simulate.json").write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    print(f"wrote {args.out / 'simulate.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
