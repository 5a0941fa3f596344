"""`python -m rlvr_lightning profile`: how much memory a run will take, before a GPU is rented. Loads no torch.

profile                                        SGD against AdamW, 0.5 B to 671 B
profile --config sgd.yaml                      this run by owner; overrides as for fit
profile --model qwen3-8b --optimizer adamw     a model without a config; a packaged name or a folder
profile --config sgd.yaml --compare sgd,adamw  optimizers or configs beside each other
profile --config sgd.yaml --fit-into 24GiB     the largest batches, or what to change
profile --config sgd.yaml --simulate           its own step traced without weights or a GPU, beside the prediction
profile --config sgd.yaml --measure            two real steps of it here, beside the prediction
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlvr_lightning.configuration import find_config
from rlvr_lightning.profiling.find_model import find_model
from rlvr_lightning.profiling.fit_into import fit, parse_size, sentence
from rlvr_lightning.profiling.optimizer_bytes import RULES
from rlvr_lightning.profiling.overview import compare, detail, overview
from rlvr_lightning.profiling.predict import predict
from rlvr_lightning.profiling.run_config import model_of, read_config, run_of
from rlvr_lightning.profiling.settings import Run
from rlvr_lightning.profiling.table import FORMATS, Table, render

Found = tuple[str, Mapping[str, Any], Run]
PLAIN: dict[str, Any] = {"micro_batch": 8, "rollout_batch": 64, "prompt_tokens": 1024, "max_tokens": 1024}
"""Of a model without a config, as in the overview."""


class Parser(argparse.ArgumentParser):
    """One line for a mistake."""

    def error(self, message: str) -> Any:
        """Leave with status 2."""
        self.exit(2, f"error: profile: {message}\n")


def parser() -> Parser:
    """The options."""
    made = Parser(prog="python -m rlvr_lightning profile", description=__doc__, allow_abbrev=False)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--config", help="a run's YAML, found as fit finds it")
    made.add_argument("--model", help="a packaged name, a hub name that ends in one, or a folder with a config.json")
    made.add_argument("--optimizer", help=f"instead of the config's: {', '.join(RULES)}")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], help="of stored weights")
    made.add_argument("--gpus", type=int, help="processes that share the model")
    made.add_argument("--prompt-tokens", type=int, help="of the longest prompt")
    made.add_argument(
        "--compare", help="optimizers or configs, with commas between them; savings are against the first"
    )
    made.add_argument("--fit-into", metavar="SIZE", help="of a GPU, such as 24GiB")
    made.add_argument("--simulate", action="store_true", help="trace its step without numbers: a minute or two for 8 B")
    made.add_argument("--measure", action="store_true", help="run two steps of the config, as large as they can be")
    made.add_argument("--limit", metavar="SIZE", help="of --measure: memory that the run may take, libraries apart")
    made.add_argument("--format", default="console", choices=FORMATS)
    made.add_argument("--out", type=Path, help="write to this file, not the console; of --measure, its record as JSON")
    return made


def chosen(args: argparse.Namespace, overrides: Sequence[str]) -> tuple[Found, list[str]]:
    """The run that the options mean, and what had to be assumed."""
    remarks: list[str] = []
    if args.config:
        config = read_config(find_config(args.config), overrides)
        run, remarks = run_of(config, args.gpus, args.prompt_tokens)
        name = args.model or model_of(config)
    else:
        name = args.model
        run = Run(**PLAIN, activation_checkpointing=True, shard=args.gpus or 1, rollout="layers")
        run = replace(run, prompt_tokens=args.prompt_tokens or run.prompt_tokens)
        remarks.append("no config: a micro-batch of 8 completions of 1,024 tokens, rollouts of 64, layers recomputed")
    shape, remark = find_model(name)
    return (name, shape, with_optimizer(run, args.optimizer, args.dtype)), [*remarks, *([remark] if remark else [])]


def with_optimizer(run: Run, optimizer: str | None, dtype: str | None) -> Run:
    """A run with another optimizer: ours keep bf16 weights, unless a dtype is named; others have none to release."""
    if optimizer is None:
        return replace(run, dtype=dtype or run.dtype)
    if optimizer not in RULES:
        raise ValueError(f"--optimizer: {optimizer!r} is not known here; one of {', '.join(RULES)}")
    ours = optimizer.startswith("sgd_") or optimizer == "flashadamw"
    released = run.gradient_release and optimizer.startswith("sgd_")
    stored = dtype or ("bfloat16" if ours else run.dtype)
    return replace(run, optimizer=optimizer, dtype=stored, gradient_release=released, low_on_host=False)


def compared(names: str, base: Found | None, args: argparse.Namespace) -> list[Table]:
    """Tables of `--compare`."""
    found: list[Found] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name.endswith((".yaml", ".yml")):
            config = read_config(find_config(name))
            run = run_of(config, args.gpus, args.prompt_tokens)[0]
            found.append((name, find_model(args.model or model_of(config))[0], run))
        elif base is None:
            raise ValueError(f"--compare: {name!r} is an optimizer, and of what model? Add --config or --model")
        else:
            found.append((name, base[1], with_optimizer(base[2], name, args.dtype)))
    if len(found) < 2:
        raise ValueError("--compare: give two names or more, with commas between them")
    return compare(found)


def measured(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `--measure`."""
    from rlvr_lightning.profiling import measure

    for name in ("model", "optimizer", "dtype", "gpus", "prompt_tokens", "compare", "fit_into"):
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: --measure runs a config as it is; set it there, or as an override of fit")
    if not args.config:
        raise ValueError("--measure runs a config: add --config")
    if args.out and args.out.suffix != ".json":
        raise ValueError(f"--out: --measure writes a JSON record, so the name must end in .json, got {args.out}")
    limit_bytes = parse_size(args.limit, "--limit") if args.limit else 0
    return measure.main(args.config, overrides, limit_bytes, args.simulate, args.out, args.format)


