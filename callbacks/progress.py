"""A progress bar with short names."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

SHORT = {
    "reward/mean": "reward",
    "policy/kl": "KL",
    "response/length_mean": "length",
    "update/grad_norm": "norm",
    "train/loss": "loss",
}


def shortened(metrics: dict[str, Any], short: dict[str, str]) -> dict[str, Any]:
    """Metrics in the order and under the names of `short`, then the others; without the logger's version number.

    >>> shortened({"v_num": 3, "val/x/pass@1": 0.5, "reward/mean": 1.0}, SHORT)
    {'reward': 1.0, 'val/x/pass@1': 0.5}
    """
    first = {label: metrics[name] for name, label in short.items() if name in metrics}
    return first | {name: value for name, value in metrics.items() if name not in short and name != "v_num"}


class ShortProgressBar(TQDMProgressBar):
    """Lightning's progress bar without `v_num`, with `reward`, `KL`, `length` first and under these names.

    Shows whatever is logged with `prog_bar=True`; logs nothing.

    Args:
        refresh_rate: update each so many batches; 0 shows no bar.
        leave: keep the bars of finished epochs.
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the bar shows after the rate."""
        return shortened(super().get_metrics(trainer, pl_module), SHORT)
