"""Real GRPO steps of one model in one precision mode, and what they held; `bench_memory` runs one process for each."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from rlvr_lightning.callbacks.memory_probes import choose_probe
from rlvr_lightning.data.prompts import PromptData, PromptSource
from rlvr_lightning.experience import Batching
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim import SGD, GradientRelease
from rlvr_lightning.policy import TINY, load_model
from rlvr_lightning.profiling.allocations import AllocationCounter
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


class Watched(GRPO):
    """Tells a counter who owns what."""

    counter: AllocationCounter | None = None

    def load_model(self, empty: bool = False) -> Any:
        """From a folder with a config alone, random weights: only shapes matter for bytes."""
        if list(Path(self.model_name).glob("*.safetensors")):
            return super().load_model(empty)
        with torch.device(self.trainer.strategy.root_device):
            return load_model(self.model_name, self.weights_dtype, from_scratch=True, empty=empty)

    def configure_model(self) -> None:
        """Register the owners that exist before the first step."""
        super().configure_model()
        self.own()

    def configure_optimizers(self) -> Any:
        """Tell the optimizer's own work apart where it happens during the backward pass."""
        configured = super().configure_optimizers()
        optimizer = configured[0][0]
        if self.counter is not None and isinstance(optimizer, SGD):
            counter, update = self.counter, optimizer.update_parameter

            def labelled(parameter: Tensor) -> None:
                with counter.label("update"):
                    update(parameter)

            optimizer.update_parameter = labelled  # type: ignore[method-assign]
        return configured

    def own(self) -> None:
        """Give the counter what lives from step to step."""
        if self.counter is None or self.policy is None:
            return
        self.counter.own("weights", self.policy.parameters())
        if self.reference is not None:
            for kept in self.reference._kept.values():
                self.counter.own("reference", [kept] if isinstance(kept, Tensor) else [kept.indices, kept.values])
        for optimizer in self.trainer.optimizers if self._trainer else []:
            for state in optimizer.state.values():
                self.counter.own("optimizer state", [v for v in state.values() if isinstance(v, Tensor)])
        self.counter.own("gradients", [p.grad for p in self.policy.parameters() if p.grad is not None])

    def _phase(self, name: str) -> None:
        super()._phase(name)
        if self.counter is not None:
            self.own()
            self.counter.relabel({"forward": "activations", "backward": "activations"}.get(name, name or "other"))


def classify(sizes: set[int]) -> Any:
    """Storages of exactly a parameter's size made by the backward pass are gradients, also before autograd says so."""
    return lambda label, size: "gradients" if label == "activations" and size in sizes else label


def train(folder: str, settings: dict[str, Any], steps: int, device: str, counter: AllocationCounter | None) -> Watched:
    """Run some steps; returns the module."""
    model = Watched(
        folder,
        {"parity": LengthParity()},
        group_size=GROUP,
        sampling=Sampling(max_tokens=TOKENS),
        objective=Objective(kl_coef=0.01),
        batching=Batching(micro_batch=PROMPTS * GROUP),
        activation_checkpointing=True,
        **settings,
    )
    model.counter = counter
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
    with ExitStack() as stack:
        if counter is not None:
            stack.enter_context(counter)
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
    counter = None
    if args.count:
        sizes = _parameter_sizes(args.folder, settings)
        counter = AllocationCounter(classify=classify(sizes))
    model = train(args.folder, settings, args.steps, args.device, counter)
    record: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.policy.parameters()),
        "seconds": time.perf_counter() - started,
        "step_s": float(model.trainer.callback_metrics["time/step_s"]),
        "train_s": float(model.trainer.callback_metrics["time/train_s"]),
    }
    if counter is not None:
        record |= {"peak_bytes": counter.peak_bytes, "owners_bytes": counter.peak_by_owner}
    else:
        record |= {"interpreter_bytes": before, "peak_bytes": probe.peak_bytes(), "method": probe.method}
    if model.reference is not None:
        record["reference_bytes"] = model.reference.nbytes
    if args.device == "cuda":
        record["device"] = torch.cuda.get_device_name()
    print(json.dumps(record))
    return 0


def _parameter_sizes(folder: str, settings: dict[str, Any]) -> set[int]:
    from transformers import AutoConfig, AutoModelForCausalLM

    width = 2 if settings.get("dtype") == "bfloat16" else 4
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(Path(folder))
        shapes = [p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()]
    return {count * width for count in shapes if count > 1 << 12}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