def simulated(shape: Mapping[str, Any], run: Run) -> list[Table]:
    """Prediction and simulation beside each other: imports torch."""
    from rlvr_lightning.profiling.measure import compared
    from rlvr_lightning.profiling.simulate import simulate

    return compared({"predicted": predict(shape, run), "simulated": simulate(shape, run)})


def tables(args: argparse.Namespace, overrides: Sequence[str]) -> list[Table]:
    """What the options ask for."""
    if args.gpus is not None and args.gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {args.gpus}")
    if args.prompt_tokens is not None and args.prompt_tokens < 1:
        raise ValueError(f"--prompt-tokens must be at least 1, got {args.prompt_tokens}")
    if overrides and not args.config:
        raise ValueError(f"{overrides[0]}: settings of a run need --config; see --help")
    limit_bytes = parse_size(args.fit_into) if args.fit_into else 0
    one = bool(args.config or args.model)
    if not one and not args.compare:
        if limit_bytes or args.optimizer or args.dtype or args.gpus or args.simulate:
            raise ValueError("these options are of one run: add --config or --model")
        return overview()
    base, remarks = chosen(args, overrides) if one else (None, [])
    if args.compare:
        if args.simulate:
            raise ValueError("--simulate is of one run; leave out --compare, or call it for each")
        return compared(args.compare, base, args)
    assert base is not None
    name, shape, run = base
    if limit_bytes:
        found = fit(shape, run, limit_bytes)
        remarks += sentence(found, run, limit_bytes)
        run = found.run if found else run
    return [*detail(name, shape, run, remarks), *(simulated(shape, run) if args.simulate else [])]


def main(argv: list[str]) -> int:
    """Print or write the tables; 2 after a mistake, of which it says one line."""
    args, overrides = parser().parse_known_args(argv)
    try:
        if args.limit and not args.measure:
            raise ValueError("--limit is of --measure; to find what fits without a run: --fit-into")
        if args.measure:
            return measured(args, overrides)
        text = render(tables(args, overrides), args.format)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(text)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --out: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}" if args.out else text, end="\n" if args.out else "")
    return 0
