"""Runs cases of `test_strategy` in as many processes as it is started in; the first writes down what came of them."""

from __future__ import annotations

import json
import logging
import os
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from conftest import tiny_causal_lm  # noqa: F401 (sets one thread)
from lightning.pytorch import Trainer
from precision_modes import MODES
from test_grpo import Constant, Digits, Prompts, module
from torch.distributed.tensor import DTensor

from rlvr_lightning.callbacks import UpdateSparsity
from rlvr_lightning.data.prompts import PromptData
from rlvr_lightning.delta.tensor import whole
from rlvr_lightning.dpo import DPO
from rlvr_lightning.experience import Batching, Handling
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.kto import KTO
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim.release import GradientRelease
from rlvr_lightning.policy import TINY, LoRA
from rlvr_lightning.ppo import PPO, PPOObjective
from rlvr_lightning.prime import PRIME
from rlvr_lightning.reinforce_pp import ReinforcePP, ReinforcePPObjective
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.schema import Sampling
from rlvr_lightning.sft import SFT
from rlvr_lightning.strategy import AXES, Sharded, flattened

WORLD = int(os.environ.get("WORLD_SIZE", 1))
PROMPTS = 12  # in a step: a whole number for 1, 2, 3 and 4 processes
KL = Objective(kl_coef=0.1)
LR = 0.03  # small enough that differences in rounding change no sampled token in 20 steps
OURS = {name: partial(make, lr=LR) for name, make in MODES.items()}


class SameForSome(Reward):
    """Nothing to learn from the prompts that begin with an even number: whole ranks may be without signal."""

    def __call__(self, samples):
        return [0.0 if int(s.prompt[:1]) % 2 == 0 else d for s, d in zip(samples, Digits()(samples), strict=True)]


class Sign(Digits):
    """A verdict: whether there are digits, modulo 3."""

    def __call__(self, samples):
        return [float(value > 0) for value in super().__call__(samples)]


class Disagreeing(Digits):
    """A verifier that says something else in every second process, as one that runs out of time may."""

    def __call__(self, samples):
        return super().__call__(samples) if int(os.environ.get("RANK", 0)) % 2 == 0 else [0.0] * len(samples)


def torch_sgd(momentum: float = 0.0):
    return partial(torch.optim.SGD, lr=LR, momentum=momentum)


WHOLE = Batching(micro_batch=4 * PROMPTS)
CASES: dict[str, dict] = {
    "sgd": {"optimizer": torch_sgd()},
    "momentum": {"optimizer": torch_sgd(0.9)},
    "rmsprop": {"optimizer": partial(torch.optim.RMSprop, lr=1e-3)},
    "adamw": {"optimizer": partial(torch.optim.AdamW, lr=1e-3)},
    "lora": {"lora": LoRA(rank=2), "objective": KL, "optimizer": partial(torch.optim.SGD, lr=0.02)},
    "minibatches": {"batching": Batching(minibatches=2, passes=2, micro_batch=4), "objective": KL},
    "signal on some": {"rewards": {"r": SameForSome()}, "batching": Batching(micro_batch=2)},
    "no signal": {"rewards": {"r": Constant()}},
    "resample": {"rewards": {"r": SameForSome()}, "handling": Handling(resample_rounds=2)},
    "layers": {"strategy": {"rollout": "layers"}, "batching": Batching(rollout_batch=3)},
    "checkpointing": {"activation_checkpointing": True, "objective": KL},
    "bf16 compute": {"compute_dtype": "bfloat16", "optimizer": partial(torch.optim.SGD, lr=1e-3)},
    "bf16 reduce": {"strategy": {"reduce_dtype": "bfloat16"}, "optimizer": partial(torch.optim.SGD, lr=1e-3)},
    "offload": {"strategy": {"cpu_offload": True}},
    "tied": {"kind": "tied", "objective": KL},
    "tied released": {
        "kind": "tied",
        "optimizer": OURS["split"],
        "objective": KL,
        "batching": WHOLE,
        "gradient_release": GradientRelease(),
        "strategy": {"rollout": "layers"},
    },
    "tensor": {"strategy": {"tensor": 2}, "objective": KL},
    "tensor layers": {"strategy": {"tensor": 2, "rollout": "layers"}, "kind": "tied"},
    "tensor released": {
        "strategy": {"tensor": 2},
        "optimizer": OURS["split"],
        "dtype": "bfloat16",
        "objective": KL,
        "batching": WHOLE,
        "gradient_release": GradientRelease(),
    },
    "tensor disagreeing": {"strategy": {"tensor": 2}, "rewards": {"r": Disagreeing()}},
    "gpt2": {"kind": "gpt2", "objective": KL},
    "replicas": {"strategy": {"replicate": "all"}, "objective": KL},
    "sft": {"texts": SFT},
    "dpo": {"texts": DPO},
    "kto": {"texts": KTO, "settings": {"beta": 0.5, "micro_batch": 5}},
    **{
        f"{name}": {"optimizer": make, "dtype": "bfloat16", "objective": KL, "batching": WHOLE}
        for name, make in OURS.items()
    },
    **{
        f"{name} released": {
            "optimizer": make,
            "dtype": "bfloat16",
            "objective": KL,
            "batching": WHOLE,
            "gradient_release": GradientRelease(),
        }
        for name, make in OURS.items()
    },
    "delayed": {
        "optimizer": OURS["split"],
        "dtype": "bfloat16",
        "batching": WHOLE,
        "gradient_release": GradientRelease(clip="delayed"),
    },
    "replicas released": {
        "strategy": {"replicate": "all"},
        "optimizer": OURS["split"],
        "dtype": "bfloat16",
        "objective": KL,
        "batching": WHOLE,
        "gradient_release": GradientRelease(clip="delayed"),
    },
    "ppo": {
        "algorithm": PPO,
        "objective": PPOObjective(kl_coef=0.1),
        "lam": 0.9,
        "value_lr": 0.5,
        "batching": Batching(passes=2, micro_batch=4),
    },
    "ppo released": {
        "algorithm": PPO,
        "optimizer": OURS["split"],
        "dtype": "bfloat16",
        "group_size": 1,
        "batching": WHOLE,
        "gradient_release": GradientRelease(),
    },
    "prime": {"algorithm": PRIME, "rewards": {"r": Sign()}, "prm_lr": 1.0, "batching": Batching(micro_batch=4)},
    "prime released": {
        "algorithm": PRIME,
        "rewards": {"r": Sign()},
        "optimizer": OURS["split"],
        "dtype": "bfloat16",
        "batching": WHOLE,
        "gradient_release": GradientRelease(),
    },
    "reinforce++": {
        "algorithm": ReinforcePP,
        "objective": ReinforcePPObjective(kl_coef=0.1),
        "batching": Batching(micro_batch=4),
    },
    "copy": {"optimizer": OURS["split"], "dtype": "bfloat16", "objective": KL, "reference": "copy", "batching": WHOLE},
}


