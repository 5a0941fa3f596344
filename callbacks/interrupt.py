"""Ctrl-C, SIGTERM and SLURM's notice of requeueing save a checkpoint and leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment

from rlvr_lightning.callbacks.run_files import run_folder

SAME_S = 1.0
"""Launchers pass Ctrl-C on to processes that a terminal has already told: what comes so soon is the same."""


class Interrupted(SystemExit):
    """All ranks leave together, having saved."""

    agreed = True


class SaveOnInterrupt(Callback):
    """On Ctrl-C or SIGTERM, finishes the step, saves `checkpoints/<filename>` in the run folder and exits.

    Logs no metric. Exit status 130 after Ctrl-C, 143 after SIGTERM, as shells expect; the last lines say how to
    resume. A second Ctrl-C leaves at once, saving nothing. During validation inside fit it does not wait for the
    validation's end. With several ranks a signal to any of them stops all, after the same step.

    Under SLURM the signal that announces a requeue (SIGUSR1, see Lightning's `SLURMEnvironment`; ask for it with
    `#SBATCH --signal=SIGUSR1@180`) does the same, and puts the job back into the queue with `scontrol requeue`.

    It stands in for Lightning's own handlers, which would leave without a checkpoint and with status 0, and in which
    ranks wait for each other wherever the signal finds them. In validation and testing alone, SIGTERM ends the process.

    Args:
        filename: the checkpoint's name.
    """

    def __init__(self, filename: str = "interrupted.ckpt") -> None:
        self.filename = filename
        self._signal: int | None = None
        self._since_s = 0.0
        self._requeue: int | None = None
        self._saved: Path | None = None
        self._handles = False  # whether signals come here

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals; before this point there is nothing to save."""
        self._folder = run_folder(trainer) / "checkpoints"
        self._signal = self._saved = None
        self._requeue = requeue_signal(trainer)
        self._handles = True
        handle([signal.SIGINT, signal.SIGTERM, *([self._requeue] if self._requeue else [])], self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal, self._since_s = number, time.monotonic()
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            once_more = "; once more to leave at once" if number == signal.SIGINT else ""
            # os.write: print may be interrupted in its own middle by this handler
            os.write(2, f"\n{name}: saving a checkpoint after this step{once_more}\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._since_s > SAME_S:
            raise SystemExit(128 + number)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save here, where the trainer's state is that of a finished step."""
        self._save_if_asked(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Leave here rather than where it was saved: now the loggers have the last step's metrics."""
        self._leave_if_saved(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave before the validation that follows the step."""
        self._leave_if_saved(trainer)
        if trainer.state.fn != "fit":
            handle([signal.SIGTERM], leave)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """There is nothing to save."""
        handle([signal.SIGTERM], leave)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A validation can be long, and a preempted job has little time."""
        if self._handles and trainer.state.fn == "fit":
            self._save_if_asked(trainer)
            self._leave_if_saved(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step was the last one. The trainer puts the handlers back that were there before it."""
        self._leave_if_saved(trainer)
        self._handles = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The process is about to say why it ends; the SIGTERM of a launcher that ends all must not silence it."""
        if self._handles:
            handle([signal.SIGTERM], signal.SIG_IGN)
            handle([signal.SIGINT], signal.default_int_handler)
        self._handles = False

    def _save_if_asked(self, trainer: Trainer) -> None:
        asked = torch.tensor(self._signal or 0, device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if not number:
            return
        self._signal = number
        path = self._folder / self.filename
        trainer.save_checkpoint(path)
        self._saved = path

    def _leave_if_saved(self, trainer: Trainer) -> None:
        if self._saved is None:
            return
        assert self._signal is not None
        if trainer.is_global_zero:
            message = f"\nInterrupted after step {trainer.global_step}. Saved {self._saved}\n"
            message += f"To go on, run the same command with: --ckpt_path {self._saved}\n"
            print(message, file=sys.stderr, flush=True)
            if self._signal == self._requeue:
                requeue()
        raise Interrupted(128 + self._signal)


def handle(signals: list[int], handler: Any) -> None:
    """Set a handler, where Python allows it."""
    if threading.current_thread() is threading.main_thread():
        for number in signals:
            signal.signal(number, handler)


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """A handler that ends the process."""
    raise SystemExit(128 + number)


def requeue_signal(trainer: Trainer) -> int | None:
    """The signal after which a SLURM job is to be put back into the queue; None elsewhere."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None and SLURMEnvironment.detect():
        environment = SLURMEnvironment()
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return environment.requeue_signal


def requeue() -> None:
    """Put this SLURM job back into the queue; says so where that does not work."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        problem = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        problem = str(error)
    said = f"could not requeue job {job}: {problem}" if problem else f"requeued job {job}"
    print(said, file=sys.stderr, flush=True)
