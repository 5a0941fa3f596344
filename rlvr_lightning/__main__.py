"""The command line: a table of commands, each of which imports only what it needs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

COMMANDS = {
    "fit": ("rlvr_lightning.cli", "train: --config NAME.yaml, then any overrides"),
    "validate": ("rlvr_lightning.cli", "measure a model (or --ckpt_path) on the held-out problems of a config"),
    "test": ("rlvr_lightning.cli", "the same on its test problems"),
    "compare": ("rlvr_lightning.compare", "whether a model answers better than another, or by chance: RUN_A RUN_B"),
    "sweep": (
        "rlvr_lightning.study.sweep",
        "run a config over learning rates, seeds or any other setting; keeps records",
    ),
    "profile": (
        "rlvr_lightning.profiling.command",
        "how much memory a run will take: a table, --config NAME or --model NAME",
    ),
    "reward": ("rlvr_lightning.reward_command", "what a config's rewards give for a file of completions, and why"),
    "samples": (
        "rlvr_lightning.samples",
        "a config's policy answers its problems: pairs, labels or demonstrations: --out FILE.jsonl --kind pairs",
    ),
    "plots": ("rlvr_lightning.study.plots", "curves and tables from a sweep's records"),
    "report": (
        "rlvr_lightning.report.command",
        "what runs did, on one page or as Markdown: RUN [RUN...] --out report.html",
    ),
    "delta": ("rlvr_lightning.delta_command", "the difference of two models as a small file: diff, apply, info"),
    "sparsity": ("rlvr_lightning.analysis.sparsity_command", "how many weights training changed: BASE TUNED"),
    "rank": ("rlvr_lightning.analysis.rank_command", "of what rank the change of each matrix is: BASE TUNED"),
    "spectrum": (
        "rlvr_lightning.analysis.spectrum_command",
        "how far the spectra moved, and which entries changed: BASE TUNED",
    ),
    "overlap": ("rlvr_lightning.analysis.overlap_command", "whether runs changed the same weights: A B --base BASE"),
    "dissect": (
        "rlvr_lightning.analysis.dissect_command",
        "all four of every run of a sweep, as records and tables: SWEEP --base BASE",
    ),
    "subnetwork": (
        "rlvr_lightning.analysis.subnetwork_command",
        "masks of entries to train alone, and whether that is enough: changed, fisher, random, magnitude, info, check",
    ),
    "curvature": (
        "rlvr_lightning.analysis.curvature_command",
        "the largest eigenvalues of the Hessian of a config's loss at the start",
    ),
    "export": ("rlvr_lightning.export", "a kept step of a run as a model's folder: RUN_OR_CHECKPOINT --out DIR"),
    "replay": ("rlvr_lightning.replay", "which completions of a batch make the gradient not finite: FOLDER"),
    "recipes": ("rlvr_lightning.data.recipes", "list the data sets known by name: columns, prompt, reward"),
    "configs": ("rlvr_lightning.configuration", "list the packaged configs"),
}


def usage() -> str:
    """The text of --help."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"""usage: python -m rlvr_lightning COMMAND [--config NAME.yaml] [options]

Reinforcement learning with verifiable rewards for language models, at SGD's memory.

commands:
{rows}

  python -m rlvr_lightning fit --config sgd.yaml                        the first run: a tiny model, minutes on a laptop
  python -m rlvr_lightning fit --config sgd.yaml --model.group_size 16  override a setting
  python -m rlvr_lightning fit --config sgd.yaml --print_config         show every setting of a run
  python -m rlvr_lightning fit --config fsdp.yaml --dry_run             what each process would hold, and do first
  python -m rlvr_lightning fit --help                                   explain every setting

A config is looked for in the working directory first, then among the packaged ones."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a page of stack for a connection that another has closed
    command = argv[0]
    if command == "--version":
        from rlvr_lightning import __version__

        print(__version__)
        return 0
    if command not in COMMANDS:
        print(f"error: unknown command {command!r}; one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    run: Callable[[list[str]], int | None] = importlib.import_module(COMMANDS[command][0]).main
    passed_on = argv if COMMANDS[command][0] == "rlvr_lightning.cli" else argv[1:]
    try:
        return run(passed_on) or 0
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
