"""What deltas cost in time and bytes: `python -m rlvr_lightning.profiling.bench_delta`.

Bytes: of files of real SGD steps of SmolLM2-135M (bf16 view of an fp32 master). The gradient is GRPO's on few-shot
problems, clipped to norm 1, after some steps of the recipe; the learning rate is the recipe's, and two others found by
bisection at which about 1 % and 0.01 % of the entries change. Time: comparing, applying and swapping against
`Tensor.copy_` of the same tensors in the same run, in turn. Comparing reads two states, copying reads one and writes
one: equal bytes.
Run it on an idle machine: the load at the start is in the record.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import platform
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rlvr_lightning.delta import SparseDelta, TensorDelta, digest_state
from rlvr_lightning.delta import codec as delta_codec
from rlvr_lightning.delta.file import load_delta, save_delta
from rlvr_lightning.profiling.delta_entropy import bounds

RECIPE_LR = 0.03
State = dict[str, Tensor]


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bandwidth(numel: int, density: float, repeats: int) -> dict[str, Any]:
    """Median seconds of compare, apply, swap and copy_, in turn, on one bf16 tensor; and the bandwidths' ratio."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(numel, generator=generator).bfloat16()
    new, copy = old.clone(), torch.empty_like(old)
    changed = torch.rand(numel, generator=generator) < density
    new.view(torch.int16)[changed] += 1
    delta = TensorDelta.between(old, new)
    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: copy.copy_(old),
        "compare": lambda: TensorDelta.between(old, new),
        "apply": lambda: delta.apply_(copy),
        "swap": lambda: delta.swap_(copy),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            spent = seconds(call)
            if turn:  # the first is for warming up
                times[name].append(spent)
    median = {name: statistics.median(found) for name, found in times.items()}
    return {
        "density": delta.density,
        "entries": numel,
        "median_s": median,
        "all_s": times,
        "copy_bytes_per_s": 4 * numel / median["copy"],
        "compare_bytes_per_s": 4 * numel / median["compare"],
        "compare_to_copy": median["copy"] / median["compare"],
        "apply_to_copy": median["copy"] / median["apply"],
    }


