"""How often each optimizer has stepped, also over a resume."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class StepCounts(Callback):
    """A callback that numbers the steps of each optimizer, and keeps the numbers in checkpoints.

    The trainer's own count is of the steps of all optimizers together, and only of those made through it.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        """Of each optimizer, by its place in `trainer.optimizers`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run; a checkpoint's count comes after this."""
        self.steps = []

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"steps": list(self.steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `state_dict` has it; of a checkpoint without, `on_train_start` finds the counts."""
        self.steps = list(state_dict.get("steps", []))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where no checkpoint had the counts, the trainer's is shared out, which is a guess if there are several."""
        several = len(trainer.optimizers)
        if len(self.steps) == several:
            return
        self.steps = [trainer.global_step // several] * several
        if several > 1 and trainer.global_step:
            rank_zero_warn(
                f"{type(self).__name__}: the checkpoint does not say how often each of {several} optimizers has "
                f"stepped; their steps are numbered from {self.steps[0]} on"
            )
