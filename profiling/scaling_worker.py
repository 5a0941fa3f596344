"""One process's share of a sharded model, and what it receives in a step; `bench_scaling` starts and tabulates it.

`real` runs GRPO in as many processes as torchrun started, over gloo. `simulate` runs the first of any number of them
that do not exist, on shapes (`profiling/simulate.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from rlvr_lightning.callbacks.tensors import local_part
from rlvr_lightning.data.prompts import PromptData
from rlvr_lightning.experience import Batching
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim import SGD
from rlvr_lightning.policy import TINY, Policy
from rlvr_lightning.profiling.memory_worker import Lines
from rlvr_lightning.profiling.settings import Run
from rlvr_lightning.profiling.sharding_counter import GATHERED, REDUCING, ShardingCounter
from rlvr_lightning.profiling.simulate import step
from rlvr_lightning.profiling.traffic import Shapes
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.schema import Sample, Sampling
from rlvr_lightning.strategy import Sharded, decoder_layers

SHAPES: dict[str, dict[str, Any]] = {  # from the config.json of each model
    "tiny": json.loads((TINY / "config.json").read_text()),
    "smollm2": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": False,
    },
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=1e-3),
    "adamw": partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0),
}
PROMPTS, GROUP, MICRO_BATCH, TOKENS = 4, 4, 2, 5
"""Prompts of all processes; completions of each; completions in a pass; tokens of a completion."""


class LengthAndPlace(Reward):
    """Differs within each half of a group, whatever the model says."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """See `Reward`."""
        return [float(k % 2) for k, _ in enumerate(samples)]


class Counted(GRPO):
    """Tells a counter the phases and owners of the second step."""

    counter: ShardingCounter
    traffic: Counter[tuple[str, str]]
    passes = 0
    """Forward passes of the rollout."""
    gradient_bytes = 0
    """Held by this process when the optimizer stepped last; they are dropped right after."""

    def load_model(self, empty: bool = False) -> Any:
        """Random weights: only shapes matter."""
        from rlvr_lightning.policy import load_model

        return load_model(self.model_name, self.weights_dtype, from_scratch=True, empty=empty)

    def configure_model(self) -> None:
        """Count the rollout's forward passes."""
        super().configure_model()
        logits = self.policy.logits

        def counted(**inputs: Any) -> Tensor:
            self.passes += 1
            return logits(**inputs)

        self.policy.logits = counted  # type: ignore[method-assign]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Count the traffic of one step only."""
        self.counter.traffic.clear()
        self.passes = 0
        super().training_step(batch, batch_idx)
        self.traffic = self.counter.traffic.copy()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Measure the gradients while there are any."""
        super().on_before_optimizer_step(optimizer)
        self.gradient_bytes = gradient_bytes(self.policy)

    def _phase(self, name: str) -> None:
        super()._phase(name)
        self.counter.phase = name


def gradient_bytes(policy: nn.Module) -> int:
    """Of all gradients that this process holds now."""
    return storage_bytes(local_part(p.grad) for p in policy.parameters() if p.grad is not None)


def shares(
    policy: nn.Module, optimizer: Any, reference: Iterable[Tensor], gradients: int, counter: ShardingCounter
) -> dict[str, int]:
    """Bytes that this process holds in a step, by owner; padding of uneven shards included."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return {
        "weights": storage_bytes(map(local_part, policy.parameters())),
        "gradients": gradients,
        "optimizer state": storage_bytes(map(local_part, tensors)),
        "reference": storage_bytes(reference),
        "gathered, training": max(counter.most[label, GATHERED] for label in ("forward", "backward", "reference")),
        "gathered, rollout": counter.most["rollout", GATHERED],
        "gradients before reduction": counter.most["backward", REDUCING],
    }


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages behind some tensors, each once."""
    found = {part.untyped_storage()._cdata: part.untyped_storage().nbytes() for part in tensors}
    return sum(found.values())


def write_folder(model: str, folder: Path) -> None:
    """A config, and a tokenizer of which only the existence matters."""
    (folder / "config.json").write_text(json.dumps(SHAPES[model]))
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, folder)


def real(case: dict[str, Any]) -> dict[str, Any]:
    """Two GRPO steps with a reference, of which the second's traffic is counted; the figures of this process.

    Args:
        case: `model`, `weights`, `compute`, `reduce` (dtypes), `optimizer`, `rollout`, `replicate`.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    strategy: Any = "auto"
    if world > 1:
        strategy = Sharded(
            replicate=case["replicate"], reduce_dtype=case["reduce"], rollout=case["rollout"], timeout_s=120
        )
    with tempfile.TemporaryDirectory() as folder:
        write_folder(case["model"], Path(folder))
        model = Counted(
            folder,
            {"place": LengthAndPlace()},
            OPTIMIZERS[case["optimizer"]],
            group_size=GROUP,
            sampling=Sampling(max_tokens=TOKENS),
            objective=Objective(kl_coef=0.01),
            batching=Batching(micro_batch=MICRO_BATCH),
            dtype=case["weights"],
            compute_dtype=case["compute"],
            reference="copy",
        )
        model.counter = ShardingCounter()
        trainer = Trainer(
            max_steps=2,
            accelerator="cpu",
            devices=world,
            strategy=strategy,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        with model.counter:
            trainer.fit(model, datamodule=PromptData(folder, train=Lines(), prompts_per_step=PROMPTS))
    assert model.reference is not None
    optimizer = trainer.optimizers[0]
    reference = [kept for kept in model.reference._kept.values() if isinstance(kept, Tensor)]
    return case | {
        "processes": world,
        "how": "measured",
        "bytes": shares(model.policy, optimizer, reference, model.gradient_bytes, model.counter),
        "traffic_bytes": by_purpose(model.traffic),
        "rollout_passes": model.passes,
    }


def by_purpose(traffic: Counter[tuple[str, str]]) -> dict[str, int]:
    """Bytes received for each purpose; `control` is all that FSDP does not send: counts, norms, metrics."""
    found: Counter[str] = Counter()
    for (label, collective), size in traffic.items():
        if collective == "_allgather_base_":
            found[f"weights, {label}"] += size
        elif collective == "_reduce_scatter_base_":
            found["gradients"] += size
        elif collective == "allreduce_" and label == "backward":
            found["gradients between replicas"] += size
        else:
            found["control"] += size
    return dict(found)


def bare(model: str, dtype: torch.dtype) -> Policy:
    """A policy of a shape, on whatever device is current."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {name: value for name, value in SHAPES[model].items() if name != "model_type"}
    config = AutoConfig.for_model(SHAPES[model]["model_type"], **settings)
    return Policy(AutoModelForCausalLM.from_config(config, dtype=dtype))


def unit_shapes(model: str) -> list[Shapes]:
    """The shapes of the weights in each unit that is gathered at a time, the one around all others last."""
    with torch.device("meta"):
        policy = bare(model, torch.float32)
    layers = [list(layer.parameters()) for layer in decoder_layers(policy.causal_lm)]
    inside = {id(p) for layer in layers for p in layer}
    rest = [p for p in policy.parameters() if id(p) not in inside]
    return [[tuple(p.shape) for p in unit] for unit in (*layers, rest)]


def simulate(case: dict[str, Any], processes: int) -> dict[str, Any]:
    """What `real` finds in the first process, which has most, from a step without numbers.

    Args:
        case: as for `real`.
        processes: any number; 1 is not sharded.
    """
    run = Run(
        optimizer={"sgd": "sgd_split"}.get(case["optimizer"], case["optimizer"]),
        dtype=case["weights"],
        compute_dtype=case["compute"],
        reduce_dtype=case["reduce"],
        rollout=case["rollout"],
        shard=processes,
        reference="copy",
        group_size=GROUP,
        micro_batch=GROUP,
        prompt_tokens=TOKENS,
        max_tokens=TOKENS,
    )
    module, owners = step(SHAPES[case["model"]], run)
    assert module.reference is not None
    reference = [kept for kept in module.reference._kept.values() if isinstance(kept, Tensor)]
    gradients = owners.peaks["optimizer"]["gradients"]
    sizes = shares(module.policy, module.trainer.optimizers[0], reference, gradients, owners.counter)
    return case | {"processes": processes, "how": "simulated", "bytes": sizes}


def main(argv: Sequence[str] | None = None) -> int:
    """Run cases; the first process prints a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=json.loads, help="a JSON list of cases, see `real`")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for case in args.cases:
        record = real(case)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
