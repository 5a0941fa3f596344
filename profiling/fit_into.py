"""Which settings make a run fit into a GPU: the largest batches, else what to change, as overrides to type."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlvr_lightning.profiling.predict import predict
from rlvr_lightning.profiling.settings import Run

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE = re.compile(r"([\d.]+)\s*([KMGT]?i?B)")
OURS = "--model.optimizer rlvr_lightning.optim.SGD --model.optimizer.lr {lr}"


def parse_size(text: str, option: str = "--fit-into") -> int:
    """Bytes of a size for people, given for an option.

    Raises:
        ValueError: it is none.

    >>> parse_size("24GiB"), parse_size("0.5 MB")
    (25769803776, 500000)
    """
    match = SIZE.fullmatch(text.strip())
    try:
        size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    except (ValueError, KeyError):
        size = 0
    if size < 1:
        raise ValueError(f"{option}: {text!r} is no size; give one such as 24GiB or 80GB")
    return size


@dataclass(frozen=True)
class Fit:
    """Settings that fit."""

    run: Run
    overrides: tuple[str, ...]
    """Besides those of the batch."""
    peak_bytes: int


def batches(run: Run) -> Iterator[int]:
    """Micro-batches that a group allows, largest first."""
    step, group = run.step_completions or run.micro_batch, run.group_size
    sizes = [size for size in range(group, step + 1, group) if step % size == 0]
    yield from reversed([*(d for d in range(1, group) if group % d == 0), *sizes])


def largest_batches(config: Mapping[str, Any], run: Run, limit_bytes: int) -> Run | None:
    """The run with the largest micro-batch, and the largest rollout batch, that fit; None if none do."""
    whole = replace(run, step_completions=run.step_completions or run.micro_batch)
    for micro in batches(whole):
        if whole.gradient_release and micro < (whole.step_completions or micro):
            return None  # released gradients take one micro-batch
        tried = replace(whole, micro_batch=micro)
        if predict(config, tried).phase_bytes("training") <= limit_bytes:
            break
    else:
        return None
    size = tried.completions
    while size >= 1:
        tried = replace(tried, rollout_batch=size)
        if predict(config, tried).phase_bytes("rollout") <= limit_bytes:
            return tried
        size //= 2
    return None


Change = tuple[str, Callable[[Run], Run | None]]


def _more_gpus(run: Run) -> Run | None:
    """Twice the processes, with half as many completions in each."""
    step = run.step_completions or run.micro_batch
    if step % (2 * run.group_size):
        return None
    half = step // 2
    micro = next(m for m in batches(replace(run, step_completions=half)) if m <= run.micro_batch)
    return replace(run, shard=run.shard * 2, step_completions=half, micro_batch=micro)


def changes(run: Run) -> Iterator[Change]:
    """What may be changed, in the order of how little it changes; each on top of those before."""
    if not run.activation_checkpointing:
        text = "--model.activation_checkpointing true"
        yield text, lambda r: replace(r, activation_checkpointing=True)
    if run.shard > 1 and run.rollout == "once":
        yield "--trainer.strategy.rollout layers", lambda r: replace(r, rollout="layers")
    if run.reference == "copy" and run.dtype == "bfloat16" and run.optimizer.startswith("sgd_"):
        yield "--model.reference delta", lambda r: replace(r, reference="delta")
    if run.optimizer not in ("sgd", "sgd_split", "sgd_bf16", "sgd_stochastic") and not run.lora_rank:
        text = "--model.optimizer torch.optim.SGD --model.optimizer.lr LR"
        yield text, lambda r: replace(r, optimizer="sgd")
    if not run.optimizer.startswith("sgd_") and not run.autocast and not run.lora_rank:
        text = f"{OURS.format(lr='LR')} --model.optimizer.master split --model.dtype bfloat16"
        yield text, lambda r: replace(r, optimizer="sgd_split", dtype="bfloat16")
    if not run.gradient_release and not run.autocast and not run.lora_rank:
        text = "--model.gradient_release.clip two_pass"
        yield text, _release
    for _ in range(9):
        yield "", _more_gpus


def _release(run: Run) -> Run | None:
    if not run.optimizer.startswith("sgd_"):
        return None
    return replace(run, gradient_release=True, micro_batch=run.step_completions or run.micro_batch)


def fit(config: Mapping[str, Any], run: Run, limit_bytes: int) -> Fit | None:
    """The least change that makes a run fit, with the largest batches then; None if nothing tried does."""
    made: list[str] = []
    current = run
    for text, change in [("", lambda r: r), *changes(run)]:
        after = change(current)
        if after is None:
            continue
        found = largest_batches(config, after, limit_bytes)
        if after.gradient_release and not current.gradient_release and found is None:
            continue  # needs a whole step at once, which more processes may not
        current = after
        if text.startswith("--model.optimizer"):  # instead of the one before
            made = [had for had in made if not had.startswith("--model.optimizer")]
        made += [text] if text else []
        if found is not None:
            more = [f"--trainer.devices {found.processes}"] if found.processes > run.processes else []
            if more and run.processes == 1:
                more.append("--trainer.strategy rlvr_lightning.strategy.Sharded")
            return Fit(found, (*made, *more), predict(config, found).peak_bytes)
    return None


def sentence(found: Fit | None, run: Run, limit_bytes: int) -> list[str]:
    """What to tell, line by line."""
    limit = f"{limit_bytes / 2**30:.2f} GiB"
    if found is None:
        return [f"does not fit into {limit}, nor with any of the settings that were tried, up to 512 times the GPUs"]
    batch = f"--model.batching.micro_batch {found.run.micro_batch} "
    batch += f"--model.batching.rollout_batch {found.run.rollout_batch}"
    what = "fits" if not found.overrides else "fits if these are changed"
    lines = [f"{what}: {found.peak_bytes / 2**30:.2f} of {limit}, with the largest batches that do", f"  {batch}"]
    lines += [f"  {text}" for text in found.overrides]
    if any("LR" in text for text in found.overrides):
        lines.append("  LR: SGD takes a rate of its own; the one of AdamW would make it stand still")
    return lines
