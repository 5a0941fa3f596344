"""How many weights each optimizer step really changes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rlvr_lightning.callbacks.change_counts import DEFINITIONS
from rlvr_lightning.callbacks.change_meter import ChangeMeter
from rlvr_lightning.callbacks.change_report import Cost, fractions, summarise
from rlvr_lightning.callbacks.run_files import append_line, run_folder
from rlvr_lightning.callbacks.step_counts import StepCounts
from rlvr_lightning.callbacks.tensors import distinct


@dataclass
class Watched:
    """One optimizer under observation."""

    index: int
    since: int
    """Steps it had made when this process began."""
    meter: ChangeMeter
    handles: list[RemovableHandle] = field(default_factory=list)


class UpdateSparsity(StepCounts):
    """Logs the share of weights that an optimizer step changed, and that differ from the start of the run.

    ===========================================  ===========================================================
    logged key                                   unit and meaning
    ===========================================  ===========================================================
    `update/changed_frac/<definition>`           0..1, entries changed by the measured optimizer step
    `update/changed_frac_total/<definition>`     0..1, entries that differ from the start of this process's
                                                 run (a resumed run starts anew: `since_step` in the file)
    `update/measured_step`                       which optimizer step these figures are of: Lightning's loggers
                                                 repeat a value until the next one, within an epoch
    `update/measure_s`                           seconds this measurement took
    `update/measure_frac`                        seconds of measuring per second of training
    ===========================================  ===========================================================

    Definitions: `bf16` (bits of the bf16 view differ), `tol1e-5` (further apart than 1e-5 in that view), `rel1e-3`
    (stored values further apart than 1e-3 of the larger), `fp32` (stored bits differ at all).

    Each measurement also appends a line to `sparsity.jsonl` in the run folder: exact counts overall, by kind of tensor
    and by layer, with entries that were exactly zero before counted apart (any change of a zero is a change of its
    bits). Counted are the distinct parameters of the optimizer, tied ones once; those that are frozen are `entries`
    that do not change. `module_entries` is the size of the whole module, for adapters. Shards are counted where they
    lie, and summed over the processes, replicas once; no shard leaves its process. The 1st step of each optimizer is
    measured, then every N-th; a step is what happens inside `optimizer.step()`, and, if the optimizer has
    `register_begin_hook`, what it did before that in the backward pass.

    Old values wait in host files without names in the run folder: one of the size of the weights, and one more with
    those of the start if `total`. Nothing is held on the device. A full disk ends the measuring, not the run.

    Args:
        every_n_steps: measure each so many optimizer steps.
        definitions: which definitions of "changed".
        total: also compare with the start of the run.
    """

    def __init__(
        self, every_n_steps: int = 10, definitions: Sequence[str] = tuple(DEFINITIONS), total: bool = True
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"UpdateSparsity.every_n_steps must be at least 1, got {every_n_steps}")
        unknown = [name for name in definitions if name not in DEFINITIONS]
        if unknown:
            raise ValueError(f"UpdateSparsity.definitions: unknown {unknown}; there are {list(DEFINITIONS)}")
        super().__init__()
        self.every_n_steps, self.definitions, self.total = every_n_steps, list(definitions), total
        self.clock = time.perf_counter
        self._watched: list[Watched] = []
        self._metrics: dict[str, float] = {}
        self._error: OSError | None = None
        self._stopped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights of the start, and listen to every optimizer's steps."""
        super().on_train_start(trainer, pl_module)
        self._trainer, self._folder = trainer, run_folder(trainer)
        self._module_entries = sum(p.numel() for p in distinct(pl_module.parameters()))
        self._cost, self._error, self._stopped = Cost(self.every_n_steps), None, False
        names = {id(p): name for name, p in pl_module.named_parameters()}
        start = self._now()
        try:
            for index, optimizer in enumerate(trainer.optimizers):
                self._watched.append(self._watch(index, optimizer, names))
        except OSError as error:
            self._error = error
        self._stop_if(trainer.strategy.reduce_boolean_decision(self._error is not None, all=False))
        self._cost.measured_s = self._now() - start

    def _watch(self, index: int, optimizer: Optimizer, names: dict[int, str]) -> Watched:
        first = self._trainer.is_global_zero
        meter = ChangeMeter(optimizer, names, self.definitions, self._folder, self.total, first_rank=first)
        watched = Watched(index, self.steps[index], meter)
        # an optimizer that updates during the backward pass says when it begins
        register = getattr(optimizer, "register_begin_hook", optimizer.register_step_pre_hook)
        before = register(lambda *_: self._before_step(watched))
        watched.handles = [before, optimizer.register_step_post_hook(lambda *_: self._after_step(watched))]
        return watched

    def _before_step(self, watched: Watched) -> None:
        if self._stopped or self.steps[watched.index] % self.every_n_steps:
            return
        start = self._now()
        try:
            watched.meter.before_step()
        except OSError as error:
            self._error = error  # the other ranks learn it after the step, when all of them meet
        self._cost.last_s = self._now() - start

    def _after_step(self, watched: Watched) -> None:
        measured = self.steps[watched.index] % self.every_n_steps == 0 and not self._stopped
        self.steps[watched.index] += 1
        self._cost.steps += 1
        if not measured:
            return
        start = self._now()
        counts = self._counts(watched.meter)
        if self._stopped:
            return
        step, total = [*(summarise(watched.meter.names, part, self.definitions) for part in counts), {}][:2]
        self._cost.add(self._now() - start)
        self._write(watched, step, total)
        self._metrics = {"update/measured_step": self.steps[watched.index]} | fractions(step, "update/changed_frac")
        if total:
            self._metrics |= fractions(total, "update/changed_frac_total")

    def _counts(self, meter: ChangeMeter) -> Tensor:
        """The meter's counts, summed over ranks, with the frozen parameters."""
        counts = meter.empty()
        try:
            counts = counts if self._error else meter.counts()
        except OSError as error:
            self._error = error
        failed = torch.tensor([int(self._error is not None)])
        message = torch.cat([counts.view(-1), failed]).to(self._trainer.strategy.root_device)
        message = self._trainer.strategy.reduce(message, reduce_op="sum").cpu()
        self._stop_if(bool(message[-1]))
        counts = message[:-1].view(counts.shape)
        for row, entries in meter.frozen.items():
            counts[:, row, 0, 0] = entries
        return counts

    def _write(self, watched: Watched, step: dict[str, Any], total: dict[str, Any]) -> None:
        where = {"step": self.steps[watched.index], "since_step": watched.since, "optimizer": watched.index}
        cost = {"module_entries": self._module_entries, "measure_s": round(self._cost.last_s, 6)}
        if self._trainer.is_global_zero:
            append_line(self._folder / "sparsity.jsonl", where | cost | {"last_step": step, "total": total})

    def on_train_batch_start(self, *_: Any) -> None:
        """Time the step."""
        self._batch_start, self._measured_before = self.clock(), self._cost.measured_s

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the measurement, if this batch had one."""
        if self._stopped:
            self._leave()
        self._cost.trained_s += self.clock() - self._batch_start - (self._cost.measured_s - self._measured_before)
        if self._metrics:
            cost = {"update/measure_s": self._cost.last_s, "update/measure_frac": self._cost.frac()}
            pl_module.log_dict(self._metrics | cost)
            self._metrics = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening, give the disk back."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening, give the disk back."""
        self._leave()

    def _stop_if(self, failed: bool) -> None:
        """A full disk ends the measuring, not the run; on all ranks, or the next sum over ranks would hang."""
        if failed:
            self._stopped = True  # hooks are removed later: not while torch goes through them
            rank_zero_warn(f"UpdateSparsity measures no more, a rank could not keep the old weights: {self._error}")

    def _leave(self) -> None:
        for watched in self._watched:
            for handle in watched.handles:
                handle.remove()
            watched.meter.close()
        self._watched = []

    def _now(self) -> float:
        """Seconds, when the device has done all it was asked: waiting for the backward pass is no cost of ours."""
        if self._trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(self._trainer.strategy.root_device)
        return self.clock()