def real_step(warm_steps: int, prompts: int = 8, group: int = 8) -> tuple[State, State]:
    """fp32 master weights of SmolLM2 after some steps of GRPO under SGD, and the next step's clipped gradient."""
    from rlvr_lightning.policy import Policy, load_model, load_tokenizer
    from rlvr_lightning.rollout import HFEngine, stop_token_ids

    tokenizer, model = load_tokenizer("smollm2"), load_model("smollm2", torch.float32)
    engine = HFEngine(model, stop_token_ids(tokenizer, ["\n"]), tokenizer.pad_token_id)
    for step in range(warm_steps + 1):
        model.zero_grad()
        _backward(Policy(model), engine, tokenizer, step, prompts, group)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step < warm_steps:
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.grad is not None:
                        weight.sub_(weight.grad, alpha=RECIPE_LR)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return weights, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def _backward(policy: Any, engine: Any, tokenizer: Any, step: int, prompts: int, group: int) -> None:
    """One gradient of GRPO (ratio 1, no KL) on few-shot problems."""
    from rlvr_lightning.advantage import group_advantages
    from rlvr_lightning.data.fewshot import FewShot
    from rlvr_lightning.rewards.tasks import TaskReward
    from rlvr_lightning.schema import Sample, Sampling

    records = list(FewShot(["add", "chain_sum", "largest", "third"], prompts * (step + 1)))[-prompts:]
    ids = [tokenizer(record["prompt"])["input_ids"] for record in records]
    rollouts = engine.generate(ids, group, Sampling(max_tokens=8), [step * prompts + p for p in range(prompts)])
    samples = [
        Sample(
            prompt=records[row // group]["prompt"],
            text=tokenizer.decode(tokens[mask], skip_special_tokens=True),
            token_ids=tokens[mask].tolist(),
            record=records[row // group],
            truncated=bool(cut),
        )
        for row, (tokens, mask, cut) in enumerate(
            zip(rollouts.completion_ids, rollouts.completion_mask, rollouts.truncated, strict=True)
        )
    ]
    advantages = group_advantages(torch.tensor(TaskReward()(samples)), group)
    logprobs = policy(rollouts).logprobs
    (-(advantages[:, None] * logprobs).sum() / rollouts.completion_mask.sum()).backward()


def stepped(weights: Mapping[str, Tensor], gradient: Mapping[str, Tensor], lr: float) -> State:
    """The bf16 view after a step of SGD on the fp32 master."""
    moved = {name: weight - lr * gradient[name] if name in gradient else weight for name, weight in weights.items()}
    return {name: weight.bfloat16() for name, weight in moved.items()}


def lr_for(density: float, base: State, weights: State, gradient: State) -> float:
    """The learning rate at which a step changes this share of the bf16 view, within 3 %."""
    low, high = 1e-9, 10.0
    for _ in range(30):
        middle = (low * high) ** 0.5
        found = SparseDelta.capture(base, stepped(weights, gradient, middle)).density
        if abs(found / density - 1) < 0.03:
            break
        low, high = (middle, high) if found < density else (low, middle)
    return middle


def file_sizes(base: State, target: State) -> dict[str, Any]:
    """Bytes per changed entry of files with and without the base, times, and the entropy bounds."""
    delta = SparseDelta.capture(base, target, digests=True)
    found: dict[str, Any] = {"density": delta.density, "changed": delta.changed, "entries": delta.numel}
    found["capture_s"] = seconds(lambda: SparseDelta.capture(base, target))
    found["digest_s"] = seconds(lambda: digest_state(base))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.delta"
        found["header_bytes"] = _header_bytes(delta, base, Path(folder) / "x.delta")
        for name, given in (("file", base), ("file_without_base", None)):
            found[f"{name}_save_s"] = seconds(lambda given=given: save_delta(path, delta, given))  # type: ignore[misc]
            found[f"{name}_load_s"] = seconds(lambda given=given: load_delta(path).load(given))  # type: ignore[misc]
            found[f"{name}_bytes"] = path.stat().st_size
            found[f"{name}_bytes_per_changed"] = path.stat().st_size / delta.changed
        found["coders_bytes_per_changed"] = {
            name: _size_with(coder, path, delta, base) / delta.changed for name, coder in CODERS.items()
        }
    found["bound_bytes_per_changed"] = bounds(delta, base)
    return found


def _header_bytes(delta: SparseDelta, base: State, path: Path) -> int:
    """Bytes of a file that do not depend on how many entries changed."""
    save_delta(path, delta, base)
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _raw_deflate(level: int, memory: int, strategy: int) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        packer = zlib.compressobj(level, zlib.DEFLATED, -15, memory, strategy)
        return packer.compress(data) + packer.flush()

    return pack


CODERS: dict[str, Callable[[bytes], bytes]] = {
    "huffman_memlevel5": _raw_deflate(6, 5, zlib.Z_HUFFMAN_ONLY),
    "huffman_memlevel9": _raw_deflate(6, 9, zlib.Z_HUFFMAN_ONLY),
    "deflate6": _raw_deflate(6, 9, zlib.Z_DEFAULT_STRATEGY),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}]),
    "stored": lambda data: data,
}


def _size_with(coder: Callable[[bytes], bytes], path: Path, delta: SparseDelta, base: State) -> int:
    with mock.patch.object(delta_codec, "_deflate", coder):
        save_delta(path, delta, base)
    return path.stat().st_size


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and keep a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="turns of the timing")
    parser.add_argument("--warm_steps", type=int, default=2, help="steps of the recipe before the measured one")
    parser.add_argument("--out", type=Path, default=Path("results/bench_delta.json"))
    options = parser.parse_args(argv)
    record: dict[str, Any] = {
        "command": "python -m rlvr_lightning.profiling.bench_delta",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "zlib": zlib.ZLIB_RUNTIME_VERSION,
        },
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "speed": [bandwidth(1 << 26, density, options.repeats) for density in (0.0, 1e-4, 1e-2, 0.1)],
    }
    for row in record["speed"]:
        print(f"density {row['density']:.4%}: compare / copy {row['compare_to_copy']:.2f}", flush=True)
    weights, gradient = real_step(options.warm_steps)
    base = {name: weight.bfloat16() for name, weight in weights.items()}
    record["steps"] = {}
    for label, density in (("recipe", None), ("1 %", 1e-2), ("0.01 %", 1e-4)):
        lr = RECIPE_LR if density is None else lr_for(density, base, weights, gradient)
        row = {"lr": lr, **file_sizes(base, stepped(weights, gradient, lr))}
        record["steps"][label] = row
        print(f"{label}: density {row['density']:.4%}, {row['file_bytes_per_changed']:.3f} bytes each", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
