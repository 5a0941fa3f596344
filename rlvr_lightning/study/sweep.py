"""`sweep`: a config over learning rates, seeds or any other settings; one process and one JSON record per run.

A sweep file::

    name: tiny
    configs:                                   # label: the configs that `fit` gets, in order
      sgd: [sgd.yaml]
      adamw: [adamw.yaml]
    settings:                                  # by label, what its runs have in common
      adamw: {model.init_args.warmup_steps: 5}
    grid:                                      # by label, setting: values; all combinations are run
      sgd: {model.init_args.optimizer.init_args.lr: [0.1, 0.3, 1.0]}
      adamw: {model.init_args.optimizer.init_args.lr: [1.0e-5, 1.0e-4]}
    seeds: [0, 1, 2]                           # given as --seed_everything
    overrides: {trainer.max_steps: 60}         # the same for every run
    metrics: [val/arithmetic/pass@1]           # kept with their curves; the first one is compared
    parallel: 2                                # runs at a time
    threads: 1                                 # OMP_NUM_THREADS of each
    out: results/tiny                          # records/*.json and runs/*/
    keep_checkpoints: true                     # false: a run that ended well keeps its logs only

A run that has a record is not run again, unless it failed or its command changed. A failed run is a record too. Metrics
that are added later are read from the logs of the runs that are done.

With `--lr` the config is one that `fit` takes, and its learning rate is what is swept; settings of `fit` may follow:

    python -m rlvr_lightning sweep --config sgd.yaml --lr 1e-3..10 --seeds 0,1 --trainer.max_steps 60
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rlvr_lightning.configuration import find_config
from rlvr_lightning.study.rates import lines, parse_rates
from rlvr_lightning.study.records import cells, curves, load_records, summaries

SEED = "seed_everything"
INTERRUPTED = (130, 143, -2, -15)
OF_A_RUN = ("metrics.csv", "config.yaml", "*.json", "*.jsonl")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep file says; see the module's docstring."""

    name: str
    configs: dict[str, list[str]]
    metrics: list[str]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    overrides: dict[str, Any] = field(default_factory=dict)
    parallel: int = 1
    threads: int = 1
    out: str = ""
    keep_checkpoints: bool = True

    def __post_init__(self) -> None:
        for name in ("configs", "metrics", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"sweep.{name} must not be empty")
        for name in ("parallel", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"sweep.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("grid", "settings"):
            if unknown := set(getattr(self, name)) - set(self.configs):
                labels = sorted(self.configs)
                raise ValueError(f"sweep.{name}: {sorted(unknown)} are no labels of sweep.configs {labels}")
        for label, grid in self.grid.items():
            for setting, values in grid.items():
                if not isinstance(values, list) or not values:
                    raise ValueError(f"sweep.grid.{label}.{setting} must be a list of values, got {values!r}")

    @property
    def folder(self) -> Path:
        """Where records and runs go."""
        return Path(self.out or f"results/{self.name}")

    def runs(self) -> Iterator[Run]:
        """All combinations; seeds innermost, so that a cell is complete early.

        >>> sweep = Sweep(name="s", configs={"a": ["a.yaml"]}, metrics=["m"], grid={"a": {"x.lr": [1, 2]}}, seeds=[7])
        >>> [run.key for run in sweep.runs()]
        ['a-lr=1-seed=7', 'a-lr=2-seed=7']
        """
        for label, configs in self.configs.items():
            grid, common = self.grid.get(label, {}), self.overrides | self.settings.get(label, {})
            for values in itertools.product(*grid.values()):
                for seed in self.seeds:
                    yield Run(label, tuple(configs), dict(zip(grid, values, strict=True)), common, seed)


@dataclass(frozen=True)
class Run:
    """One point of a sweep."""

    label: str
    configs: tuple[str, ...]
    point: Mapping[str, Any]
    overrides: Mapping[str, Any]
    seed: int

    @property
    def key(self) -> str:
        """Name of its record and its folder."""
        parts = [f"{setting.rpartition('.')[2]}={_text(value)}" for setting, value in self.point.items()]
        name = "-".join([self.label, *parts, f"seed={self.seed}"])
        return "".join(c if c.isalnum() or c in "._=+-" else "_" for c in name)

    def arguments(self) -> list[str]:
        """What `fit` gets: configs and settings, without the run folder."""
        settings = {**self.overrides, **self.point, SEED: self.seed}
        configs = [word for config in self.configs for word in ("--config", config)]
        return [*configs, *(f"--{setting}={_text(value)}" for setting, value in settings.items())]

    def command(self, folder: Path) -> list[str]:
        """The whole command line; logs and checkpoints go to `folder`."""
        logger = {"": "CSVLogger", ".save_dir": folder, ".name": "", ".version": ""}
        where = [f"--trainer.logger{name}={value}" for name, value in logger.items()]
        return [sys.executable, "-m", "rlvr_lightning", "fit", *self.arguments(), *where]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_sweep(path: Path) -> Sweep:
    """A sweep from its YAML file.

    Raises:
        ValueError: a field is missing, unknown or impossible; two runs would share a name; a config is nowhere.
    """
    import yaml

    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping with name, configs, metrics")
    known = {f.name for f in fields(Sweep)}
    if unknown := set(content) - known:
        raise ValueError(f"{path}: unknown {sorted(unknown)}; fields are {sorted(known)}")
    if missing := {"name", "configs", "metrics"} - set(content):
        raise ValueError(f"{path}: {sorted(missing)} missing")
    sweep = Sweep(**content)
    keys = [run.key for run in sweep.runs()]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"{path}: several runs would be named {sorted(twice)[0]}")
    for config in itertools.chain(*sweep.configs.values()):
        find_config(config)
    return sweep


