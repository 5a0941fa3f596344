"""`python -m rlvr_lightning export RUN_OR_CHECKPOINT --out DIR`: a kept step as an ordinary model folder.

RUN is a run's folder (`runs/NAME/version_K`), of which any kept step can be had (`--step`, the newest by default), or
one checkpoint, written by `DeltaCheckpointIO` or by Lightning itself. DIR receives configuration, tokenizer and weights
(safetensors, in the dtype they were trained in) and is read by transformers and vLLM. Adapters of a LoRA run are merged
into the weights, which rounds in their dtype. Memory: the model once, and one of its tensors.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlvr_lightning.checkpoint.file import metadata_of
from rlvr_lightning.checkpoint.restore import restore_
from rlvr_lightning.checkpoint.state import Reader
from rlvr_lightning.delta.digest import digest_state
from rlvr_lightning.delta.tensor import describe
from rlvr_lightning.policy import LoRA, Policy, load_model, load_tokenizer

SHARD = "5GB"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Kept:
    """A checkpoint of a run."""

    step: int
    path: Path
    delta: bool
    """Written by `DeltaCheckpointIO`."""


def kept_steps(source: Path) -> list[Kept]:
    """The checkpoints of a run, or the one that a file is; oldest step first.

    Raises:
        ValueError: there is none.
    """
    if not source.exists():
        raise ValueError(f"export: there is no {source}; give a run's folder or a checkpoint")
    paths = [source] if source.is_file() else sorted(source.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    kept = [Kept(step, path, ours) for path in paths for step, ours in [_step(path)]]
    if not kept:
        raise ValueError(f"export: {source} has no checkpoints (*.ckpt); give a run's folder or a checkpoint")
    return sorted(kept, key=lambda one: one.step)


def _step(path: Path) -> tuple[int, bool]:
    metadata = metadata_of(path)
    if metadata is not None:
        return int(metadata.get("about", {}).get("step") or 0), True
    named = re.search(r"step=(\d+)", path.name)
    return int(named[1]) if named else int(_load_ordinary(path).get("global_step", 0)), False


def choose(kept: Sequence[Kept], step: int | None) -> Kept:
    """The checkpoint of a step; the newest, if none is asked for."""
    for one in reversed(kept):
        if step in (None, one.step):
            return one
    steps = ", ".join(str(step) for step in sorted({one.step for one in kept}))
    raise ValueError(f"export: step {step} was not kept; these were: {steps}")


def _load_ordinary(path: Path) -> dict[str, Any]:
    """Lightning's own checkpoint; its tensors stay on disk until they are used."""
    try:
        return cast(dict[str, Any], torch.load(path, mmap=True, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises half a dozen kinds
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"export: {path} cannot be read as a checkpoint: {reason}") from None


def about_run(path: Path) -> dict[str, Any]:
    """`model`, `dtype` and `lora` from the `config.yaml` of the run that a checkpoint belongs to."""
    import yaml

    for folder in list(path.resolve().parents)[:3]:
        if (folder / "config.yaml").is_file():
            settings = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]
            return {name: settings.get(name) for name in ("model", "dtype", "lora")}
    raise ValueError(f"export: no config.yaml beside {path} says which model it is of; give --model")


def build(about: dict[str, Any], from_scratch: bool) -> nn.Module:
    """The model as a run starts with it, under the names that checkpoints give its tensors."""
    try:
        lora = LoRA(**about["lora"]) if about.get("lora") else None
        name, dtype = str(about["model"]), DTYPES[about.get("dtype") or "float32"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"export: what the checkpoint says of its model is malformed: {error}") from None
    model = load_model(name, dtype, from_scratch)
    holder = nn.Module()
    holder.policy = Policy(lora.adapt(model) if lora else model)
    return holder


def restored(kept: Kept, model: str | None = None) -> tuple[Policy, str]:
    """The policy of a checkpoint, and the name of the model it started from.

    Args:
        kept: the checkpoint.
        model: the model it started from, where that is not to be found under the recorded name.

    Raises:
        ValueError: the checkpoint is damaged, or does not fit the model.
    """
    reader = Reader(kept.path) if kept.delta else None
    about = reader.about if reader is not None and "model" in reader.about else about_run(kept.path)
    about = about | ({"model": model} if model else {})
    if reader is not None:
        holder = build(about, from_scratch=not about.get("base_digest"))
        restore_(holder, reader)
    else:
        weights = _load_ordinary(kept.path)["state_dict"]
        about["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        holder = build(about, from_scratch=not about.get("lora"))
        overwrite_(holder, weights, kept.path)
    return cast(Policy, holder.policy), about["model"]


def overwrite_(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Give a module all the weights of an ordinary checkpoint."""
    state = module.state_dict()
    for name in sorted({*state} ^ {*weights}):
        raise ValueError(f"export: {name!r} is not in both {path} and the model; give the right --model")
    for name, tensor in weights.items():
        if (tensor.shape, tensor.dtype) != (state[name].shape, state[name].dtype):
            raise ValueError(f"export: {name!r} is {describe(tensor)} in {path}, but {describe(state[name])} here")
        state[name].copy_(tensor)


def write_folder(policy: Policy, tokenizer: Any, out: Path) -> str:
    """Write a model as a transformers folder, all or nothing; returns the digest of its weights."""
    merge = getattr(policy.model, "merge_and_unload", None)
    model = cast(Any, merge() if callable(merge) else policy.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        model.save_pretrained(temporary, max_shard_size=SHARD)
        tokenizer.save_pretrained(temporary)
        out.mkdir(exist_ok=True)
        for stale in out.glob("*.safetensors*"):  # of a model written there before, with --force
            stale.unlink()
        mask = os.umask(0)
        os.umask(mask)
        for file in temporary.iterdir():
            file.chmod(0o666 & ~mask)  # weights come out private
            os.replace(file, out / file.name)
    except OSError as error:
        raise ValueError(
            f"export: cannot write {out}: {error.strerror or error}; make room or choose another"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return digest_state(model.state_dict())


def export(source: Path, out: Path, step: int | None = None, model: str | None = None, force: bool = False) -> str:
    """Write a kept step of a run as a model's folder; returns a line that says so.

    Raises:
        ValueError: there is no such step, it is damaged, its model is not at hand, or the folder is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise ValueError(f"export: {out} exists and is not empty; choose another, or --force to overwrite it")
    kept = choose(kept_steps(source), step)
    policy, name = restored(kept, model)
    merged = ", adapters merged" if hasattr(policy.model, "merge_and_unload") else ""
    digest = write_folder(policy, load_tokenizer(name), out)
    return f"exported step {kept.step} ({kept.path.name}{merged}) to {out}, sha256 of the weights {digest}"


def main(argv: list[str]) -> int:
    """Export; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rlvr_lightning export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--step", type=int, help="optimizer steps done; the newest kept one by default")
    parser.add_argument("--model", help="what the run started from, if it has moved since; checked by its digest")
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    options = parser.parse_args(argv)
    try:
        print(export(options.source, options.out, options.step, options.model, options.force))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
