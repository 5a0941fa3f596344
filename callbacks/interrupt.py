"""Ctrl-C and SIGTERM save a checkpoint and leave."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlvr_lightning.callbacks.run_files import run_folder

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SaveOnInterrupt(Callback):
    """On Ctrl-C or SIGTERM, finishes the step, saves `checkpoints/<filename>` in the run folder and exits.

    Logs no metric. Exit status 130 after Ctrl-C, 143 after SIGTERM, as shells expect; the last lines say how to
    resume. A second signal leaves at once, saving nothing. During validation inside fit it does not wait for the
    validation's end. With several ranks a signal to any of them stops all, after the same step.

    While training it stands in for Lightning's own SIGTERM handler, which would leave without a checkpoint and with
    status 0.

    Args:
        filename: the checkpoint's name.
    """

    def __init__(self, filename: str = "interrupted.ckpt") -> None:
        self.filename = filename
        self._signal: int | None = None
        self._saved: Path | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals; before this point there is nothing to save."""
        self._folder = run_folder(trainer) / "checkpoints"
        self._signal = self._saved = None
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise SystemExit(128 + number)
        self._signal = number
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        # os.write: print may be interrupted in its own middle by this handler
        os.write(2, f"\n{name}: saving a checkpoint after this step; once more to leave at once\n".encode())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save here, where the trainer's state is that of a finished step."""
        self._save_if_asked(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Leave here rather than where it was saved: now the loggers have the last step's metrics."""
        self._leave_if_saved(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave before the validation that follows the step."""
        self._leave_if_saved(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A validation can be long, and a preempted job has little time."""
        if self._previous and trainer.state.fn == "fit":
            self._save_if_asked(trainer)
            self._leave_if_saved(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step was the last one."""
        self._leave_if_saved(trainer)
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Signals are no longer ours."""
        self._restore()

    def _save_if_asked(self, trainer: Trainer) -> None:
        if not trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):
            return
        self._signal = self._signal or signal.SIGTERM
        path = self._folder / self.filename
        trainer.save_checkpoint(path)
        self._saved = path

    def _leave_if_saved(self, trainer: Trainer) -> None:
        if self._saved is None:
            return
        if trainer.is_global_zero:
            message = f"\nInterrupted after step {trainer.global_step}. Saved {self._saved}\n"
            message += f"To go on, run the same command with: --ckpt_path {self._saved}\n"
            print(message, file=sys.stderr, flush=True)
        raise SystemExit(128 + (self._signal or signal.SIGTERM))

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
