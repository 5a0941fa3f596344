"""`fit`, `validate` and `test`: LightningCLI with omegaconf interpolation, our default callbacks and run folder."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jsonargparse import ActionYesNo, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from rlvr_lightning import callbacks
from rlvr_lightning.checkpoint import check_readable
from rlvr_lightning.checkpoint.last import resolve
from rlvr_lightning.config_errors import Parser, report
from rlvr_lightning.configuration import config_names, resolve_config_arguments
from rlvr_lightning.evaluation import Evaluated
from rlvr_lightning.policy_module import PolicyModule
from rlvr_lightning.profiling.timeline import MemoryTimeline, parse_steps
from rlvr_lightning.strategy import Sharded

RUNS = "runs"


def main(argv: list[str]) -> int:
    """Run a trainer command; returns the exit status.

    Args:
        argv: the command (`fit`, `validate`, `test`) and its options.
    """
    return run(argv)


def run(argv: list[str], kind: type[RLVRCLI] | None = None) -> int:
    """The same, by a CLI of one's own."""
    quieten()
    try:
        argv = resolve_config_arguments(argv)
        cli_class(argv[0], "-".join(config_names(argv)) or "run", kind)(argv)
    except Exception as error:
        status = report(error)
        if status is None:
            raise
        return status
    return 0


def cli_class(command: str, name: str, kind: type[RLVRCLI] | None = None) -> type[RLVRCLI]:
    """The CLI for one command: parsers of the others are not built, which halves the start-up."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # interpolation across files and overrides

    class OneCommand(kind or RLVRCLI):  # type: ignore[misc]
        run_name = name

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {command: LightningCLI.subcommands()[command]}

    return OneCommand


class RLVRCLI(LightningCLI):
    """LightningCLI with this project's defaults; see `cli_class`."""

    run_name = "run"

    def __init__(self, argv: list[str]) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,  # the optimizer is an argument of the module
            load_from_checkpoint_support=False,
            save_config_callback=SaveConfigCallback,
            trainer_defaults={
                "accelerator": "auto",
                "devices": 1,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "use_distributed_sampler": False,  # prompts are split by the module
            },
            parser_class=Parser,
            parser_kwargs={"parser_mode": "omegaconf+"},
            args=argv,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callbacks that are on by default, each with its settings in the YAML."""
        for key, callback in (
            ("gpu_memory", callbacks.GPUMemory),
            ("optimizer_state", callbacks.OptimizerState),
            ("update_sparsity", callbacks.UpdateSparsity),
            ("completions", callbacks.CompletionTable),
            ("interrupt", callbacks.SaveOnInterrupt),
            ("checkpoint", ModelCheckpoint),
        ):
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults({"checkpoint.save_last": True})
        parser.add_argument(
            "--validate_first",
            type=bool,
            default=True,
            help="Measure before the first step, so that curves have a start.",
        )
        parser.add_argument(
            "--dry_run",
            action=ActionYesNo(no_prefix="no_"),
            nargs="?",
            default=False,
            help="Say what each process would hold, the layout and the first prompts, and stop; needs no GPU.",
        )
        parser.add_argument(
            "--profile_memory",
            type=str,
            nargs="?",
            const="2",
            default=None,
            metavar="STEPS",
            help="Show who holds what over the allocations of these steps, such as 2 (without a value) or 1,5.",
        )

    def _parse_ckpt_path(self) -> None:
        """Lightning would load the whole checkpoint here, with torch, for settings that ours do not hold."""

    def after_instantiate_classes(self) -> None:
        """Find the last checkpoint, if asked to; one that cannot be read is said before anything is loaded."""
        path = resolve(self._get(self.config, "ckpt_path"), self.trainer, self.subcommand)
        for config in (self.config, self.config_init):
            config[self.subcommand]["ckpt_path"] = path
        check_readable(path, self.trainer)
        if isinstance(self.trainer.strategy, Sharded):
            self.trainer.strategy.begins = "from a checkpoint" if path else "afresh"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with a bar, logging to `runs/NAME/version_K` unless the YAML names loggers."""
        config = self._get(self.config_init, "trainer")
        if self._get(self.config_init, "dry_run"):
            return super().instantiate_trainer(**planned(config))
        if config.get("logger") in (None, True):
            kwargs["logger"] = default_loggers(self.run_name)
        more: list[Callback] = []
        if config.get("enable_progress_bar") is not False:
            more.append(callbacks.ShortProgressBar())
        if steps := self._get(self.config_init, "profile_memory"):
            more.append(MemoryTimeline(parse_steps(steps)))
        try:
            return super().instantiate_trainer(**kwargs, callbacks=[*(config.get("callbacks") or []), *more])
        except RuntimeError as error:
            if twice := re.search("more than one stateful callback of type `(.+?)`", str(error)):
                keys = {"UpdateSparsity": "; the one that every run has is set by `update_sparsity`"}
                raise ValueError(f"trainer.callbacks: {twice[1]} is there twice{keys.get(twice[1], '')}") from None
            raise

    def before_fit(self) -> None:
        """The measure that the curve starts from."""
        if self._get(self.config, "dry_run"):
            self.describe()
            raise SystemExit(0)
        if isinstance(self.model, PolicyModule):
            self.model.check(self.trainer, self.datamodule)  # rather than after the measure
        self.started_s = time.monotonic()
        self.at_start: dict[str, float] = {}
        resumes = self._get(self.config, "ckpt_path")
        if self._get(self.config, "validate_first") and not resumes and self.trainer.limit_val_batches:
            for metrics in self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False):
                self.at_start |= metrics

    def describe(self) -> None:
        """What a dry run says."""
        from rlvr_lightning.dry_run import dry_run

        if self.trainer.is_global_zero:
            device = device_of(self._get(self.config, "trainer")["accelerator"])
            print(dry_run(self.model, self.datamodule, self.trainer, device))

    def after_fit(self) -> None:
        """What the run did, in a few lines."""
        text = summary(self.at_start, self.trainer, time.monotonic() - self.started_s)  # asks all ranks for the folder
        if self.trainer.is_global_zero:
            print(text)

    def validate(self, **kwargs: Any) -> None:
        """Measure on the validation problems."""
        self._measure(self.trainer.validate, kwargs)

    def test(self, **kwargs: Any) -> None:
        """Measure on the test problems."""
        self._measure(self.trainer.test, kwargs)

    def _measure(self, run: Callable[..., Any], settings: dict[str, Any]) -> None:
        """Problem by problem where the module can, with our table instead of Lightning's."""
        if not isinstance(self.model, Evaluated):
            run(**settings)
            return
        self.model.keeps_problems = True
        try:
            run(**settings | {"verbose": False})
        except SystemExit:  # Lightning's of Ctrl-C, ours of SIGTERM
            told = self.model.interrupted()
            if told and self.trainer.is_global_zero:
                print(f"\n{told}", file=sys.stderr, flush=True)
            raise
        if self.trainer.is_global_zero:
            print(self.model.report())


