"""`python -m rlvr_lightning reward`: what the rewards of a config give for completions in a file, and why.

reward --config sgd.yaml --completions runs/sgd/version_0/completions.jsonl
reward --config my.yaml --completions answers.jsonl --out scored.jsonl --model.rewards.answer.extract stated

Each line of the file is a JSON object with `completion` (or `text`), and beside it, or in `record`, what the rewards
read, such as `answer`; `prompt`, `token_ids` and `truncated` are used where they are there. No model is loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rlvr_lightning.configuration import find_config
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.score import check_weights, judge
from rlvr_lightning.schema import Sample

TEXTS = ("completion", "text")


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m rlvr_lightning reward",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--config", required=True, help="a run's YAML, found as fit finds it; then overrides as for fit")
    made.add_argument("--completions", required=True, type=Path, help="JSONL, one completion a line")
    made.add_argument("--num", type=int, default=20, help="rows of the table, spread over the file; 0 prints none")
    made.add_argument("--out", type=Path, help="write every completion with its rewards to this JSONL file")
    return made


def rewards_of(config: Mapping[str, Any]) -> tuple[dict[str, Reward], dict[str, float]]:
    """The rewards of a run's config, and their weights.

    Raises:
        ValueError: it has none, or they cannot be made.
    """
    from jsonargparse import ArgumentError, ArgumentParser
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    module = ArgumentParser(exit_on_error=False)
    module.add_argument("--rewards", type=dict[str, Reward])
    module.add_argument("--weights", type=dict[str, float], default={})
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(dict(config)), resolve=True)
        model = resolved.get("model") or {}
        model = model.get("init_args", model)
        if not model.get("rewards"):
            raise ValueError("--config: it has no model.rewards")
        weights = model.get("reward_weights") or {}
        made = module.instantiate_classes(module.parse_object({"rewards": model["rewards"], "weights": weights}))
    except (ArgumentError, OmegaConfBaseException) as error:
        raise ValueError(f"--config: model.rewards: {' '.join(str(error).split())}") from None
    check_weights(made.rewards, made.weights)
    return made.rewards, made.weights


def read_samples(file: Path) -> list[Sample]:
    """The completions of a JSONL file.

    Raises:
        ValueError: no such file, or a line is not what it should be; names file and line.
    """
    if not file.is_file():
        raise ValueError(f"--completions: there is no file {str(file)!r}")
    with file.open("rb") as lines:
        samples = [sample_of(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not samples:
        raise ValueError(f"--completions: {file} is empty")
    return samples


def sample_of(line: bytes, where: str) -> Sample:
    """One line."""
    try:
        told = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None
    text = next((told[name] for name in TEXTS if name in told), None) if isinstance(told, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{where}: no text under 'completion'; each line must be a JSON object with one")
    inner = told.get("record") or {}
    if not isinstance(inner, dict):
        raise ValueError(f"{where}: 'record' must be an object, got {type(inner).__name__}")
    prompt, ids, cut = told.get("prompt", ""), told.get("token_ids") or [], bool(told.get("truncated"))
    return Sample(prompt=str(prompt), text=text, token_ids=list(ids), record=told | inner, truncated=cut)


def scored(
    rewards: Mapping[str, Reward], weights: Mapping[str, float], samples: Sequence[Sample]
) -> list[dict[str, Any]]:
    """Of each sample the total, the parts and why, and the errors of parts that failed and count 0."""
    parts, errors = {}, {}
    for name, reward in rewards.items():
        values, failures = judge(reward, samples)
        parts[name], errors[name] = values, {k: text.strip().splitlines()[-1] for k, text in failures.items()}
    rows = []
    for k, sample in enumerate(samples):
        mine = {name: values[k] for name, values in parts.items()}
        failed = {name: errors[name][k] for name in rewards if k in errors[name]}
        why = {name: failed.get(name) or _explained(reward, sample) for name, reward in rewards.items()}
        total = sum(weights.get(name, 1.0) * value for name, value in mine.items())
        rows.append({"reward": total, "parts": mine, "why": {n: t for n, t in why.items() if t}, "failed": failed})
    return rows


def _explained(reward: Reward, sample: Sample) -> str:
    try:
        return reward.explain(sample)
    except Exception as error:  # of user code
        return f"explain failed: {type(error).__name__}: {error}"


def show(rows: Sequence[Mapping[str, Any]], samples: Sequence[Sample], num: int) -> None:
    """A table of some completions, and means of all."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rlvr_lightning.callbacks.completions import printable

    console, names = Console(), list(rows[0]["parts"])
    table = Table(box=box.ASCII2, show_lines=True)
    for name in ("line", "reward", *names):
        table.add_column(printable(name, 20), justify="right")
    table.add_column("why", ratio=4, overflow="fold")
    table.add_column("completion", ratio=5, overflow="fold")
    stride = max(1, len(rows) // num) if num else 1
    for k in range(0, len(rows) if num else 0, stride)[:num]:
        values = [f"{rows[k]['reward']:.3g}", *(f"{rows[k]['parts'][name]:.3g}" for name in names)]
        why = "\n".join(f"{name}: {printable(text, 200)}" for name, text in rows[k]["why"].items())
        table.add_row(str(k + 1), *values, Text(why), Text(printable(samples[k].text, 200)))
    if num:
        console.print(table)
    for name in names:
        given = [float(row["parts"][name]) for row in rows]
        failed = sum(name in row["failed"] for row in rows)
        told = f"mean {mean(given):.3f}, at most {max(given):g}, at least {min(given):g}"
        console.print(f"{name}: {told}" + (f"; failed on {failed}, counted 0" if failed else ""), highlight=False)
    console.print(
        f"reward: mean {mean(float(row['reward']) for row in rows):.3f} of {len(rows)} completions", highlight=False
    )


def main(argv: list[str]) -> int:
    """Score, show, write; 2 after a mistake, of which it says one line."""
    from rlvr_lightning.profiling.run_config import read_config

    args, overrides = parser().parse_known_args(argv)
    try:
        rewards, weights = rewards_of(read_config(find_config(args.config), overrides))
        samples = read_samples(args.completions)
        rows = scored(rewards, weights, samples)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("w", encoding="utf-8") as lines:
                for row, sample in zip(rows, samples, strict=True):
                    lines.write(json.dumps({"prompt": sample.prompt, "completion": sample.text} | row) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(rows, samples, max(0, args.num))
    if args.out:
        print(f"wrote {args.out}")
    return 0
