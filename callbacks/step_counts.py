"""How often each optimizer has stepped, also over a resume."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


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
        """Where no checkpoint had the counts, all optimizers have stepped as often as each other."""
        if len(self.steps) != len(trainer.optimizers):
            self.steps = [trainer.global_step // len(trainer.optimizers)] * len(trainer.optimizers)
