"""Peak memory by phase of a training step: on the GPU where there is one, else of the process."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rlvr_lightning.callbacks.memory_probes import PhaseMeter, choose_probe, nvml_used_bytes
from rlvr_lightning.callbacks.optimizer_state import OptimizerState
from rlvr_lightning.callbacks.run_files import exact, run_folder, write_json

PHASES = ("rollout", "reward", "reference", "values", "prm", "forward", "backward", "optimizer", "validation", "other")


class GPUMemory(Callback):
    """Logs the peak of memory in each phase of a step, and writes `memory.json` into the run folder.

    =============================  =====================================================================
    logged key                     unit and meaning
    =============================  =====================================================================
    `memory/peak_bytes`            bytes, highest of the phases of this batch
    `memory/<phase>_peak_bytes`    bytes, peak while in the phase (see below)
    `memory/reserved_peak_bytes`   bytes that torch's allocator has reserved (CUDA only)
    `memory/nvml_used_bytes`       bytes in use on the first process's device as NVML sees it, at the end of
                                   the batch, other processes included (CUDA, package nvidia-ml-py only)
    =============================  =====================================================================

    Phases are forward, backward, optimizer (all the rest: other, validation), told apart by Lightning's hooks. A module
    that knows more has an attribute `phase_listeners`, a list of functions, and calls each with the name of the phase
    it enters (one of `PHASES`, or "" for none); then its word alone counts.

    On CUDA the figures are those of torch's allocator, on a CPU the resident memory of the process. Where there are
    several processes, a figure is that of the one where it is highest; of a phase not named above, the first one's.
    `memory.json` holds the peaks of the whole run, likewise.
    """

    def __init__(self) -> None:
        self._meter: PhaseMeter | None = None
        self._told = False
        self._validating = False
        self._nvml = True
        self._handles: list[RemovableHandle] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the probe and register with the module."""
        self._folder = run_folder(trainer)
        probe = choose_probe(trainer.strategy.root_device)
        everywhere = trainer.strategy.reduce_boolean_decision(probe is not None, all=True)  # all ask, or none does
        self._meter = PhaseMeter(probe) if probe and everywhere else None
        listeners = getattr(pl_module, "phase_listeners", None)
        self._told = isinstance(listeners, list)
        if isinstance(listeners, list):
            listeners.append(self._on_phase)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimizers exist now: learn when their steps end."""
        self._handles = [o.register_step_post_hook(lambda *_: self._on_hook("forward")) for o in trainer.optimizers]

    def _on_phase(self, phase: str) -> None:
        """The module enters a phase."""
        if self._meter and not self._validating:
            self._meter.enter(phase)

    def _on_hook(self, phase: str) -> None:
        """Lightning enters a phase; ignored if the module itself tells."""
        if not self._told:
            self._on_phase(phase)

    def on_train_batch_start(self, *_: Any) -> None:
        """Until the backward pass it is the forward pass."""
        if self._meter:
            self._meter.enter("")
            self._meter.take_step()  # what happened between batches is in the peaks of the run, not in this batch's
        self._on_hook("forward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The backward pass begins."""
        self._on_hook("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In manual optimization another forward pass may follow."""
        self._on_hook("forward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The optimizer step begins; it ends in the post hook."""
        self._on_hook("optimizer")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the peaks of this batch."""
        if not self._meter:
            return
        self._meter.enter("")
        peaks = self._meter.take_step()
        device = trainer.strategy.root_device
        reserved = {"reserved": torch.cuda.max_memory_reserved(device)} if device.type == "cuda" else {}
        peaks = _highest(trainer, peaks | reserved)
        named = {f"memory/{phase}_peak_bytes": peak for phase, peak in peaks.items() if phase != "other"}
        named["memory/peak_bytes"] = max(peak for phase, peak in peaks.items() if phase != "reserved")
        pl_module.log_dict(exact(named | (self._read_nvml(device) if device.type == "cuda" else {})))

    def _read_nvml(self, device: torch.device) -> dict[str, int]:
        if not self._nvml:
            return {}
        try:
            return {"memory/nvml_used_bytes": nvml_used_bytes(device)}
        except Exception as error:  # a missing package or driver: a monitor must not end the run
            self._nvml = False
            rank_zero_warn(f"GPUMemory: no NVML figures ({type(error).__name__}: {error}); pip install nvidia-ml-py")
            return {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What happens until its end is `validation`, whatever the module says."""
        self._on_phase("validation")
        self._validating = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to training."""
        self._validating = False
        self._on_phase("")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `memory.json`."""
        self._write(trainer, reduce=True)
        self._leave(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is, without asking the other ranks: they may be gone."""
        self._write(trainer, reduce=False)
        self._leave(pl_module)

    def _leave(self, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._meter = [], None
        listeners = getattr(pl_module, "phase_listeners", [])
        if self._told and self._on_phase in listeners:
            listeners.remove(self._on_phase)

    def _write(self, trainer: Trainer, reduce: bool) -> None:
        if not self._meter:
            return
        self._meter.enter("")
        peaks = _highest(trainer, self._meter.run) if reduce else self._meter.run
        device, probe = trainer.strategy.root_device, self._meter.probe
        report: dict[str, Any] = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "method": probe.method,
            "total_bytes": probe.total_bytes(),
            "ranks": trainer.world_size if reduce else 1,
            "peak_bytes": max(peaks.values()),
            "phase_peak_bytes": peaks,
        }
        states = [callback for callback in trainer.callbacks if isinstance(callback, OptimizerState)]  # type: ignore[attr-defined]
        if states:
            report["optimizer_state"] = states[0].summary(trainer, reduce)
        if trainer.is_global_zero:
            write_json(self._folder / "memory.json", report)


def _highest(trainer: Trainer, peaks: dict[str, int]) -> dict[str, int]:
    """The highest peak over the ranks. The names are fixed, lest a rank that never saw a phase hang the others."""
    names = (*PHASES, "reserved")
    local = torch.tensor([peaks.get(name, 0) for name in names], device=trainer.strategy.root_device)
    highest = dict(zip(names, trainer.strategy.reduce(local, reduce_op="max").tolist(), strict=True))
    return peaks | {name: peak for name, peak in highest.items() if peak}
