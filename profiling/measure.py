"""`profile --config X.yaml --measure`: a few real steps of a run, beside what was predicted of it.

On a CPU one process counts every tensor by owner and another is only looked at from outside, since counting takes time
and room; on a GPU the second one's figures are those of torch's allocator and of NVML. Running out of memory is a
result, too: how far it came, and status 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlvr_lightning.configuration import find_config
from rlvr_lightning.profiling.find_model import find_model
from rlvr_lightning.profiling.ledger import PHASES as STEP
from rlvr_lightning.profiling.ledger import Held, Ledger, of_phases
from rlvr_lightning.profiling.predict import predict
from rlvr_lightning.profiling.run_config import model_of, read_config, run_of
from rlvr_lightning.profiling.settings import Run
from rlvr_lightning.profiling.table import Table, render
from rlvr_lightning.study.running import environment_record

OUT_OF_MEMORY = 3
"""Exit status of `measure_worker`, which this module may not import: it would load torch."""
KILLED = (-9, 137)
"""Of a process that the kernel ended, as it does when the machine has no memory left."""
PHASES = ("rollout", "training")
Compared = Mapping[str, Ledger]
"""`predicted`, `simulated`, `measured` (or `reached`, before memory ran out), as far as there are."""


@dataclass(frozen=True)
class Measurement:
    """What came of it."""

    shape: Mapping[str, Any]
    """The model's config."""
    run: Run
    """With the longest prompt that was there."""
    record: dict[str, Any]
    ledgers: dict[str, Ledger]

    @property
    def failed(self) -> str:
        """One line, where memory ran out."""
        return str(self.record.get("failed", ""))


def measure(name: str, overrides: Sequence[str], limit_bytes: int = 0, snapshot: Path | None = None) -> Measurement:
    """Run two steps of a config, twice.

    Args:
        name: of the config, as for `fit`.
        overrides: of its settings, as for `fit`.
        limit_bytes: the most that the run may take on top of the interpreter and its libraries; 0 is all there is.
        snapshot: where a GPU's history goes.

    Raises:
        ValueError: the config cannot be run, or runs in several processes.
    """
    path = find_config(name)
    config = read_config(path, overrides)
    trainer = config.setdefault("trainer", {})
    trainer["accelerator"] = "cuda" if trainer.get("accelerator") != "cpu" and _has_cuda() else "cpu"
    run = run_of(config)[0]
    if run.processes > 1:
        raise ValueError(f"--measure runs one process, the config has {run.processes}; add --trainer.devices 1")
    shape = find_model(model_of(config))[0]
    arguments = ["--config", str(path), *overrides]
    with tempfile.TemporaryDirectory() as folder:
        process = worker(Path(folder) / "process.json", arguments, limit_bytes, count=False)
        _check_same(run, process.get("settings", {}))
        counted = worker(Path(folder) / "counted.json", arguments, limit_bytes, count=True)
        if snapshot and (found := Path(folder) / "process.pickle").is_file():
            snapshot.write_bytes(found.read_bytes())
            process["snapshot"] = snapshot.name
    longest = max(counted.get("prompt_tokens", 0), process.get("prompt_tokens", 0))
    run = replace(run, prompt_tokens=longest or run.prompt_tokens)
    ledgers = {"predicted": predict(shape, run)}
    if set(counted.get("owners_bytes", {})) & set(STEP):
        ledgers["measured" if counted["status"] == "ok" else "reached"] = of_phases(counted["owners_bytes"])
    record = {
        "command": " ".join(["python -m rlvr_lightning profile --measure --config", name, *overrides]),
        "environment": environment_record(),
        "config_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "limit_bytes": limit_bytes or None,
        "run": asdict(run),
        "counted": counted,
        "process": process,
    }
    if process["status"] == "out of memory":
        record["failed"] = said_of(process, limit_bytes)
    return Measurement(shape, run, record, ledgers)


def _check_same(run: Run, settings: Mapping[str, Any]) -> None:
    """A shortened name of a setting is understood by the parser of `fit`, and not here."""
    for setting, value in settings.items():
        if value != getattr(run, setting):
            raise ValueError(f"{setting}: the run has {value}, the prediction {getattr(run, setting)}; name it in full")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def worker(out: Path, arguments: Sequence[str], limit_bytes: int, count: bool) -> dict[str, Any]:
    """What one process wrote down, and how it ended.

    Raises:
        ValueError: a mistake in the config, in the worker's words; or it failed for another reason than memory.
    """
    command = [sys.executable, "-m", "rlvr_lightning.profiling.measure_worker", str(out)]
    command += ["--count"] * count + ([f"--limit-bytes={limit_bytes}"] if limit_bytes else [])
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=os.environ.copy())
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"phase": "starting", "step": 0}
    if done.returncode == 0:
        return found | {"status": "ok"}
    lines = [line for line in done.stderr.strip().splitlines() if line] or ["no message"]
    if done.returncode in (OUT_OF_MEMORY, *KILLED) or _memory_ran_out(done.returncode, lines):
        return found | {"status": "out of memory", "exit_status": done.returncode}
    if done.returncode == 2 and lines[-1].startswith("error: "):
        raise ValueError(lines[-1].removeprefix("error: "))
    raise ValueError(f"--measure: the run failed with status {done.returncode}: {lines[-1]}")


