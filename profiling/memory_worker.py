"""Real GRPO steps of one model in one precision mode, and what they held; `bench_memory` runs one process for each."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from rlvr_lightning.callbacks.memory_probes import choose_probe
from rlvr_lightning.data.prompts import PromptData, PromptSource
from rlvr_lightning.experience import Batching
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim import SGD, GradientRelease
from rlvr_lightning.policy import TINY, load_model
from rlvr_lightning.profiling.owners import Owners
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.schema import Sample, Sampling

MODES: dict[str, dict[str, Any]] = {
    "adamw_fp32_copy": {"optimizer": partial(torch.optim.AdamW, lr=1e-6, weight_decay=0.0), "reference": "copy"},
    "sgd_fp32_copy": {"optimizer": partial(torch.optim.SGD, lr=1e-2), "reference": "copy"},
    "sgd_split_release_delta": {
        "optimizer": partial(SGD, lr=1e-2),
        "dtype": "bfloat16",
        "gradient_release": GradientRelease(),
    },
    "sgd_split_delayed_delta": {
        "optimizer": partial(SGD, lr=1e-2),
        "dtype": "bfloat16",
        "gradient_release": GradientRelease(clip="delayed"),
    },
    "sgd_split_kept_delta": {"optimizer": partial(SGD, lr=1e-2), "dtype": "bfloat16"},
    "sgd_bf16_release_delta": {
        "optimizer": partial(SGD, lr=1e-2, master="none", rounding="stochastic"),
        "dtype": "bfloat16",
        "gradient_release": GradientRelease(),
    },
}
PROMPTS, GROUP, TOKENS = 2, 4, 12


class LengthParity(Reward):
    """1 for every second completion of a group: every group has a signal, whatever the model says."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """See `Reward`."""
        return [float(k % 2) for k, _ in enumerate(samples)]


class Lines(PromptSource):
    """Prompts that any tokenizer can read."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        return {"prompt": f"{index + 3}+{index * 7 % 11}="}


class Shaped(GRPO):
    """Random weights where a folder has a config alone: only shapes matter for bytes."""

    def load_model(self, empty: bool = False) -> Any:
        """See `GRPO`."""
        if list(Path(self.model_name).glob("*.safetensors")):
            return super().load_model(empty)
        with torch.device(self.trainer.strategy.root_device):
            return load_model(self.model_name, self.weights_dtype, from_scratch=True, empty=empty)


def train(folder: str, settings: dict[str, Any], steps: int, device: str, owners: Owners | None) -> Shaped:
    """Run some steps; returns the module."""
    model = Shaped(
        folder,
        {"parity": LengthParity()},
        group_size=GROUP,
        sampling=Sampling(max_tokens=TOKENS),
        objective=Objective(kl_coef=0.01),
        batching=Batching(micro_batch=PROMPTS * GROUP),
        activation_checkpointing=True,
        **settings,
    )
    trainer = Trainer(
        max_steps=steps,
        accelerator=device,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = PromptData(folder, train=Lines(), prompts_per_step=PROMPTS)
    with owners.watching(model) if owners else nullcontext():
        trainer.fit(model, datamodule=data)
    return model


def main(argv: list[str]) -> int:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--count", action="store_true", help="count every tensor by owner, instead of measuring")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = MODES[args.mode]
    train(str(TINY), settings, 1, args.device, None)  # loads libraries; what stays is the interpreter's
    gc.collect()
    probe = choose_probe(torch.device(args.device))
    assert probe is not None
    probe.reset()
    before = probe.peak_bytes()
    started = time.perf_counter()
    owners = Owners() if args.count else None
    model = train(args.folder, settings, args.steps, args.device, owners)
    record: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.policy.parameters()),
        "seconds": time.perf_counter() - started,
        "step_s": float(model.trainer.callback_metrics["time/step_s"]),
        "train_s": float(model.trainer.callback_metrics["time/train_s"]),
    }
    if owners is not None:
        most = max(owners.peaks.values(), key=lambda held: sum(held.values()))
        record["peak_bytes"] = sum(most.values())
        owned = Counter({"activations": most.pop("logits", 0) + most.pop("compute_copy", 0)})
        owned.update({name.replace("_", " "): size for name, size in most.items()})
        record["owners_bytes"] = dict(owned)
    else:
        record |= {"interpreter_bytes": before, "peak_bytes": probe.peak_bytes(), "method": probe.method}
    if model.reference is not None:
        record["reference_bytes"] = model.reference.nbytes
    if args.device == "cuda":
        record["device"] = torch.cuda.get_device_name()
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
