"""A module of 43 parameters with known updates, a run of it, and what a run writes: for the tests of the callbacks."""

from __future__ import annotations

import csv
import json

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader


class Tiny(pl.LightningModule):
    """An embedding of 7 x 5 whose looked-up rows alone get gradients, a frozen tensor of 3, and a norm of 5."""

    def __init__(self, manual: bool = False, steps: int = 1, lr: float = 1.0) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.steps, self.lr = steps, lr
        self.embed = nn.Embedding(7, 5)
        self.layers = nn.ModuleList([nn.ParameterDict({"norm": nn.Parameter(torch.ones(5))})])
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        nn.init.ones_(self.embed.weight)

    def loss(self, rows):
        return (self.embed(rows) * self.layers[0]["norm"].detach()).sum()

    def training_step(self, batch, batch_idx):
        rows = batch[0]
        if self.automatic_optimization:
            return self.loss(rows)
        optimizer = self.optimizers()
        for _ in range(self.steps):
            optimizer.zero_grad()
            self.manual_backward(self.loss(rows))
            optimizer.step()
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(module, rows, folder, callbacks, ckpt_path=None, **kwargs):
    """Train on batches of row numbers; returns the trainer."""
    options = {"logger": CSVLogger(folder, name="", version=""), "enable_progress_bar": False, "log_every_n_steps": 1}
    options |= {"max_epochs": 1}
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options | kwargs,
    )
    loader = DataLoader([torch.tensor(row) for row in rows], batch_size=1, shuffle=False)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))
