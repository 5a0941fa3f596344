"""Runs of a sweep as processes, several at a time, and a record of each."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rlvr_lightning.configuration import find_config
from rlvr_lightning.study.plan import Run, Sweep
from rlvr_lightning.study.records import curves, load_records, summaries

INTERRUPTED = (130, 143, -2, -15)
OF_A_RUN = ("metrics.csv", "config.yaml", "*.json", "*.jsonl")
LOCK = ".running"


@dataclass
class Processes:
    """The runs that are going on, and whether more may begin."""

    alive: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopping: bool = False

    def begin(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes] | None:
        """Start one, unless all are to stop."""
        if self.stopping:
            return None
        process = subprocess.Popen(command, **options)
        self.alive.add(process)
        if self.stopping:  # since a line ago: nobody has told this one
            process.terminate()
        return process

    def stop(self) -> None:
        """Ask all to save and end."""
        self.stopping = True
        for process in list(self.alive):
            process.terminate()


@contextmanager
def held(folder: Path) -> Iterator[IO[str]]:
    """A lock of a folder. A run's process inherits that of its own: one that outlives its sweep keeps others away.

    Raises:
        ValueError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by a run or sweep still going; wait for it, or end it") from None
        yield lock


def execute(run: Run, sweep: Sweep, processes: Processes) -> dict[str, Any] | None:
    """Run one point as a process, which is among `processes` meanwhile.

    Its record is written as soon as there is one, whatever becomes of runs beside it, and returned; None if the run was
    interrupted.
    """
    folder = sweep.folder / "runs" / run.key
    path = sweep.folder / "records" / f"{run.key}.json"
    with held(folder) as lock:
        path.unlink(missing_ok=True)  # its run's files are about to go
        record = _execute(run, sweep, processes, folder, lock)
        if record is not None:
            path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def _execute(run: Run, sweep: Sweep, processes: Processes, folder: Path, lock: IO[str]) -> dict[str, Any] | None:
    for old in itertools.chain.from_iterable(folder.glob(name) for name in OF_A_RUN):
        old.unlink()
    if (folder / "checkpoints").is_dir():  # a longer run's last step would be taken for this one's
        shutil.rmtree(folder / "checkpoints")
    environment = os.environ | {"OMP_NUM_THREADS": str(sweep.threads), "PYTHONUNBUFFERED": "1"}
    log = folder / "log.txt"
    start = time.time()
    with log.open("w") as output:
        to: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT, "pass_fds": [lock.fileno()]}
        process = processes.begin(run.command(folder), env=environment, **to)
        if process is None:
            return None
        status = process.wait()
        processes.alive.discard(process)
    wall_s = round(time.time() - start, 2)
    if status in INTERRUPTED:
        return None
    found = curves(folder / "metrics.csv", sweep.metrics)
    missing = [] if status else [name for name in sweep.metrics if name not in found]
    record = describe(run, sweep) | {
        "status": "failed" if status or missing else "ok",
        "exit_code": status,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
        "wall_s": wall_s,
        "metrics": summaries(found),
        "memory": _read_json(folder / "memory.json"),
    }
    if record["status"] == "failed":
        why = [f"metrics.csv has no {', '.join(missing)}"] if missing else []
        record["last_lines"] = why + log.read_text(errors="replace").splitlines()[-15:]
    elif not sweep.keep_checkpoints:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return record


def describe(run: Run, sweep: Sweep) -> dict[str, Any]:
    """What is known of a run before it starts."""
    digests = {name: hashlib.sha256(find_config(name).read_bytes()).hexdigest() for name in run.configs}
    return {
        "sweep": sweep.name,
        "label": run.label,
        "point": dict(run.point),
        "seed": run.seed,
        "command": shlex.join(["python", "-m", "rlvr_lightning", "fit", *run.arguments()]),
        "configs_sha256": digests,
        "threads": sweep.threads,
        "parallel": sweep.parallel,
        "environment": environment_record(),
    }