def execute(run: Run, sweep: Sweep) -> dict[str, Any] | None:
    """Run one point as a process; its record, or None if it was interrupted."""
    folder = sweep.folder / "runs" / run.key
    folder.mkdir(parents=True, exist_ok=True)
    for old in itertools.chain.from_iterable(folder.glob(name) for name in OF_A_RUN):
        old.unlink()
    if (folder / "checkpoints").is_dir():  # a longer run's last step would be taken for this one's
        shutil.rmtree(folder / "checkpoints")
    environment = os.environ | {"OMP_NUM_THREADS": str(sweep.threads), "PYTHONUNBUFFERED": "1"}
    log = folder / "log.txt"
    start = time.time()
    with log.open("w") as output:
        command = run.command(folder)
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
    wall_s = round(time.time() - start, 2)
    if status.returncode in INTERRUPTED:
        return None
    found = curves(folder / "metrics.csv", sweep.metrics)
    missing = [] if status.returncode else [name for name in sweep.metrics if name not in found]
    record = describe(run, sweep) | {
        "status": "failed" if status.returncode or missing else "ok",
        "exit_code": status.returncode,
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


def recorded(run: Run, sweep: Sweep) -> dict[str, Any] | None:
    """`execute`, with the record written as soon as there is one, whatever becomes of runs beside it."""
    path = sweep.folder / "records" / f"{run.key}.json"
    path.unlink(missing_ok=True)  # its run's files are about to go
    record = execute(run, sweep)
    if record is not None:
        path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def run_all(sweep: Sweep, todo: Sequence[Run]) -> int:
    """Run what is to be done, `parallel` at a time, with a record of each; returns the number of failures."""
    failures = 0
    (sweep.folder / "records").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(sweep.parallel) as pool:
        futures = {pool.submit(recorded, run, sweep): run for run in todo}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                run, record = futures[future], future.result()
                if record is None:
                    raise KeyboardInterrupt
                failures += record["status"] != "ok"
                print(f"[{number}/{len(todo)}] {progress_line(run, record, sweep.metrics[0])}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            print("interrupted: the same command goes on with the runs that have no record", file=sys.stderr)
            raise SystemExit(130) from None
    return failures


def progress_line(run: Run, record: Mapping[str, Any], metric: str) -> str:
    """How one run went."""
    if record["status"] != "ok":
        return f"{run.key}: FAILED after {record['wall_s']:.0f} s: {record['last_lines'][-1:]}"
    summary = record["metrics"][metric]
    return f"{run.key}: {record['wall_s']:.0f} s, {metric} {summary['start']:.3f} -> {summary['final']:.3f}"


LR = "model.init_args.optimizer.init_args.lr"


def lr_sweep(options: argparse.Namespace, settings: Sequence[str]) -> Sweep:
    """The sweep that `--lr` asks for.

    Args:
        options: of the command line.
        settings: of `fit`, as `--name value` or `--name=value`.

    Raises:
        ValueError: the rates, the seeds or a setting cannot be read.
    """
    words = [part for word in settings for part in (word.split("=", 1) if word.startswith("--") else [word])]
    names = words[::2]
    if len(words) % 2 or not all(name.startswith("--") and "." in name for name in names):
        raise ValueError(f"settings of fit come as --name value, got {shlex.join(settings)}")
    if not all(seed.strip().isdigit() for seed in options.seeds.split(",")):
        raise ValueError(f"--seeds must be whole numbers with commas between, got {options.seeds!r}")
    find_config(options.config)
    label = Path(options.config).stem
    rates = parse_rates(options.lr, options.per_decade)
    return Sweep(
        name=f"{label}_lr",
        configs={label: [options.config]},
        grid={label: {LR: rates}},
        seeds=[int(seed) for seed in options.seeds.split(",")],
        overrides={name[2:]: value for name, value in zip(names, words[1::2], strict=True)},
        metrics=[options.metric],
        parallel=options.parallel,
        out=options.out or f"runs/{label}_lr",
        keep_checkpoints=False,
    )


def tell(sweep: Sweep) -> None:
    """Table, advice on rates and figures of all records there are."""
    from rlvr_lightning.study.tables import print_table

    records = list(load_records(sweep.folder).values())
    print_table(records, sweep.metrics[:3])
    for line in lines(cells(records), sweep.metrics[0]):
        print(line.advice())
    if importlib.util.find_spec("matplotlib") is None:
        print("no figures: matplotlib is missing (pip install 'rlvr-lightning[plot]')")
    elif any(record["status"] == "ok" for record in records):
        from rlvr_lightning.study.plots import draw

        print("drawn:", *draw(sweep.folder, []))


def main(argv: list[str]) -> int:
    """Run a sweep; exit status 1 if any run failed."""
    parser = argparse.ArgumentParser(prog="python -m rlvr_lightning sweep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, help="the sweep file (with --lr: the run's), here or packaged")
    parser.add_argument("--redo", action="store_true", help="run everything again")
    parser.add_argument("--dry_run", action="store_true", help="print the commands that would run")
    rates = parser.add_argument_group("learning rates of one config")
    rates.add_argument("--lr", metavar="LOW..HIGH", help="sweep them over decades, such as 1e-3..10; or a,b,c")
    rates.add_argument("--per_decade", type=int, default=2, metavar="N", help="rates in each decade (default 2)")
    rates.add_argument("--seeds", default="0", metavar="A,B", help="seeds of each rate (default 0)")
    rates.add_argument("--metric", default="reward/mean", help="what is compared (default reward/mean)")
    rates.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    rates.add_argument("--out", default="", metavar="DIR", help="folder of records (default runs/CONFIG_lr)")
    options, settings = parser.parse_known_args(argv)
    try:
        if settings and not options.lr:
            raise ValueError(f"unknown {shlex.join(settings)}; settings of fit go into the sweep file")
        sweep = lr_sweep(options, settings) if options.lr else read_sweep(find_config(options.config))
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    todo, warnings = pending(sweep, options.redo)
    print("".join(f"warning: {line}\n" for line in warnings), end="", file=sys.stderr)
    if options.dry_run:
        print("\n".join(shlex.join(run.command(sweep.folder / "runs" / run.key)) for run in todo))
        return 0
    print(f"{sweep.name}: {len(todo)} runs to do, {sweep.parallel} at a time, records in {sweep.folder}", flush=True)
    if changed := reread(sweep):
        print(f"{changed} records: metrics that the sweep names now were read from the runs' logs")
    failures = run_all(sweep, todo)
    tell(sweep)
    return 1 if failures else 0
