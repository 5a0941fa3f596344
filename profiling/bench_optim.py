"""Seconds of one optimizer step over SmolLM2's tensors: `python -m rlvr_lightning.profiling.bench_optim`.

Ours in each mode, with and without emitting what changed, beside torch's SGD and AdamW (foreach), taking turns in one
process. Gradients are random, such that about one bf16 entry in a hundred changes. Writes `results/bench_optim.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.optim import Optimizer

from rlvr_lightning.optim import SGD

HIDDEN, FFN, LAYERS, WORDS = 576, 1536, 30, 49_152
SHAPES = [(WORDS, HIDDEN)] + LAYERS * [
    (HIDDEN, HIDDEN), (192, HIDDEN), (192, HIDDEN), (HIDDEN, HIDDEN), (FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN),
    (HIDDEN,), (HIDDEN,),
]  # fmt: skip
Case = tuple[torch.dtype, Callable[..., Optimizer], bool]
CASES: dict[str, Case] = {
    "torch SGD, fp32": (torch.float32, partial(torch.optim.SGD, lr=1e-4, foreach=True), False),
    "torch SGD, bf16": (torch.bfloat16, partial(torch.optim.SGD, lr=1e-4, foreach=True), False),
    "torch AdamW, fp32": (torch.float32, partial(torch.optim.AdamW, lr=1e-6, foreach=True), False),
    "fp32": (torch.float32, partial(SGD, lr=1e-4), False),
    "split": (torch.bfloat16, partial(SGD, lr=1e-4), False),
    "split, emitting": (torch.bfloat16, partial(SGD, lr=1e-4), True),
    "master fp32": (torch.bfloat16, partial(SGD, lr=1e-4, master="fp32"), False),
    "bf16 nearest": (torch.bfloat16, partial(SGD, lr=1e-4, master="none"), False),
    "bf16 stochastic": (torch.bfloat16, partial(SGD, lr=1e-4, master="none", rounding="stochastic"), False),
}


def measure(case: Case, repeats: int, device: str) -> list[float]:
    """Seconds of each of some steps, the first left out."""
    dtype, make, emit = case
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter((torch.randn(s, device=device) * 0.05).to(dtype)) for s in SHAPES]
    for p in parameters:
        p.grad = torch.randn_like(p) * 0.01
    optimizer = make(parameters)
    if emit and isinstance(optimizer, SGD):
        optimizer.listen(lambda parameter, undo: None)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def main(argv: Sequence[str] | None = None) -> int:
    """Run all in turns, print and keep the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="in a round, after one to warm up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(args.rounds):
        for name, case in CASES.items():
            seconds[name] += measure(case, args.steps, args.device)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    entries = sum(torch.Size(s).numel() for s in SHAPES)
    for name, value in median.items():
        ratio = value / median["torch SGD, fp32"]
        print(
            f"{name:20} {value:8.3f} s  {entries / value / 1e6:8.0f} M entries/s  {ratio:5.2f} of torch's SGD in fp32"
        )
    record = {
        "command": f"python -m rlvr_lightning.profiling.bench_optim --threads {args.threads} --device {args.device}",
        "entries": entries,
        "median_s": median,
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    suffix = "" if args.device == "cpu" else f"_{args.device}"
    (args.out / f"bench_optim{suffix}.json").write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