def environment_record() -> dict[str, Any]:
    """Versions and machine, without importing any of them."""
    packages = ("rlvr-lightning", "torch", "lightning", "transformers")
    commit = ""
    if shutil.which("git"):
        git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "commit": commit or None,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def pending(sweep: Sweep, redo: bool = False) -> tuple[list[Run], list[str]]:
    """The runs without a good record, and warnings about records made with other versions of the configs."""
    done = {} if redo else load_records(sweep.folder)
    todo, warnings = [], []
    for run in sweep.runs():
        old, now = done.get(run.key), describe(run, sweep)
        if old is None or old["status"] != "ok" or old["command"] != now["command"]:
            todo.append(run)
        elif old["configs_sha256"] != now["configs_sha256"]:
            warnings.append(f"{run.key}: its configs have changed since; --redo runs everything again")
    return todo, warnings


def of_sweep(sweep: Sweep) -> list[dict[str, Any]]:
    """The records of the sweep's own runs, of commands that they have now; those of earlier versions may lie beside."""
    commands = {run.key: describe(run, sweep)["command"] for run in sweep.runs()}
    found = load_records(sweep.folder)
    return [record for key, record in found.items() if record["command"] == commands.get(key)]


def reread(sweep: Sweep) -> int:
    """Take up metrics that the sweep names and a record lacks, from the run's log; returns how many records changed."""
    changed = 0
    for key, record in load_records(sweep.folder).items():
        if record["status"] == "ok" and (missing := set(sweep.metrics) - set(record["metrics"])):
            log = sweep.folder / "runs" / key / "metrics.csv"
            if found := summaries(curves(log, [name for name in sweep.metrics if name in missing])):
                record["metrics"] |= found
                (sweep.folder / "records" / f"{key}.json").write_text(json.dumps(record, indent=1) + "\n")
                changed += 1
    return changed


@contextmanager
def passing_on_sigterm(processes: Processes) -> Iterator[None]:
    """SIGTERM goes to the runs, too, which save and end, and is then as Ctrl-C, which a terminal sends them itself."""

    def stop(*_: Any) -> None:
        processes.stop()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_all(sweep: Sweep, todo: Sequence[Run]) -> int:
    """Run what is to be done, `parallel` at a time, with a record of each; returns the number of failures.

    Raises:
        ValueError: this sweep is going on elsewhere, or a run of an earlier one; nothing was begun.
    """
    processes = Processes()
    with held(sweep.folder), passing_on_sigterm(processes):
        for run in todo:
            with held(sweep.folder / "runs" / run.key):
                pass
        (sweep.folder / "records").mkdir(parents=True, exist_ok=True)
        try:
            return _run_all(sweep, todo, processes)
        except KeyboardInterrupt:
            print("interrupted: the same command goes on with the runs that have no record", file=sys.stderr)
            raise SystemExit(130) from None


def _run_all(sweep: Sweep, todo: Sequence[Run], processes: Processes) -> int:
    failures = 0
    with ThreadPoolExecutor(sweep.parallel) as pool:
        futures = {pool.submit(execute, run, sweep, processes): run for run in todo}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                run, record = futures[future], future.result()
                if record is None:
                    raise KeyboardInterrupt
                failures += record["status"] != "ok"
                print(f"[{number}/{len(todo)}] {progress_line(run, record, sweep.metrics[0])}", flush=True)
        except BaseException:
            processes.stopping = True  # a terminal has told those that are going on; none more begins
            pool.shutdown(cancel_futures=True)
            raise
    return failures


def progress_line(run: Run, record: Mapping[str, Any], metric: str) -> str:
    """How one run went."""
    if record["status"] != "ok":
        return f"{run.key}: FAILED after {record['wall_s']:.0f} s: {record['last_lines'][-1:]}"
    ends = (record["metrics"][metric][which] for which in ("start", "final"))
    start, final = ("not finite" if value is None else f"{value:.3f}" for value in ends)
    return f"{run.key}: {record['wall_s']:.0f} s, {metric} {start} -> {final}"
