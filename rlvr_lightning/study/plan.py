"""What a sweep is: its file, its runs, and the one that `--lr` asks for. See `sweep.py`."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from rlvr_lightning.configuration import find_config
from rlvr_lightning.study.rates import parse_rates

SEED = "seed_everything"
LR = "model.init_args.optimizer.init_args.lr"


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
        self._check_names()

    def _check_names(self) -> None:
        keys = [run.key for run in self.runs()]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"sweep: several runs would be named {sorted(twice)[0]}")

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
    """A sweep from its YAML file, whose numbers are read as `fit` reads them: 1e-3 is one.

    Raises:
        ValueError: it is no YAML; a field is missing, unknown or impossible; two runs would share a name; a config is
            nowhere.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OSError) as error:  # OSError: a number, say, instead of a mapping
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping with name, configs, metrics")
    known = {f.name for f in fields(Sweep)}
    if unknown := set(content) - known:
        raise ValueError(f"{path}: unknown {sorted(unknown)}; fields are {sorted(known)}")
    if missing := {"name", "configs", "metrics"} - set(content):
        raise ValueError(f"{path}: {sorted(missing)} missing")
    sweep = Sweep(**cast(dict[str, Any], content))
    for config in itertools.chain(*sweep.configs.values()):
        find_config(config)
    return sweep


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
