"""Why steps change few weights: how large updates are beside the spacing of bfloat16, and what gradients are like."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rlvr_lightning.callbacks.run_files import append_line, run_folder
from rlvr_lightning.callbacks.step_counts import StepCounts
from rlvr_lightning.callbacks.update_watch import UpdateWatch, as_record


class WhySparse(StepCounts):
    """Records the size of updates, and averages of gradients, on a random sample of entries.

    ============================  ===========================================================================
    logged key                    unit and meaning
    ============================  ===========================================================================
    `update/absorbed_frac`        0..1, of updates that are not 0 those below half a unit in the last place of
                                  the bfloat16 weight: rounded to nearest they vanish
    `update/momentum_cosine`      -1..1, of the average of earlier gradients (beta 0.9) and the step's own
    `update/sqrt_v_std`           standard deviation over entries of the root of the average of squared
                                  gradients (beta 0.999, bias-corrected): what AdamW divides by
    `update/watched_step`         which optimizer step these figures are of
    `update/watch_frac`           seconds of watching per second of training
    ============================  ===========================================================================

    Each measurement appends a line to `why_sparse.jsonl` in the run folder: the same overall, by kind of matrix and by
    layer, with counts, quantiles (within 9 %), a histogram by octave of |update| over half a unit, and the norm of the
    gradient, which is of all entries. An update is the difference of the stored weights, or of their fp32 masters in
    the optimizer's state; of 16-bit weights without a master it is what the optimizer's rule wanted to add, known of
    torch's SGD, Adam, AdamW and RMSprop and of our SGD: others' entries are counted as `unknown_update` and left out of
    the shares and sizes of updates. Gradients are those that the step uses, after clipping. Where they are dropped in
    the backward pass they are read there, before the hook that does so; of several micro-batches applied singly the
    last one counts. `sqrt_v_own` is of the optimizer's own state, where it has one.

    The averages are kept for every optimizer, also for one without a state, on the sample alone: 24 bytes an entry,
    `sample_bytes` in the file. They start anew when a run is resumed; `observed` says how many gradients they hold.
    Every tensor has at least 64 entries in the sample, so in sums over all of them small tensors weigh a little more
    than their size. Steps without a finite gradient are counted as `skipped`. A step is what happens inside
    `optimizer.step()` and, if the optimizer has `register_begin_hook`, what it did before that in the backward pass.

    Args:
        every_n_steps: measure each so many optimizer steps; the averages take in every step.
        entries: of the sample in each process, about.
        seed: of the sample.
    """

    def __init__(self, every_n_steps: int = 10, entries: int = 65536, seed: int = 0) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("entries", entries)):
            if value < 1:
                raise ValueError(f"WhySparse.{name} must be at least 1, got {value}")
        super().__init__()
        self.every_n_steps, self.entries, self.seed = every_n_steps, entries, seed
        self.clock = time.perf_counter
        self._watches: list[UpdateWatch] = []
        self._handles: list[RemovableHandle] = []
        self._metrics: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the sample, and listen to every optimizer's steps."""
        super().on_train_start(trainer, pl_module)
        self._trainer, self._folder = trainer, run_folder(trainer)
        self._spent_s = self._trained_s = 0.0
        names = {id(p): name for name, p in pl_module.named_parameters()}
        for index, optimizer in enumerate(trainer.optimizers):
            watch = UpdateWatch(optimizer, names, self.entries, self.seed, trainer.is_global_zero)
            self._watches.append(watch)
            self._listen(index, optimizer, watch)

    def _listen(self, index: int, optimizer: Optimizer, watch: UpdateWatch) -> None:
        since = self.steps[index]
        watch.measuring = since % self.every_n_steps == 0

        def before(*_: Any) -> None:
            start = self._now()
            watch.before_step()
            self._spent_s += self._now() - start

        def after(*_: Any) -> None:
            start = self._now()
            watch.after_step()
            self.steps[index] += 1
            if watch.measuring:
                self._write(index, watch, since)
            watch.measuring = self.steps[index] % self.every_n_steps == 0
            self._spent_s += self._now() - start

        # an optimizer that updates during the backward pass says when it begins
        register = getattr(optimizer, "register_begin_hook", optimizer.register_step_pre_hook)
        self._handles += [register(before), optimizer.register_step_post_hook(after)]

    def _write(self, index: int, watch: UpdateWatch, since: int) -> None:
        step = self.steps[index]
        strategy = self._trainer.strategy
        sizes = torch.tensor([watch.sample.entries, watch.nbytes], dtype=torch.float64)
        message = torch.cat([sizes, watch.sums().view(-1)]).to(strategy.root_device)
        message = strategy.reduce(message, reduce_op="sum").cpu()
        record = as_record(watch.kinds, watch.layers, message[2:].view(watch.empty().shape))
        about = {"step": step, "since_step": since, "optimizer": index, "observed": watch.observed}
        about |= {"skipped": watch.skipped}
        about |= {"sample_entries": int(message[0]), "sample_bytes": int(message[1])}
        if self._trainer.is_global_zero:
            append_line(self._folder / "why_sparse.jsonl", about | record)
        overall = record["all"]
        found = {
            "update/watched_step": step,
            "update/absorbed_frac": overall["update"]["absorbed_frac"],
            "update/momentum_cosine": overall["momentum_cosine"],
            "update/sqrt_v_std": (overall["sqrt_v"] or {}).get("std"),
        }
        self._metrics = {name: value for name, value in found.items() if value is not None}

    def on_train_batch_start(self, *_: Any) -> None:
        """Time the step."""
        self._batch_start, self._spent_before = self.clock(), self._spent_s

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the measurement, if this batch had one."""
        self._trained_s += self.clock() - self._batch_start - (self._spent_s - self._spent_before)
        if self._metrics:
            cost = {"update/watch_frac": self._spent_s / self._trained_s} if self._trained_s > 0 else {}
            pl_module.log_dict(self._metrics | cost)
            self._metrics = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._leave()

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        for watch in self._watches:
            watch.close()
        self._handles, self._watches = [], []

    def _now(self) -> float:
        """Seconds, when the device has done all it was asked: waiting for the backward pass is no cost of ours."""
        if self._trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(self._trainer.strategy.root_device)
        return self.clock()
