"""A GRPO step of ours against TRL's GRPOTrainer: `python -m rlvr_lightning.profiling.bench_trl --model smollm2`.

Needs the extra [bench]. Both sides get the same weights in float32, the same prompts, as many completions, and the same
optimizer (SGD, rate 1e-4, norm clipped to 1), no KL term, one pass. Prompts have about 100 tokens, as few-shot prompts
do; ours computes each once for its group, TRL once for every completion. The lengths are forced: no completion may end
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
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DEFAULTS = {
    "smollm2": {"prompts": 4, "group": 8, "tokens": 48, "micro_batch": 32},
    "tiny4x256": {"prompts": 8, "group": 8, "tokens": 32, "micro_batch": 64},
}
TARGETS = {"step_s": 0.4, "peak_bytes": 0.6}
LR = 1e-4
PACKAGES = ("torch", "transformers", "trl", "lightning", "accelerate")


# ---- what is measured, written once and read by both sides ----


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Put model and prompts into a folder; the plan that every process follows."""
    steps = args.steps + 1  # one to warm up
    if args.model == "smollm2":
        from rlvr_lightning.data.fewshot import FewShot
        from rlvr_lightning.policy import resolve_model

        model = resolve_model("smollm2")
        source = FewShot(kinds=["add", "largest"], num=args.prompts * steps, shots=8)  # about 100 tokens
        texts = [record["prompt"] for record in source]
    else:
        model = str(folder / "model")
        texts = small_model(model, args.prompts * steps)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    sizes = {name: getattr(args, name) for name in ("prompts", "group", "tokens", "micro_batch", "threads", "seed")}
    return {"model": model, "prompts_file": str(prompts), "steps": steps, **sizes}


def small_model(folder: str, num: int) -> list[str]:
    """Save a random Qwen3 of 4 layers, 256 wide, with the packaged tokenizer; `num` prompts of 99 tokens."""
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
    lines = [record["prompt"] for record in Arithmetic(levels=[4], num=9 * num)]
    return ["".join(lines[9 * i : 9 * i + 9]) for i in range(num)]


def random_rewards(count: int, generator: random.Random) -> list[float | None]:
    """Numbers that differ, so that every group has variance; none is None, which only TRL's type allows."""
    return [generator.random() for _ in range(count)]


class Clock:
    """Seconds of each step, in all and by part."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._parts: dict[str, float] = {}
        self._part, self._since, self._began = "", 0.0, 0.0

    def begin(self) -> None:
        """A step begins."""
        self._parts, self._part = {}, ""
        self._began = time.perf_counter()

    def switch(self, part: str) -> None:
        """From here on the time belongs to this part; to none if the name is empty."""
        now = time.perf_counter()
        if self._part:
            self._parts[self._part] = self._parts.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    def end(self) -> None:
        """The step is over."""
        self.switch("")
        parts = {f"{part}_s": seconds for part, seconds in self._parts.items()}
        self.steps.append({"step_s": time.perf_counter() - self._began} | parts)


# ---- the two sides, each in its own process ----


def run_trl(plan: Mapping[str, Any], clock: Clock) -> tuple[int, Any]:
    """Build TRL's trainer. Returns the resident bytes after the imports, and a call that trains."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    imported = resident_bytes()
    torch.set_num_threads(plan["threads"])

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            clock.switch("optimizer")

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            clock.switch("other")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    class TimedTrainer(GRPOTrainer):
        def _generate(self, prompts: list[Any]) -> Any:
            clock.switch("generate")
            out = super()._generate(prompts)
            clock.switch("train")
            assert all(len(ids) == plan["tokens"] for ids in out[1]), "completions of the wrong length were measured"
            return out

    generator = random.Random(plan["seed"])
    model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=torch.float32, attn_implementation="sdpa")
    trainer = TimedTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(plan["model"]),
        reward_funcs=lambda completions, **_: random_rewards(len(completions), generator),
        args=GRPOConfig(**trl_settings(plan)),
        train_dataset=load_dataset("json", data_files=plan["prompts_file"], split="train"),
        callbacks=[Timed()],
    )
    return imported, trainer.train


def trl_settings(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of GRPOConfig."""
    accumulate = plan["prompts"] * plan["group"] // plan["micro_batch"]
    return {
        "output_dir": str(Path(plan["prompts_file"]).with_name("trl")),
        "per_device_train_batch_size": plan["micro_batch"],
        "gradient_accumulation_steps": accumulate,
        "steps_per_generation": accumulate,
        "num_generations": plan["group"],
        "max_completion_length": plan["tokens"],
        "generation_kwargs": {"min_new_tokens": plan["tokens"]},
        "max_steps": plan["steps"],
        "learning_rate": LR,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "beta": 0.0,
        "num_iterations": 1,
        "temperature": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "use_vllm": False,
        "shuffle_dataset": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": plan["seed"],
    }


def run_ours(plan: Mapping[str, Any], clock: Clock) -> tuple[int, Any]:
    """Build our trainer. Returns the resident bytes after the imports, and a call that trains."""
    import lightning.pytorch as pl
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 (counted as imports on both sides)

    from rlvr_lightning.data.prompts import JsonlPrompts, PromptData
    from rlvr_lightning.experience import Batching
    from rlvr_lightning.grpo import GRPO
    from rlvr_lightning.rewards.base import Reward
    from rlvr_lightning.rollout import HFEngine
    from rlvr_lightning.schema import Sample, Sampling

    imported = resident_bytes()
    torch.set_num_threads(plan["threads"])
    parts = {"rollout": "generate", "optimizer": "optimizer", "": "other"}
    generator = random.Random(plan["seed"])

    class Timed(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock.begin()

        def on_train_batch_end(self, *_: Any) -> None:
            clock.end()

    class RandomReward(Reward):
        def __call__(self, samples: Sequence[Sample]) -> list[Any]:
            assert all(len(s.token_ids) == plan["tokens"] for s in samples), "wrong lengths were measured"
            return random_rewards(len(samples), generator)

    class Endless(GRPO):
        def configure_model(self) -> None:
            super().configure_model()
            pad = self.tokenizer.pad_token_id
            self.engine = HFEngine(self.policy.model, [], pad, max_batch=self.batching.rollout_batch)

    module = Endless(
        model=plan["model"],
        rewards={"random": RandomReward()},
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=LR),
        group_size=plan["group"],
        sampling=Sampling(max_tokens=plan["tokens"]),
        batching=Batching(micro_batch=plan["micro_batch"]),
        max_grad_norm=1.0,
        seed=plan["seed"],
    )
    module.phase_listeners.append(lambda phase: clock.switch(parts.get(phase, "train")))
    data = PromptData(plan["model"], train=JsonlPrompts(plan["prompts_file"]), prompts_per_step=plan["prompts"])
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=plan["steps"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[Timed()],
        default_root_dir=str(Path(plan["prompts_file"]).parent),
    )
    return imported, lambda: trainer.fit(module, datamodule=data)


SIDES = {"trl": run_trl, "ours": run_ours}


def child(side: str, plan_file: str) -> None:
    """Run one side and print its measurements as the last line."""
    plan = json.loads(Path(plan_file).read_text())
    clock = Clock()
    imported, train = SIDES[side](plan, clock)
    train()
    peak = status_bytes("VmHWM")
    measured = {"steps": clock.steps[1:], "peak_bytes": peak, "above_import_bytes": peak - imported}
    print(json.dumps(measured))


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int:
    """A memory figure of this process from the Linux kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


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
