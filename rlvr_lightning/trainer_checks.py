"""Settings of the trainer and the data that do not go with those of the algorithm, found before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch.optim import Optimizer

from rlvr_lightning.experience import Batching
from rlvr_lightning.optim.release import GradientRelease, ReleasedUpdate
from rlvr_lightning.optim.subnetwork import check_freezes
from rlvr_lightning.optim.tensorwise import on_change
from rlvr_lightning.strategy import Sharded


def check_trainer(trainer: Trainer, stored: torch.dtype) -> None:
    """Raise ValueError for processes and precisions that would train something else than they seem to.

    Args:
        trainer: whose settings are checked.
        stored: dtype of the weights.
    """
    check_strategy(trainer)
    precision = trainer.precision
    if isinstance(trainer.strategy, Sharded) and precision != "32-true":
        raise ValueError(
            f"trainer.precision: {precision} is not for Sharded; leave it out and set model.compute_dtype: bfloat16"
        )
    if precision == "16-mixed":
        raise ValueError(
            "trainer.precision: 16-mixed scales the loss, and clipping would see scaled gradients; use bf16-mixed"
        )
    if precision == "bf16-mixed" and stored != torch.float32:
        raise ValueError("trainer.precision: bf16-mixed is for float32 weights; with dtype: bfloat16 leave it out")
    if precision not in ("32-true", "bf16-mixed"):
        raise ValueError(f"trainer.precision: {precision} is not supported; leave it out and set model.dtype")


def check_steps(trainer: Trainer) -> None:
    """Raise ValueError for settings of Lightning's own optimizer steps, which ours are not."""
    if trainer.gradient_clip_val:
        raise ValueError("trainer.gradient_clip_val: leave it out and set model.max_grad_norm")
    if trainer.accumulate_grad_batches != 1:
        raise ValueError("trainer.accumulate_grad_batches: leave it out; a batch is a step, cut up by micro_batch")


def check_strategy(trainer: Trainer) -> None:
    """Raise ValueError for several processes under another strategy than ours."""
    if trainer.world_size > 1 and not isinstance(trainer.strategy, Sharded):
        raise ValueError(
            f"trainer.strategy: {type(trainer.strategy).__name__} is not supported in {trainer.world_size} processes; "
            "set it to rlvr_lightning.strategy.Sharded (whole copies of the model: shard: 1, replicate: the number "
            "of processes)"
        )


def check_reference(kind: str, kl_coef: float) -> None:
    """Raise ValueError for a KL term without a reference."""
    if kind == "none" and kl_coef > 0:
        raise ValueError("reference: none leaves objective.kl_coef nothing to compare with; set it to 0, or keep one")


def check_optimizer(make: Callable[..., Optimizer], release: GradientRelease | None, follow: bool) -> None:
    """Raise ValueError for an optimizer that cannot do what is asked of it; it is made once, for a single number.

    Args:
        make: makes the optimizer of a list of parameters.
        release: how gradients are to be released, if they are.
        follow: whether a reference has to hear of what each step changes.
    """
    optimizer = make([torch.nn.Parameter(torch.zeros(1))])
    if release:
        ReleasedUpdate(optimizer, release, max_norm=0.0).close()
    if follow:
        on_change(optimizer, lambda parameter, undo: None, lambda parameter: True)


def check_subnetwork(path: str | None, make: Callable[..., Optimizer], lora: bool, dtype: torch.dtype) -> None:
    """Raise ValueError for a subnetwork that is not there, or settings that would move what is outside of it."""
    if path is None:
        return
    if lora:
        raise ValueError("model.subnetwork is for the weights themselves; leave it or lora out")
    if not Path(path).expanduser().is_file():
        raise ValueError(
            f"model.subnetwork: there is no file {path}; make one: python -m rlvr_lightning subnetwork --help"
        )
    check_freezes(make, dtype)


def sharing(trainer: Trainer) -> int:
    """Processes that share a batch of prompts, known before they are started."""
    return trainer.world_size // getattr(trainer.strategy, "tensor", 1)


def check_batches(prompts: int, group: int, batching: Batching, release: GradientRelease | None, ranks: int) -> None:
    """Raise ValueError where a batch does not divide into minibatches, or a released step has several micro-batches.

    Args:
        prompts: in a batch, over all processes.
        group: completions per prompt.
        batching: sizes.
        release: how gradients are released, if they are.
        ranks: processes.
    """
    for name, count in (("batching.minibatches", batching.minibatches), ("the number of processes", ranks)):
        if prompts % count:
            raise ValueError(f"data.prompts_per_step ({prompts}) must be a multiple of {name} ({count})")
    if release:
        most = min(prompts // ranks, prompts // batching.minibatches)  # a minibatch is drawn from all ranks' prompts
        release.check(most * group, batching.micro_batch)
