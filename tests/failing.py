"""A callback that brings a process to its end in one of many ways; `test_failures` puts it into real runs."""

from __future__ import annotations

import math
import os
import signal
import time

import torch
from lightning.pytorch import Callback

from rlvr_lightning import watch


class Fails(Callback):
    """At the start of batch `at` of training or, under `validate`, of validation, in the process `rank`.

    Args:
        how: "kill"; "raise"; "disagree", by a collective call that the others do not make; "infinite", its first
            completion's advantages from then on; "wait"
            a second, for signals from elsewhere; or the name of a signal for itself.
        rank: in which process; -1 is all.
        at: at which batch.
        apart: take the other processes to be on other machines, and miss them when they are silent for so many seconds.
    """

    def __init__(self, how: str, rank: int = 1, at: int = 1, apart: float = 0.0) -> None:
        self.how, self.rank, self.at = how, rank, at
        if apart:
            watch.SILENT_S, watch.machine = apart, lambda: f"machine of {os.getpid()}"

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.fail(trainer, pl_module, batch_idx)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.state.fn == "validate" and self.at < 0:
            self.fail(trainer, pl_module, -1)

    def fail(self, trainer, pl_module, batch_idx):
        if batch_idx != self.at or self.rank not in (-1, trainer.global_rank):
            return
        print(f"FAILS rank {trainer.global_rank} pid {os.getpid()}", flush=True)
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "raise":
            raise RuntimeError("boom of seven")
        elif self.how == "disagree":
            torch.distributed.all_reduce(torch.zeros(1, device=pl_module.device))
        elif self.how == "wait":
            time.sleep(1)
        elif self.how == "infinite":
            judge = pl_module.judge

            def overflowing(*args):
                experience = judge(*args)
                experience.advantages[0] = -math.inf
                return experience

            pl_module.judge = overflowing
        else:
            os.kill(os.getpid(), signal.Signals[self.how])
