"""Memory of runs: what was measured beside what `profile` predicts from the run's own config."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from rlvr_lightning.profiling.find_model import find_model
from rlvr_lightning.profiling.ledger import Ledger
from rlvr_lightning.profiling.predict import predict
from rlvr_lightning.profiling.run_config import model_of, run_of
from rlvr_lightning.profiling.settings import Run as Settings
from rlvr_lightning.profiling.table import Table
from rlvr_lightning.report.reading import Run, notes

OWNERS = ("weights", "gradients", "optimizer_state", "reference")
"""What callbacks and GRPO log as `memory/<owner>_bytes`, and `profile` predicts under the same names."""


@dataclass(frozen=True)
class Prediction:
    """Of a run's config."""

    ledger: Ledger | None
    remarks: tuple[str, ...]
    """What had to be assumed; or why there is none."""


def predicted(run: Run) -> Prediction:
    """What `profile --config` says of a run, on the device that it ran on."""
    if not run.config:
        return Prediction(None, ("no prediction: no config",))
    config = deepcopy(run.config)
    ranks = run.memory.get("ranks")
    if run.memory.get("device") == "cpu" and isinstance(config.get("trainer"), dict):
        config["trainer"]["accelerator"] = "cpu"
    try:
        settings, remarks = run_of(config, ranks if isinstance(ranks, int) and ranks > 1 else None)
        shape, remark = find_model(model_of(config))
        remarks = [*remarks, remark, *_assumed(settings)]
        return Prediction(predict(shape, settings), tuple(filter(None, remarks)))
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError) as error:  # a config may hold anything
        return Prediction(None, (f"no prediction: {' '.join(str(error).split()).removeprefix('--config: ')}",))


def _assumed(settings: Settings) -> list[str]:
    """Why predicted and measured bytes of these settings may differ."""
    said = []
    if settings.reference == "delta" and settings.dtype == "bfloat16":
        said.append(f"reference: predicted for {settings.changed_frac:.0%} of the weights changed")
    if settings.gradient_release:
        said.append("gradients: released as they come; measured is what is left of them before the step")
    return said


def measured_peak(run: Run, owner: str) -> int | None:
    """The most that an owner held in the process with most of it, as far as that was logged; bytes."""
    for metric in (f"memory/{owner}_rank_bytes", f"memory/{owner}_bytes"):
        if (highest := run.highest(metric)) is not None:
            return int(highest)
    return None


def comparable(run: Run) -> bool:
    """Whether the measured peak is of tensors, as the predicted one is, and not of a whole process."""
    return str(run.memory.get("method", "")).startswith("torch.cuda")


def peak_bytes(run: Run) -> int | None:
    """The peak of the whole run; of the logged batches where `memory.json` was not written."""
    peak = run.memory.get("peak_bytes")
    highest = run.highest("memory/peak_bytes")
    return peak if isinstance(peak, int) else None if highest is None else int(highest)


def memory_table(runs: Sequence[Run]) -> Table:
    """Bytes of one process by owner, predicted and measured, with the error where both mean the same."""
    rows: list[list[Any]] = []
    said: list[tuple[str, str]] = []
    note = (
        "Each owner at its own highest; the peak is what is held at once. Predicted: for completions as long as "
        "allowed, so an upper bound for the peak."
    )
    for run in runs:
        found = predicted(run)
        held = [instant.held for instant in found.ledger.instants] if found.ledger else []
        for owner in OWNERS:
            most = max((getattr(one, owner) for one in held), default=None)
            rows.append(_row(run.name, owner.replace("_", " "), most, measured_peak(run, owner)))
        peak = found.ledger.peak_bytes if found.ledger else None
        rows.append(_row(run.name, "peak", peak, peak_bytes(run), comparable(run)))
        if method := run.memory.get("method"):
            whole = (
                "" if comparable(run) else "; of the process with Python and its libraries, which no prediction counts"
            )
            said.append((run.name, f"peak on {run.memory.get('device')}, {method}{whole}"))
        said += [(run.name, f"predicted peak at {found.ledger.peak.name}")] if found.ledger else []
        said += [(run.name, remark) for remark in found.remarks]
    columns = ["run", "owner", "predicted", "measured", "error %"]
    return Table("Memory of one process, bytes", columns, rows, [note, *notes(said)])


def _row(name: str, owner: str, most: int | None, measured: int | None, same: bool = True) -> list[Any]:
    error = None
    if same and most is not None and measured is not None:
        error = 100 * (most - measured) / measured if measured else 0.0 if most == 0 else None
    return [name, owner, most, measured, error]


def phase_table(runs: Sequence[Run]) -> Table | None:
    """Peaks of the whole run by phase, in MiB; None if no run has them."""
    peaks = {run.name: run.memory.get("phase_peak_bytes") or {} for run in runs}
    phases = list(dict.fromkeys(phase for found in peaks.values() for phase in found))
    if not phases:
        return None
    rows = [
        [name, *(None if found.get(phase) is None else found[phase] / 2**20 for phase in phases)]
        for name, found in peaks.items()
    ]
    return Table("Peak of each phase, MiB", ["run", *phases], rows, [])
