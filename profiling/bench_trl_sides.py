"""The two sides of `bench_trl`: TRL's trainer and ours on the same plan, each run in a process of its own."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

LR = 1e-4
Plan = Mapping[str, Any]


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


def run_trl(plan: Plan, clock: Clock) -> tuple[int, Callable[[], Any]]:
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


def trl_settings(plan: Plan) -> dict[str, Any]:
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


def run_ours(plan: Plan, clock: Clock) -> tuple[int, Callable[[], Any]]:
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
