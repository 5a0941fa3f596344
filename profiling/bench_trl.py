"""A GRPO step of ours against TRL's GRPOTrainer: `python -m rlvr_lightning.profiling.bench_trl --model smollm2`.

Needs the extra [bench]. Both sides get the same weights in float32, the same prompts, as many completions, and the same
optimizer (SGD, rate 1e-4, norm clipped to 1), no KL term, one pass. Prompts are few-shot (`--shots 8`: about 100
tokens). Ours computes a prompt once for its group, TRL once for every completion, so the ratio depends on the length of
the prompts: give short ones too (`--shots 2`) before believing a figure. The lengths are forced: no completion may end
before `--tokens`, so both sides generate and train on exactly as many tokens. Rewards are random numbers, so no group
is without signal and no side may skip one. TRL runs with its ordinary best settings (sdpa, bf16 off, no checkpointing,
no vLLM). The sides take turns, each time in a process of its own, whose peak resident memory is read from the kernel.
The first step of a process warms up and is not counted. A record is written to `--out`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlvr_lightning.profiling.bench_trl_sides import SIDES, child

DEFAULTS = {
    "smollm2": {"prompts": 4, "group": 8, "tokens": 48, "micro_batch": 32},
    "tiny4x256": {"prompts": 8, "group": 8, "tokens": 32, "micro_batch": 64},
}
SIZES = ("prompts", "group", "tokens", "micro_batch", "shots", "threads", "seed")
TARGETS = {"step_s": 0.4, "peak_bytes": 0.6}
PACKAGES = ("torch", "transformers", "trl", "lightning", "accelerate")


# ---- what is measured, written once and read by both sides ----


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Put model and prompts into a folder; the plan that every process follows."""
    from rlvr_lightning.policy import load_tokenizer, resolve_model

    steps = args.steps + 1  # one to warm up
    if args.model == "smollm2":
        from rlvr_lightning.data.fewshot import FewShot

        model = resolve_model("smollm2")
        source = FewShot(kinds=["add", "largest"], num=args.prompts * steps, shots=args.shots)
        texts = [record["prompt"] for record in source]
    else:
        model = str(folder / "model")
        texts = small_model(model, args.prompts * steps, args.shots)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    sizes = {name: getattr(args, name) for name in SIZES}
    sizes["prompt_tokens"] = statistics.mean(map(len, load_tokenizer(model)(texts)["input_ids"]))
    return {"model": model, "prompts_file": str(prompts), "steps": steps, **sizes}


def small_model(folder: str, num: int, shots: int) -> list[str]:
    """Save a random Qwen3 of 4 layers, 256 wide, and the packaged tokenizer. Returns `num` prompts."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rlvr_lightning.data.arithmetic import Arithmetic
    from rlvr_lightning.policy import load_tokenizer

    tokenizer = load_tokenizer("tiny")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = [record["prompt"] for record in Arithmetic(levels=[4], num=num * (shots + 1))]
    return ["".join(lines[i::num]) for i in range(num)]


# ---- taking turns, and the record ----


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run both sides in turn `--rounds` times; the record of it."""
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        plan = prepare(args, Path(folder))
        plan_file = Path(folder) / "plan.json"
        plan_file.write_text(json.dumps(plan))
        for number in range(args.rounds):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                rounds[side].append(in_process(side, plan_file, args.threads))
                times = [round(step["step_s"], 2) for step in rounds[side][-1]["steps"]]
                print(f"round {number + 1} {side}: steps {times} s", file=sys.stderr, flush=True)
    summary = {side: summarize(done) for side, done in rounds.items()}
    keys = ("step_s", "peak_bytes", "above_import_bytes")
    return {
        "command": " ".join(["python -m rlvr_lightning.profiling.bench_trl", *sys.argv[1:]]),
        "plan": {key: value for key, value in plan.items() if key not in ("model", "prompts_file")},
        "model": args.model,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "median": summary,
        "ratio": {key: summary["ours"][key] / summary["trl"][key] for key in keys},
        "targets": TARGETS,
        "rounds": rounds,
    }


def in_process(side: str, plan_file: Path, threads: int) -> dict[str, Any]:
    """Measurements of one side in a fresh process."""
    command = [sys.executable, "-m", "rlvr_lightning.profiling.bench_trl", "--side", side, "--plan", str(plan_file)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        raise RuntimeError(f"the {side} side was killed, most likely for memory: try a smaller --micro-batch")
    if done.returncode != 0:
        raise RuntimeError(f"the {side} side failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summarize(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians: of times over all counted steps, of memory over processes."""
    steps = [step for done in rounds for step in done["steps"]]
    parts = {part: statistics.median(step.get(part, 0.0) for step in steps) for part in steps[0]}
    memory = {key: statistics.median(done[key] for done in rounds) for key in ("peak_bytes", "above_import_bytes")}
    return parts | memory


def cpu_name() -> str:
    """The processor, as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the model's usual sizes filled in."""
    parser = argparse.ArgumentParser(prog="python -m rlvr_lightning.profiling.bench_trl", description=__doc__)
    parser.add_argument("--model", choices=sorted(DEFAULTS), default="tiny4x256")
    for name in ("prompts", "group", "tokens", "micro_batch"):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, help="a size of the step; the model's usual one if absent"
        )
    parser.add_argument("--shots", type=int, default=8, help="solved problems in a prompt, some 11 tokens each")
    parser.add_argument("--steps", type=int, default=2, help="counted steps of each process")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON record; results/bench_trl_MODEL.json if absent")
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.model].items():
        setattr(args, name, getattr(args, name) or value)
    if args.prompts * args.group % args.micro_batch or args.micro_batch % args.group:
        parser.error("--micro-batch must be whole groups and divide prompts x group")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse(argv)
    if args.side:
        child(args.side, args.plan)
        return
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("bench_trl needs the package trl: pip install 'rlvr-lightning[bench]'")
    record = measure(args)
    out = args.out or Path("results") / f"bench_trl_{args.model}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("median", "ratio", "targets")}, indent=1))


if __name__ == "__main__":
    main()
