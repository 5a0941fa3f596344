"""`fit --profile_memory`: who held what over the allocations of chosen steps, as a page and JSON."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rlvr_lightning.callbacks.run_files import run_folder, write_json
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.profiling.cuda_history import cuda_history
from rlvr_lightning.profiling.history import History
from rlvr_lightning.profiling.owners import Owners

FOLDER = "memory_timeline"


def parse_steps(text: str) -> list[int]:
    """Numbers of steps, from 1, with commas between them.

    Raises:
        ValueError: it is something else.

    >>> parse_steps("2"), parse_steps("7,1,7")
    ([2], [1, 7])
    """
    try:
        steps = sorted({int(part) for part in text.split(",")})
    except ValueError:
        steps = []
    if not steps or steps[0] < 1:
        raise ValueError(f"--profile_memory: {text!r} names no steps; give numbers from 1 on, such as 2 or 1,5")
    return steps


class MemoryTimeline(Callback):
    """Counts every tensor of some steps, by owner, and writes a page and its figures into the run folder.

    `memory_timeline/step_N.html` shows it, `step_N.json` holds it; on CUDA `step_N.pickle` is torch's snapshot for
    pytorch.org/memory_viz. A step is one batch of prompts, the first of this process is 1. Counting makes these steps
    slower and holds nothing on the device. Where there are several processes, the first one's memory is shown. A step
    that ends in an error is shown up to there.

    Args:
        steps: numbers of those to show.

    Raises:
        ValueError: plotly is not installed.
    """

    def __init__(self, steps: Sequence[int] = (2,)) -> None:
        if importlib.util.find_spec("plotly") is None:
            raise ValueError("--profile_memory needs the package plotly: pip install 'rlvr-lightning[report]'")
        self.steps = sorted(steps)
        self.told: list[str] = []
        """A line for each step shown."""
        self._step = 0
        self._history: History | None = None
        self._stack = ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All ranks ask for the folder."""
        if not isinstance(pl_module, GRPO):
            raise ValueError(f"--profile_memory shows rlvr_lightning.grpo.GRPO, this is {type(pl_module).__name__}")
        self._folder, self._step = run_folder(trainer) / FOLDER, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count, if this step is chosen."""
        assert isinstance(pl_module, GRPO)
        self._step += 1
        if self._step not in self.steps or not trainer.is_global_zero:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        device = trainer.strategy.root_device
        if device.type == "cuda":
            self._stack.enter_context(cuda_history(self._path(".pickle")))
        owners = Owners()
        owners.counter.own("other", tensors_alive(device))  # such as rotations; what has an owner goes to it next
        self._stack.enter_context(owners.watching(pl_module))
        self._history = History()
        owners.counter.on_change = self._history.add
        self._history.enter("")
        self._history.add(sum(owners.counter.live().values()), owners.counter.live())
        pl_module.phase_listeners.append(self._history.enter)
        self._stack.callback(pl_module.phase_listeners.remove, self._history.enter)
        self._stack.callback(setattr, owners.counter, "on_change", None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write the step down."""
        self._finish("")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write down what there was, such as before memory ran out."""
        self._finish(f"ended by {type(exception).__name__}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what there is, and of which steps there is nothing."""
        if not trainer.is_global_zero:
            return
        for step in self.steps:
            if step > self._step:
                self.told.append(f"memory of step {step}: not shown, the run had {self._step}")
        print("\n".join(self.told))

    def _path(self, suffix: str) -> Path:
        return self._folder / f"step_{self._step}{suffix}"

    def _finish(self, end: str) -> None:
        history, self._history = self._history, None
        self._stack.close()
        if history is None:
            return
        history.close()
        from rlvr_lightning.profiling.timeline_page import timeline_page

        write_json(self._path(".json"), {"step": self._step, "end": end} | history.record())
        self._path(".html").write_text(timeline_page(self._step, history, end), encoding="utf-8")
        peak = history.peak
        most = sorted(peak.owners.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{owner.replace('_', ' ')} {size / 2**20:,.1f}" for owner, size in most)
        line = f"memory of step {self._step}: peak {peak.total / 2**20:,.1f} MiB ({parts}): {self._path('.html')}"
        self.told.append(f"{line}, {end}" if end else line)


def tensors_alive(device: torch.device) -> Iterable[Tensor]:
    """All that Python knows of on a kind of device."""
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == device.type and thing.layout == torch.strided:
            yield thing
