"""`subnetwork`: masks of entries to train alone, for `fit --model.subnetwork FILE`; and whether that is enough.

subnetwork changed BASE TUNED --out mask.safetensors            what a run changed
subnetwork fisher --config sgd.yaml --like mask.safetensors --out fisher.safetensors
subnetwork random --like mask.safetensors --out random.safetensors
subnetwork magnitude BASE --like mask.safetensors --out small.safetensors
subnetwork info mask.safetensors                                how many entries of what
subnetwork check --config sgd.yaml --out results/check          train in full, then the subnetwork alone; compare
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlvr_lightning.analysis import masks
from rlvr_lightning.analysis.command import percent, print_table
from rlvr_lightning.analysis.first_step import first_step
from rlvr_lightning.analysis.groups import by_group
from rlvr_lightning.analysis.opening import FORMS, open_weights
from rlvr_lightning.callbacks.change_counts import layer_of, matrix_of
from rlvr_lightning.cli import quieten
from rlvr_lightning.config_errors import report
from rlvr_lightning.optim.subnetwork import Subnetwork, load_subnetwork

VIEW = "bf16: differs once rounded to bfloat16 (the papers' checkpoints); stored: differs at all (default: bf16)"


def read(path: Path) -> Subnetwork:
    """A mask's file.

    Raises:
        ValueError: it is none.
    """
    found = load_subnetwork(path)
    if found is None:
        raise ValueError(f"{path} holds no mask; make one of a run or a delta with `subnetwork changed`")
    return found


def pairs(words: Sequence[str]) -> dict[str, str]:
    """Settings of `fit` as written behind a command.

    >>> pairs(["--trainer.max_steps", "3", "--model.group_size=4"])
    {'trainer.max_steps': '3', 'model.group_size': '4'}
    """
    flat = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(flat) % 2 or not all(name.startswith("--") for name in flat[::2]):
        raise ValueError(f"unknown arguments {' '.join(words)}; settings of `fit` are given as --model.group_size=4")
    return {name.removeprefix("--"): value for name, value in zip(flat[::2], flat[1::2], strict=True)}


def main(argv: list[str]) -> int:
    """Do it; returns the exit status."""
    options, rest = parser().parse_known_args(argv)
    quieten()
    try:
        if rest and options.action not in ("fisher", "check"):
            raise ValueError(f"unknown arguments {' '.join(rest)}; see --help")
        if options.action == "info":
            show(read(options.mask))
        elif options.action == "check":
            _check(options, pairs(rest))
        else:
            _make(options, rest)
    except Exception as error:
        status = report(error)
        if status is None:
            raise
        return status
    return 0


def _make(options: argparse.Namespace, settings: Sequence[str]) -> None:
    if not options.out.parent.is_dir() or options.out.is_dir():
        raise ValueError(f"--out: there is no folder {options.out.parent} for a file {options.out.name!r}")
    like = read(options.like) if getattr(options, "like", None) else None
    made: list[Subnetwork] = []
    if options.action == "changed":
        base = open_weights("BASE", options.base)
        made.append(masks.changed(base, open_weights("TUNED", options.tuned, base), options.view))
    elif options.action == "random":
        made.append(masks.at_random(read(options.like), options.seed))
    elif options.action == "magnitude":
        made.append(masks.by_magnitude(open_weights("BASE", options.base), like, options.density, options.largest))
    else:
        arguments = ["--config", options.config, *settings]
        first_step(arguments, lambda step: made.append(masks.fisher(step, like, options.density)))
    if not any(trained for trained, _ in made[0].counts().values()):
        raise ValueError(f"nothing differs ({made[0].made}): a mask of nothing would train nothing")
    made[0].save(options.out)
    show(made[0])
    print(f"wrote {options.out}: python -m rlvr_lightning fit --config NAME.yaml --model.subnetwork {options.out}")


def _check(options: argparse.Namespace, settings: Mapping[str, str]) -> None:
    from rlvr_lightning.analysis.subnetwork_check import check
    from rlvr_lightning.analysis.subnetwork_check import show as show_check

    options.out.mkdir(parents=True, exist_ok=True)
    show_check(check(options.config, settings, options.out, options.view, options.seed))
    print(f"wrote {options.out / 'check.json'}", file=sys.stderr)


def show(subnetwork: Subnetwork) -> None:
    """How much is trained, by kind of matrix and by layer."""
    counts = subnetwork.counts()
    print(subnetwork.made)
    for title, key in (("by matrix", matrix_of), ("by layer", layer_of)):
        groups = {"all": list(counts), **by_group(counts, key)}
        rows = []
        for group, names in groups.items():
            trained, entries = (sum(counts[name][k] for name in names) for k in (0, 1))
            rows.append([group, f"{trained:,}", f"{entries:,}", percent(trained / entries if entries else None)])
        print_table(f"trained entries, {title}", ["", "trained", "of", "%"], rows)


def parser() -> argparse.ArgumentParser:
    """Of all actions."""
    made = argparse.ArgumentParser(
        prog="python -m rlvr_lightning subnetwork",
        description=__doc__,
        epilog=f"BASE and TUNED are {FORMS}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = made.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=text, allow_abbrev=False)

    changed = action("changed", "the entries in which TUNED differs from BASE")
    changed.add_argument("base", metavar="BASE")
    changed.add_argument("tuned", metavar="TUNED")
    fisher = action("fisher", "the entries with the largest diagonal Fisher information on the first batch of a config")
    random = action("random", "entries drawn at random, as many of each tensor as another mask has")
    magnitude = action("magnitude", "the smallest weights of each tensor, or the largest")
    magnitude.add_argument("base", metavar="BASE")
    magnitude.add_argument("--largest", action="store_true", help="instead of the smallest")
    info = action("info", "how many entries a mask trains")
    info.add_argument("mask", type=Path, metavar="MASK")
    check = action("check", "train in full, then what changed alone, and compare")
    for one in (fisher, check):
        one.add_argument("--config", required=True, help="as for `fit`, with any of its settings after it")
    for one in (fisher, magnitude):
        how_many = one.add_mutually_exclusive_group(required=True)
        how_many.add_argument("--like", type=Path, metavar="MASK", help="as many entries of each tensor as this has")
        how_many.add_argument("--density", type=float, help="share of each tensor's entries")
    random.add_argument("--like", type=Path, metavar="MASK", required=True, help="as many of each tensor as this has")
    for one in (changed, check):
        one.add_argument("--view", choices=("bf16", "stored"), default="bf16", help=VIEW)
    for one in (random, check):
        one.add_argument("--seed", type=int, default=0, help="default: 0")
    for one in (changed, fisher, random, magnitude):
        one.add_argument("--out", type=Path, required=True, metavar="FILE", help="the mask")
    check.add_argument("--out", type=Path, required=True, metavar="DIR", help="for runs, records, mask, check.json")
    return made
