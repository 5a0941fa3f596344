"""Runs cases of `test_strategy` in as many processes as it is started in; the first writes down what came of them."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import torch
from conftest import tiny_causal_lm  # noqa: F401 (sets one thread)
from precision_modes import MODES
from test_grpo import Constant, Digits, Prompts, fit, module  # noqa: F401

from rlvr_lightning.experience import Batching, Handling
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim.release import GradientRelease
from rlvr_lightning.policy import LoRA
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.schema import Sampling
from rlvr_lightning.strategy import Sharded

WORLD = int(os.environ.get("WORLD_SIZE", 1))
PROMPTS = 8
KL = Objective(kl_coef=0.1)


class SameForSome(Reward):
    """Nothing to learn from the prompts that begin with an even number: whole ranks may be without signal."""

    def __call__(self, samples):
        return [0.0 if int(s.prompt[:1]) % 2 == 0 else d for s, d in zip(samples, Digits()(samples), strict=True)]


def torch_sgd(momentum: float = 0.0):
    return partial(torch.optim.SGD, lr=0.5, momentum=momentum)


WHOLE = Batching(micro_batch=4 * PROMPTS)
CASES: dict[str, dict] = {
    "sgd": {},
    "momentum": {"optimizer": torch_sgd(0.9)},
    "rmsprop": {"optimizer": partial(torch.optim.RMSprop, lr=1e-3)},
    "adamw": {"optimizer": partial(torch.optim.AdamW, lr=1e-3)},
    "lora": {"lora": LoRA(rank=2), "objective": KL},
    "minibatches": {"batching": Batching(minibatches=2, passes=2, micro_batch=4), "objective": KL},
    "signal on some": {"rewards": {"r": SameForSome()}, "batching": Batching(micro_batch=2)},
    "no signal": {"rewards": {"r": Constant()}},
    "resample": {"rewards": {"r": SameForSome()}, "handling": Handling(resample_rounds=2)},
    "layers": {"strategy": {"rollout": "layers"}, "batching": Batching(rollout_batch=3)},
    "checkpointing": {"activation_checkpointing": True, "objective": KL},
    "bf16 compute": {"compute_dtype": "bfloat16"},
    "bf16 reduce": {"strategy": {"reduce_dtype": "bfloat16"}},
    "offload": {"strategy": {"cpu_offload": True}},
    **{f"{name}": {"optimizer": make, "dtype": "bfloat16", "objective": KL} for name, make in MODES.items()},
    **{
        f"{name} released": {
            "optimizer": make,
            "dtype": "bfloat16",
            "objective": KL,
            "batching": WHOLE,
            "gradient_release": GradientRelease(),
        }
        for name, make in MODES.items()
    },
    "delayed": {
        "optimizer": MODES["split"],
        "dtype": "bfloat16",
        "batching": WHOLE,
        "gradient_release": GradientRelease(clip="delayed"),
    },
    "copy": {"optimizer": MODES["split"], "dtype": "bfloat16", "objective": KL, "reference": "copy"},
}


class Watched(GRPO):
    """Remembers what was sampled, and what was logged."""

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
            {k: float(v) for k, v in values.items() if not k.startswith(("time", "tokens/per"))},
        ]
        super().log_dict(values, *args, **kwargs)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = getattr(tensor.detach(), "full_tensor", None)
    return full() if full else tensor.detach().clone()


def run(folder: str, case: dict, steps: int, out: Path) -> dict:
    case = dict(case)
    settings = case.pop("strategy", {})
    strategy = Sharded(timeout_s=60, **settings) if WORLD > 1 else "auto"
    torch.manual_seed(0)
    model = module(folder, **{"sampling": Sampling(max_tokens=9, temperature=0.8), **case})
    model.__class__ = Watched
    fit(model, out, steps, PROMPTS, strategy=strategy, devices=WORLD, logger=True)
    return {
        "weights": {n: whole(p) for n, p in model.policy.named_parameters()},
        "seen": sorted(model.seen),
        "told": model.told,
    }


if __name__ == "__main__":
    folder, out, steps, *names = sys.argv[1:]
    for name in names:
        found = run(folder, CASES[name], int(steps), Path(out) / "runs")
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(found, Path(out) / f"{name} {WORLD}.pt")
            print("done", name, flush=True)