class Watched:
    """Part of a GRPO that remembers what was sampled, and what was logged."""

    def judge(self, rollouts, scores, records):
        mine = [
            (
                self.rollout_step,
                record["index"],
                rollouts.select([p]).completion_ids.tolist(),
                scores.total.view(-1, rollouts.group)[p].tolist(),
            )
            for p, record in enumerate(records)
        ]
        self.seen = [*getattr(self, "seen", []), *(x for part in self.ranks.gather(mine) for x in part)]
        return super().judge(rollouts, scores, records)

    def log_dict(self, values, *args, **kwargs):
        self.told = [
            *getattr(self, "told", []),
            {k: float(v) for k, v in values.items() if not k.startswith(("time", "tokens/per", "update/measure"))},
        ]
        super().log_dict(values, *args, **kwargs)


def watched(kind: type[GRPO]) -> type[GRPO]:
    """An algorithm that remembers."""
    return type("Watched", (Watched, kind), {})


class Demos(Prompts):
    """Prompts with demonstrations, pairs and labelled completions of unlike length."""

    def __getitem__(self, index):
        text = "=12" * (1 + index % 3)
        pair = {"chosen": text, "rejected": "+7" * (1 + index % 4)}
        return self.records[index] | pair | {"demonstration": text, "completion": text, "label": index % 3 > 0}


def no_whole_tensor(*_, **__):
    raise AssertionError("a whole tensor was put together from its shards")


def data(**splits) -> PromptData:
    return PromptData(str(TINY), **splits, prompts_per_step=PROMPTS, val_batch=3, seed=5)


def weights_of(model) -> dict[str, torch.Tensor]:
    """Of the policy, and of what is trained beside it."""
    return {name.removeprefix("policy."): p for name, p in model.named_parameters()}


def trained(model, prompts: PromptData, steps: int, out: Path, settings: dict) -> dict:
    """Metrics and whole weights after some steps."""
    strategy = Sharded(timeout_s=60, **settings) if WORLD > 1 else "auto"
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    place = {"accelerator": "cpu", "devices": WORLD, "strategy": strategy, "default_root_dir": out, "logger": False}
    sparsity = UpdateSparsity(every_n_steps=1)
    trainer = Trainer(
        max_steps=steps, callbacks=[sparsity], check_val_every_n_epoch=8, num_sanity_val_steps=0, **place, **quiet
    )
    with mock.patch.object(DTensor, "full_tensor", no_whole_tensor):
        trainer.fit(model, datamodule=prompts)
    if WORLD > 1:  # torch gives groups of some of the processes half an hour
        groups = [
            mesh.get_group() for mesh in (*(strategy.device_mesh[a] for a in AXES), *flattened(strategy.device_mesh))
        ]
        waits_s = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
        assert waits_s == {60.0}, waits_s
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        "weights": {n: whole(p).detach().clone() for n, p in weights_of(model).items()},
        "val": {name: value for name, value in found.items() if name.startswith("val/")},
        "changed": json.loads((out / "sparsity.jsonl").read_text().splitlines()[-1])["last_step"]["changed"],
    }


def run(folder: str, case: dict, steps: int, out: Path) -> dict:
    case = dict(case)
    settings = case.pop("strategy", {})
    folder = str(Path(folder) / case.pop("kind", ""))
    if settings.get("replicate") == "all":
        settings = {"replicate": WORLD}
    torch.manual_seed(0)
    if learner := case.pop("texts", None):
        demos = data(train=Demos(12), val={"a": Demos(4)})
        model = learner(folder, partial(torch.optim.SGD, lr=0.1), **case.pop("settings", {}))
        return trained(model, demos, steps, out, settings)
    kind = watched(case.pop("algorithm", GRPO))
    model = module(
        folder, kind, **{"optimizer": torch_sgd(), "sampling": Sampling(max_tokens=9, temperature=0.8), **case}
    )
    found = trained(model, data(train=Prompts(), val={"a": Prompts(5), "b": Prompts(2)}), steps, out, settings)
    return found | {"seen": sorted(model.seen), "told": model.told}


if __name__ == "__main__":
    folder, out, steps, *names = sys.argv[1:]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in names or CASES:
        found = run(folder, CASES[name], int(steps), Path(out) / f"{name} {WORLD}")
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(found, Path(out) / f"{name} {WORLD}.pt")
