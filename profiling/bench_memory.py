"""Bytes of a GRPO step with a KL reference, by mode and model: `python -m rlvr_lightning.profiling.bench_memory`.

For each model and mode two processes run the same two steps (2 prompts x 4 completions x 12 tokens, layers
recomputed, one micro-batch): one is measured as it is (on a CPU the kernel's high-water mark of resident memory, less
what the process held after a step of the tiny model; on CUDA the allocator's), the other counts tensors by owner.
Models are `tiny`, `smollm2` (real weights) and Qwen3 shapes with random weights: qwen3-0.6b and, for a GPU, qwen3-4b,
qwen3-8b, qwen3-14b, qwen3-32b:

    python -m rlvr_lightning.profiling.bench_memory --models tiny smollm2 qwen3-0.6b
    python -m rlvr_lightning.profiling.bench_memory --device cuda --models qwen3-4b qwen3-8b qwen3-14b qwen3-32b

A process that runs out of memory is a record too. Writes `results/bench_memory_<device>.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODES = {
    "adamw_fp32_copy": "AdamW, fp32 weights, reference a copy",
    "sgd_fp32_copy": "SGD, fp32 weights, reference a copy",
    "sgd_split_release_delta": "SGD, split master, gradient release, reference a delta",
    "sgd_split_delayed_delta": "the same, clipped by the step before (one backward pass)",
    "sgd_split_kept_delta": "the same, gradients kept until the step",
    "sgd_bf16_release_delta": "SGD, bf16 (stochastic rounding), gradient release, reference a delta",
}
QWEN3 = {  # hidden, intermediate, layers, heads, key-value heads, tied (their config.json on the model hub)
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, False),
    "qwen3-14b": (5120, 17408, 40, 40, 8, False),
    "qwen3-32b": (5120, 25600, 64, 64, 8, False),
}


def model_folder(name: str, folder: Path) -> Path:
    """Where the model is; for a Qwen3 shape, a config and a tokenizer are written, and no weights."""
    from rlvr_lightning.policy import TINY, resolve_model

    if name not in QWEN3:
        return Path(resolve_model(name))
    from transformers import Qwen3Config

    hidden, intermediate, layers, heads, kv_heads, tied = QWEN3[name]
    Qwen3Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        vocab_size=151_936,
        tie_word_embeddings=tied,
        architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def run(folder: Path, mode: str, device: str, count: bool) -> dict[str, Any]:
    """One process; what it printed, or why there is nothing."""
    command = [sys.executable, "-m", "rlvr_lightning.profiling.memory_worker", str(folder), mode, "--device", device]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command + ["--count"] * count, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"failed": last[:300], "exit_status": done.returncode}


def measure(name: str, folder: Path, mode: str, device: str) -> dict[str, Any]:
    """Both processes of a model and a mode, and bytes a parameter above interpreter and activations."""
    whole, counted = (run(folder, mode, device, count) for count in (False, True))
    record = {"model": name, "mode": mode, "measured": whole, "counted": counted}
    if "peak_bytes" in whole and "peak_bytes" in counted:
        activations = counted["owners_bytes"].get("activations", 0)
        parameters = whole["parameters"]
        above = whole["peak_bytes"] - whole["interpreter_bytes"] - activations
        record["measured_bytes_per_parameter"] = round(above / parameters, 3)
        record["counted_bytes_per_parameter"] = round((counted["peak_bytes"] - activations) / parameters, 3)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, print as it goes, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "smollm2", "qwen3-0.6b"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    import torch
    import transformers

    records = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.models:
            folder = model_folder(name, Path(temporary) / name)
            for mode in args.modes:
                records.append(record := measure(name, folder, mode, args.device))
                shown = record.get("measured_bytes_per_parameter") or record["measured"].get("failed")
                counted = record.get("counted_bytes_per_parameter")
                print(f"{name:12} {MODES[mode]:70} measured {shown}, counted {counted} bytes/parameter", flush=True)
    command = ["python -m rlvr_lightning.profiling.bench_memory", "--device", args.device, "--models", *args.models]
    environment = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"bench_memory_{args.device}.json"
    path.write_text(json.dumps({"command": " ".join(command), "environment": environment, "rows": records}, indent=1))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