def device_of(accelerator: str) -> torch.device:
    """The kind of device that a run will use; `auto` is what this machine has."""
    gpus = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if gpus else "cpu")


def planned(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a trainer that stands for the processes of another, wherever those may run."""
    devices = config["devices"]
    if isinstance(devices, list):
        devices = len(devices)
    elif devices in ("auto", -1, "-1"):
        devices = max(1, torch.cuda.device_count())
    return {"accelerator": "cpu", "devices": int(devices), "logger": False}


def summary(at_start: Mapping[str, float], trainer: Trainer, seconds: float) -> str:
    """Validation metrics at the start and the end of a run, and where its files are."""
    at_end = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    width = max(map(len, at_end), default=0)
    lines = [f"{'':<{width}}  start    end"] if at_end else []
    for name, end in at_end.items():
        start = f"{at_start[name]:5.3f}" if name in at_start else "    -"  # resumed, or not measured
        lines.append(f"{name:<{width}}  {start}  {end:5.3f}")
    return "\n".join(
        [*lines, f"{trainer.global_step} optimizer steps in {seconds:.0f} s; run folder: {trainer.log_dir}"]
    )


def default_loggers(name: str) -> list[Logger]:
    """CSV always, TensorBoard when installed, in one run folder."""
    csv = CSVLogger(RUNS, name=name, flush_logs_every_n_steps=1)
    if importlib.util.find_spec("tensorboard") is None:
        return [csv]
    return [csv, TensorBoardLogger(RUNS, name=name, version=csv.version)]


def quieten() -> None:
    """Silence what tells a user of this program nothing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for text in (
        ".*does not have many workers.*",
        ".*LightningCLI's args parameter is intended.*",  # sys.argv is left for processes that Lightning starts
        ".*GPU available but not used.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*You defined a `validation_step` but have no `val_dataloader`.*",
        ".*The dirpath has changed from.*",  # each run has a folder of its own
        ".*when logging on epoch level in distributed setting.*",  # what is logged is of all ranks already
    ):
        warnings.filterwarnings("ignore", text)
    for name in ("pytorch.utilities.rank_zero", "pytorch.trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.{name}").addFilter(_is_news)
    for name in ("lightning.fabric.utilities.distributed", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.accelerators.cuda").setLevel(logging.WARNING)


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not message.startswith(
        ("GPU available", "TPU available", "HPU available", "Tip:", "\U0001f4a1", "-----", "`weights_only`")
    )
