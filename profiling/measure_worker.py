"""A few real steps of a config in this process, and what they held; `measure` starts one process for each way to look.

Every completion runs to its limit and every group teaches, so that steps are the largest that the settings allow: a
peak that depends on luck says nothing of the next step. What was reached is written down at every phase, for a process
that is killed says nothing any more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from rlvr_lightning import callbacks, config_errors
from rlvr_lightning.advantage import has_signal
from rlvr_lightning.callbacks.memory_probes import MemoryProbe, PhaseMeter, choose_probe, kib_field, nvml_used_bytes
from rlvr_lightning.callbacks.run_files import write_json
from rlvr_lightning.cli import RLVRCLI, quieten
from rlvr_lightning.configuration import resolve_config_arguments
from rlvr_lightning.experience import Experience
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.policy import load_model
from rlvr_lightning.profiling.cuda_history import cuda_history
from rlvr_lightning.profiling.owners import Owners
from rlvr_lightning.rollout import HFEngine

OUT_OF_MEMORY = 3
"""Exit status."""
OBSERVERS = (
    callbacks.GPUMemory,
    callbacks.UpdateSparsity,
    callbacks.CompletionTable,
    callbacks.SaveOnInterrupt,
    ModelCheckpoint,
    SaveConfigCallback,
)
"""Of `fit`, left out here: they write files."""


class Measured(Callback):
    """Makes the steps of a GRPO module as large as they can be, and writes down what they hold.

    Args:
        out: JSON file, written at every phase.
        count: count tensors by owner, instead of reading the memory of the process or the device.
        limit_bytes: that model and training may take; 0 is all there is.
    """

    def __init__(self, out: Path, count: bool, limit_bytes: int = 0) -> None:
        self.out, self.count, self.limit_bytes = out, count, limit_bytes
        self.found: dict[str, Any] = {"phase": "loading the model", "step": 0, "prompt_tokens": 0}
        self.owners: Owners | None = None
        self.meter: PhaseMeter | None = None
        self._stack = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the model is loaded: what the process holds already; random weights for a folder without any."""
        if not isinstance(pl_module, GRPO):
            raise ValueError(f"--measure runs rlvr_lightning.grpo.GRPO, this is {type(pl_module).__name__}")
        device = trainer.strategy.root_device
        self.found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        if not self.count and (probe := choose_probe(device)) is not None:
            probe.reset()
            self.found |= {"method": probe.method, "before_bytes": probe.peak_bytes()}
            self._start_meter(probe)
        self.found["settings"] = {
            "max_tokens": pl_module.sampling.max_tokens,
            "group_size": pl_module.group_size,
            "rollout_batch": pl_module.batching.rollout_batch,
        }
        folder = Path(pl_module.model_name)
        if folder.is_dir() and not list(folder.glob("*.safetensors")):
            self.found["weights"] = "random: the model's folder holds none"
            pl_module.load_model = lambda empty=False: _shaped(pl_module, device, empty)  # type: ignore[method-assign]
        write_json(self.out, self.found)
        if self.limit_bytes:
            limit(self.limit_bytes)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights and optimizer are there."""
        assert isinstance(pl_module, GRPO)
        _enlarge(pl_module, self._see)
        if self.count:
            self.owners = Owners()
            self._stack.enter_context(self.owners.watching(pl_module))
        elif self.found["device"] != "cpu":
            self._stack.enter_context(cuda_history(self.out.with_suffix(".pickle")))
        pl_module.phase_listeners.append(self._enter)

    def on_train_batch_end(self, *_: Any) -> None:
        """A step is done."""
        self.found["step"] += 1
        self._write()

    def on_train_end(self, *_: Any) -> None:
        """All are."""
        self.close()

    def close(self) -> None:
        """Write what there is, also after an error."""
        self._stack.close()
        if self.owners is not None and self.owners.phase:
            self.owners.enter("")
        self._write()

    def _start_meter(self, probe: MemoryProbe) -> None:
        self.meter = PhaseMeter(probe)
        self.meter.enter("loading")

    def _enter(self, phase: str) -> None:
        self.found["phase"] = phase or "between steps"
        if self.meter is not None:
            self.meter.enter(phase)
            if self.found["device"] != "cpu":
                self.found["nvml_bytes"] = max(self.found.get("nvml_bytes", 0), _nvml(self.found))
        self._write()

    def _see(self, experience: Experience) -> None:
        longest = max(map(len, experience.rollouts.prompt_ids))
        self.found["prompt_tokens"] = max(self.found["prompt_tokens"], longest)

    def _write(self) -> None:
        if self.meter is not None:
            self.meter.enter(self.meter.phase)  # up to now
            self.found["phase_peak_bytes"] = self.meter.run
        if self.owners is not None:
            self.found["phase_peak_bytes"] = {name: sum(held.values()) for name, held in self.owners.peaks.items()}
            self.found["owners_bytes"] = self.owners.peaks
        write_json(self.out, self.found)


def _nvml(found: dict[str, Any]) -> int:
    try:
        return nvml_used_bytes(torch.device("cuda", torch.cuda.current_device()))
    except Exception as error:  # no package or no driver: the allocator's figures stand without it
        found["nvml"] = f"{type(error).__name__}: {error}"
        return 0


def _shaped(module: GRPO, device: torch.device, empty: bool) -> Any:
    with torch.device(device):
        return load_model(module.model_name, module.weights_dtype, from_scratch=True, empty=empty)


def _enlarge(module: GRPO, see: Callable[[Experience], None]) -> None:
    """Let no completion end before its limit, count all tokens, and give every group a signal."""
    if not isinstance(module.engine, HFEngine):
        raise ValueError("--measure runs rollouts in this process; leave model.rollout out")
    judge = module.judge

    def teaching(*args: Any) -> Experience:
        experience = judge(*args)
        see(experience)
        signal = has_signal(experience.advantages, module.group_size).repeat_interleave(module.group_size)
        made = torch.ones_like(experience.advantages)
        made[1::2] = -1
        advantages = experience.advantages.where(signal, made)
        return replace(experience, advantages=advantages, mask=experience.rollouts.completion_mask)

    module.judge = teaching  # type: ignore[method-assign, assignment]
    module.engine.stopped = lambda rows, counts, tokens: torch.zeros_like(tokens, dtype=torch.bool)  # type: ignore[method-assign]


class MeasureCLI(RLVRCLI):
    """`fit`, for a few batches and without what writes files."""

    measured: Measured
    steps = 2

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """One."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The config's own, shorter."""
        quiet = {"logger": False, "enable_progress_bar": False, "limit_val_batches": 0, "max_steps": -1}
        trainer = LightningCLI.instantiate_trainer(
            self, **quiet, max_epochs=1, limit_train_batches=self.steps, default_root_dir=self.measured.out.parent
        )
        kept = [c for c in trainer.callbacks if not isinstance(c, OBSERVERS)]  # type: ignore[attr-defined]
        trainer.callbacks = [*kept, self.measured]  # type: ignore[attr-defined]
        return trainer

    def before_fit(self) -> None:
        """Nothing is measured before."""

    def after_fit(self) -> None:
        """Nothing is said."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, of a device or of the machine.

    >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("shape mismatch"))
    (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(text in str(error) for text in ("can't allocate memory", "std::bad_alloc", "Cannot allocate memory"))


def limit(limit_bytes: int) -> None:
    """Let the process take no more from now on: of the GPU where there is one, else of memory of its own."""
    if torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.memory.set_per_process_memory_fraction(min(1.0, limit_bytes / total))
        return
    import resource  # not on Windows

    most = kib_field(Path("/proc/self/status"), "VmData:") + limit_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def main(argv: list[str]) -> int:
    """Run; 0, `OUT_OF_MEMORY`, or 2 after a mistake in the config."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--limit-bytes", type=int, default=0)
    args, rest = parser.parse_known_args(argv)
    quieten()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    measured = Measured(args.out, args.count, args.limit_bytes)
    MeasureCLI.measured = measured
    try:
        MeasureCLI(["fit", *resolve_config_arguments(rest)])
    except Exception as error:
        measured.found["error"] = config_errors.condense(str(error) or type(error).__name__)
        measured.close()
        if out_of_memory(error):
            return OUT_OF_MEMORY
        if not isinstance(error, ValueError):
            raise
        print(f"error: {measured.found['error']}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