def _memory_ran_out(status: int, lines: Sequence[str]) -> bool:
    """Under a tight limit not even an exception can be made, or a library cannot be loaded."""
    signs = ("MemoryError", "std::bad_alloc", "Cannot allocate memory", "can't allocate memory")
    return any(sign in line for sign in signs for line in lines) or status in (-6, 134)


def said_of(found: Mapping[str, Any], limit_bytes: int) -> str:
    """One line about a run that ran out of memory."""
    before = found.get("before_bytes", 0)
    reached = max(max(found.get("phase_peak_bytes", {}).values(), default=0) - before, 0)
    of = f" of {limit_bytes / 2**30:.2f} GiB" if limit_bytes else ""
    where = f"{found['phase']}, step {found['step'] + 1}"
    return f"out of memory{of} in {where}; {reached / 2**30:.2f} GiB above the libraries had been reached"


def compared(ledgers: Compared) -> list[Table]:
    """Bytes by owner at the fullest moment of each phase, with errors: against what was measured, else simulated."""
    small = max(ledger.peak_bytes - ledger.peak.held.overhead for ledger in ledgers.values()) < 2**30
    unit, per = ("MiB", 2**20) if small else ("GiB", 2**30)
    against = _against(list(ledgers))
    what = "error %" if against == "measured" else f"% off {against}"
    errors = [f"{name}, {what}" for name in ledgers if name != against] if against else []
    columns = [unit, *ledgers, *errors]
    tables = []
    for phase in PHASES:
        held = {name: most(ledger, phase) for name, ledger in ledgers.items()}
        rows = [_row(owner.replace("_", " "), [getattr(h, owner) for h in held.values()], per, list(held))
                for owner in asdict(Held()) if any(getattr(h, owner) for h in held.values())]  # fmt: skip
        rows.append(_row("together", [h.total for h in held.values()], per, list(held)))
        tables.append(Table(f"{phase}, at its fullest", columns, rows))
    return tables


def _against(names: Sequence[str]) -> str:
    """What the others are held against; '' if they are not."""
    if "measured" in names:
        return "measured"
    return "simulated" if "simulated" in names and "reached" not in names else ""


def most(ledger: Ledger, phase: str) -> Held:
    """Who holds what at the fullest instant of a phase; nothing where it has none."""
    held = [instant.held for instant in ledger.instants if instant.phase == phase]
    return max(held, key=lambda one: one.total, default=Held())


def _row(label: str, sizes: Sequence[int], per: int, names: Sequence[str]) -> list[Any]:
    if not (against := _against(names)):
        return [label, *(size / per for size in sizes)]
    real = sizes[names.index(against)]
    others = [size for size, name in zip(sizes, names, strict=True) if name != against]
    shown = max(sizes) / per >= 0.1  # of less, a percentage means nothing
    errors = [100 * (size / real - 1) if real and shown else None for size in others]
    return [label, *(size / per for size in sizes), *errors]


def about(measurement: Measurement) -> Table:
    """What the process or the device says, by phase."""
    process, counted = measurement.record["process"], measurement.record["counted"]
    before = process.get("before_bytes", 0)
    rows: list[list[Any]] = [
        [phase, size / 2**20, (size - before) / 2**20] for phase, size in process.get("phase_peak_bytes", {}).items()
    ]
    notes = [f"by {process['method']}"] if "method" in process else []
    if "nvml_bytes" in process:
        rows.append(["whole device, by NVML", process["nvml_bytes"] / 2**20, None])
    notes.append(f"before: {before / 2**20:,.0f} MiB, of the interpreter and its libraries")
    if counted["status"] != "ok":
        notes.append(f"counted until {said_of(counted, 0)}")
    what = "measured" if counted["status"] == "ok" else "reached"
    notes.append(
        f"{process['step']} steps done, every completion to its limit, prompts of up to "
        f"{measurement.record['run']['prompt_tokens']} tokens; {what}, above, is counted tensor by tensor"
    )
    if "weights" in process:
        notes.append(f"weights: {process['weights']}")
    return Table("the process, MiB", ["phase", "peak", "above what was there before"], rows, notes)


def main(name: str, overrides: Sequence[str], limit_bytes: int, simulated: bool, out: Path | None, form: str) -> int:
    """Measure, print the tables and write the record; 1 where memory ran out.

    Args:
        name: of the config.
        overrides: of its settings.
        limit_bytes: see `measure`.
        simulated: whether a simulation stands beside it.
        out: JSON file for the record, or None.
        form: of the tables on the console.

    Raises:
        ValueError: see `measure`.
    """
    found = measure(name, overrides, limit_bytes, out.with_suffix(".pickle") if out else None)
    ledgers = found.ledgers
    if simulated:
        from rlvr_lightning.profiling.simulate import simulate

        ledgers = {"predicted": ledgers["predicted"], "simulated": simulate(found.shape, found.run), **ledgers}
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        instants = {kind: [asdict(instant) for instant in ledger.instants] for kind, ledger in ledgers.items()}
        out.write_text(json.dumps(found.record | {"ledgers": instants}, indent=1) + "\n")
    print(render([*compared(ledgers), about(found)], form), end="")
    if found.failed:
        print(f"error: {found.failed}", file=sys.stderr)
    return int(bool(found.failed))
