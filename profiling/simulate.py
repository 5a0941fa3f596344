"""Two training steps of any model without its weights, processes or a GPU, and what the first process held.

The steps are the project's own: its GRPO module in Lightning's loop, its loss, optimizer, gradient release, activation
checkpointing, and its strategy over processes that do not exist. Weights and activations are shapes
(`simulate_numbers`); bytes are counted storage by storage (`allocations`), by the owners and in the phases of real
steps (`owners`). torch's own trackers (`torch.distributed._tools.mem_tracker`) see the same storages; but they put each
into one of a few kinds, know neither a cache of keys and values nor logits, and look through all modules at every
operation, which takes ten times as long.

What a step would decide by numbers is the longest case: every prompt and completion is as long as can be, none ends
early, every group has a signal, norms are finite. Three things are shortened. Of a rollout only the first prompts are
read, and the last tokens drawn, of as many sequences as go at once. An optimizer step has at most two micro-batches,
all others being like the second. And the first of the two steps, which makes the optimizer's state, is of one token.
Mixtures are traced in bfloat16 alone: of no other dtype does torch know the shapes of their experts' products.

What differs on a GPU:

- attention is computed as on a CPU: torch's fused kernel for it, which keeps outputs and the logarithms of sums as the
  GPU's do, but where a mask is needed other kernels may pad it or make it larger;
- kernels take workspace of their own, and the allocator rounds sizes up and cannot use all that it has freed;
- our SGD's kernel is taken to need nothing (`simulate_world`); optimizers of torch step all tensors at once, as there;
- the context and libraries are `predict.CUDA_OVERHEAD`, assumed as there.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.data import DataLoader

from rlvr_lightning.experience import Batching
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim import SGD, GradientRelease
from rlvr_lightning.policy import TINY, LoRA
from rlvr_lightning.profiling.ledger import Ledger
from rlvr_lightning.profiling.memory_worker import LengthParity, Shaped
from rlvr_lightning.profiling.owners import Owners
from rlvr_lightning.profiling.parameters import COUNTED
from rlvr_lightning.profiling.predict import CUDA_OVERHEAD
from rlvr_lightning.profiling.settings import Run
from rlvr_lightning.profiling.simulate_numbers import WithoutNumbers
from rlvr_lightning.profiling.simulate_rollout import longest_rollout, longest_rollouts
from rlvr_lightning.profiling.simulate_world import Elsewhere, fake_processes, memory_of, quiet, shapes_alone
from rlvr_lightning.rewards.score import Scores
from rlvr_lightning.rollout.hf import HFEngine
from rlvr_lightning.schema import Rollouts, Sampling
from rlvr_lightning.strategy import Sharded

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "rmsprop": torch.optim.RMSprop,
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
    "sgd_split": SGD,
    "sgd_fp32": partial(SGD, master="fp32"),
    "sgd_bf16": partial(SGD, master="none"),
    "sgd_stochastic": partial(SGD, master="none", rounding="stochastic"),
}


class Simulated(Shaped):
    """A module whose rollouts are the longest there can be."""

    run: Run

    def configure_optimizers(self) -> Any:
        """A reference that stays as it is: which entries a step changes is in its numbers."""
        configured = super().configure_optimizers()
        if self.reference is not None and self.reference.follows_changes:
            getattr(configured[0][0], "_listeners", []).clear()
            vars(configured[0][0]).pop("step", None)
        return configured

    def rollout(self, records: list[dict[str, Any]]) -> tuple[Rollouts, Scores, dict[str, float]]:
        """Go through the first and last tokens, then return as many completions as there are records for."""
        run = self.run
        if self.rollout_step == 0:
            run = replace(run, prompt_tokens=1, max_tokens=1)
        else:
            self._phase("rollout")
            assert isinstance(self.engine, HFEngine)
            longest_rollout(self.engine, run, self.sampling)
            self._phase("reward")
        rollouts = longest_rollouts(len(records), run)
        with _disable_current_modes():  # rewards are numbers
            scores = self.scorer(rollouts, records, self.failures_file)
        return rollouts, scores, {}


def check(run: Run) -> None:
    """Raise ValueError for what only the closed form can say."""
    if run.optimizer not in OPTIMIZERS:
        raise ValueError(f"--simulate: {run.optimizer} cannot step here; one of {', '.join(OPTIMIZERS)}")
    if run.cpu_offload or run.low_on_host:
        raise ValueError(
            "--simulate: the memories of host and GPU are not told apart; leave out cpu_offload and low_on_host"
        )
    if run.completions % run.group_size:
        raise ValueError(
            f"--simulate: the completions of a step ({run.completions}) must be whole groups of {run.group_size}"
        )


def simulate(config: Mapping[str, Any], run: Run) -> Ledger:
    """What a process holds in each phase of a step.

    Args:
        config: what the model's `config.json` holds.
        run: settings.

    Raises:
        ValueError: settings or a model of which only the closed form can say something.
    """
    ledger = step(config, run)[1].ledger()
    if run.device != "cuda":
        return ledger
    return Ledger(replace(i, held=replace(i.held, overhead=CUDA_OVERHEAD)) for i in ledger.instants)


def step(config: Mapping[str, Any], run: Run) -> tuple[Simulated, Owners]:
    """The module after two steps of which the second is a full one, and what was held; see `simulate`."""
    check(run)
    with ThreadPoolExecutor(1) as thread:  # modes of torch are of a thread
        return thread.submit(_step, config, run).result()


def _step(config: Mapping[str, Any], run: Run) -> tuple[Simulated, Owners]:
    owners = Owners()
    with ExitStack() as stack:
        stack.enter_context(quiet())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_model(folder, config)
        stack.enter_context(fake_processes(run.processes))
        stack.enter_context(memory_of(run.device))
        stack.enter_context(shapes_alone(run.changed_frac))
        module, trainer = module_of(Simulated, folder, run), trainer_of(run)
        module.run = run
        prompts = ceil(min(run.step_completions or run.micro_batch, 2 * run.micro_batch) / run.group_size)
        record: Any = {"prompt": "", "prompt_ids": [0], "index": 0}
        batches = [[record] * n * run.shard * run.replicate for n in (1, prompts)]
        stack.enter_context(WithoutNumbers(scratch=run.device == "cpu"))
        stack.enter_context(owners.watching(module))
        try:
            trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        except RuntimeError as error:  # torch's, where sizes follow from numbers, or for what it cannot do on shapes
            line = str(error).strip().splitlines()[0]
            raise ValueError(f"--simulate: the step cannot be traced without numbers ({line}); leave it out") from error
    return module, owners


def write_model(folder: Path, config: Mapping[str, Any]) -> None:
    """A config, and a tokenizer of which only the existence matters."""
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != COUNTED}))
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, folder)


Kind = TypeVar("Kind", bound=Shaped)


def module_of(kind: type[Kind], folder: Path, run: Run) -> Kind:
    """A module with the settings of a run, of a folder's model."""
    make, clip = OPTIMIZERS[run.optimizer], "two_pass" if run.two_pass else "delayed"
    ours = run.optimizer.startswith("sgd_")
    reference = "copy" if run.changed_frac > 0.2 else run.reference
    return kind(
        str(folder),
        {"parity": LengthParity()},
        partial(make, lr=1e-3) if ours else partial(make, lr=1e-3, foreach=run.device == "cuda"),
        group_size=run.group_size,
        sampling=Sampling(max_tokens=run.max_tokens, temperature=run.temperature),
        objective=Objective(kl_coef=0.01 if run.reference != "none" else 0.0),
        batching=Batching(micro_batch=run.micro_batch, rollout_batch=run.rollout_batch),
        lora=LoRA(rank=run.lora_rank) if run.lora_rank else None,
        dtype=run.dtype,
        compute_dtype="auto" if run.autocast else run.compute_dtype,
        reference=reference,  # type: ignore[arg-type]
        gradient_release=GradientRelease(clip=clip) if run.gradient_release else None,  # type: ignore[arg-type]
        activation_checkpointing=run.activation_checkpointing,
    )


def trainer_of(run: Run) -> Trainer:
    """For two steps in this process, of as many as the run has."""
    shared: dict[str, Any] = {}
    if run.processes > 1:
        sizes: dict[str, Any] = {"shard": run.shard, "replicate": run.replicate, "tensor": run.tensor}
        strategy = Sharded(**sizes, reduce_dtype=run.reduce_dtype, rollout=run.rollout)  # type: ignore[arg-type]
        shared = {"strategy": strategy, "plugins": [Elsewhere()], "use_distributed_sampler": False}
    return Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=run.processes,
        precision="bf16-mixed" if run.autocast else None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **shared,
    )
