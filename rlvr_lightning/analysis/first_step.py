"""A run of `fit` up to its first optimizer step, of which the loss can be looked at."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from rlvr_lightning.cli import cli_class
from rlvr_lightning.configuration import config_names, resolve_config_arguments
from rlvr_lightning.policy_module import PolicyModule
from rlvr_lightning.schema import LossOutput

FIXED = ("--model.dtype=float32", "--model.compute_dtype=float32", "--model.gradient_release=null")
"""Settings under which gradients are kept, and are as exact as they get."""


class FirstStep(NamedTuple):
    """What the first optimizer step would learn from; the weights are those of the start."""

    module: PolicyModule
    parts: Sequence[Any]
    loss_of: Callable[[Any], LossOutput]

    def backward(self) -> float:
        """Go backward through the loss of the step, part by part; returns it."""
        total = 0.0
        for part in self.parts:
            loss = self.loss_of(part).loss
            loss.backward()
            total += float(loss.detach())
        return total


class Known(Exception):
    """Ends the run when the first step has been looked at."""


def watch_first_step(module: Any, look: Callable[[FirstStep], None]) -> None:
    """Have the module's first optimizer step looked at instead of made.

    Args:
        module: a PolicyModule, before its run.
        look: gets the step.
    """

    def take_step(parts: Sequence[Any], loss_of: Callable[[Any], LossOutput]) -> dict[str, float]:
        if not parts:
            raise ValueError(
                "the first batch has nothing to learn from; raise data.prompts_per_step, or take another seed"
            )
        look(FirstStep(module, parts, loss_of))
        raise Known

    module.take_step = take_step


def first_step(arguments: Sequence[str], look: Callable[[FirstStep], None]) -> None:
    """Begin a fit in this process, in float32, and end it with its first optimizer step.

    Args:
        arguments: of `fit`.
        look: gets the step; while it runs, the model is where the trainer has put it.

    Raises:
        ValueError: as `fit`; or the run has no such step.
    """
    begin([*arguments, *FIXED], lambda module: watch_first_step(module, look))


def begin(arguments: Sequence[str], built: Callable[[PolicyModule], None]) -> None:
    """Begin a fit in this process, and leave nothing behind.

    Args:
        arguments: of `fit`.
        built: gets the module before its run; somewhere on the way `Known` is raised.
    """
    arguments = resolve_config_arguments(["fit", *arguments])
    parent: Any = cli_class("fit", "-".join(config_names(arguments)) or "run")

    class First(parent):
        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            """Without anything that writes or tells."""
            return Trainer(
                accelerator=self._get(self.config_init, "trainer")["accelerator"],
                devices=1,
                max_steps=1,
                limit_val_batches=0,
                use_distributed_sampler=False,
                default_root_dir=folder,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )

        def before_fit(self) -> None:
            """Instead of measuring the start."""
            if not isinstance(self.model, PolicyModule):
                raise ValueError(f"this is for the algorithms of this package, got {type(self.model).__name__}")
            built(self.model)

    with tempfile.TemporaryDirectory() as folder:
        try:
            First(arguments)
        except Known:
            return
    raise ValueError("the run ended before its first optimizer step")
