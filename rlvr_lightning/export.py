"""`python -m rlvr_lightning export RUN_OR_CHECKPOINT --out DIR`: a kept step as an ordinary model folder.

RUN is a run's folder (`runs/NAME/version_K`), of which any kept step can be had (`--step`, the newest by default), or
one checkpoint of any kind: of one process or of many, whole or a delta, a file or a folder. DIR receives configuration,
tokenizer and weights (safetensors, in the dtype they were trained in) and is read by transformers and vLLM. Adapters of
a LoRA run are merged into the weights, which rounds in their dtype. Memory: the model once, and one of its tensors.
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
from torch import nn

from rlvr_lightning.checkpoint.file import metadata_of
from rlvr_lightning.checkpoint.folder import MANIFEST, read_manifest
from rlvr_lightning.checkpoint.io import is_ours, read, read_file
from rlvr_lightning.checkpoint.restore import restore_
from rlvr_lightning.checkpoint.stored import leave_out_beside
from rlvr_lightning.delta.digest import digest_state
from rlvr_lightning.policy import LoRA, Policy, load_model, load_tokenizer

SHARD = "5GB"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Kept:
    """A checkpoint of a run."""

    step: int
    path: Path


def kept_steps(source: Path) -> list[Kept]:
    """The checkpoints of a run, or the one that a path is; oldest step first. Unreadable ones are named on stderr.

    Raises:
        ValueError: there is none.
    """
    if not source.exists():
        raise ValueError(f"export: there is no {source}; give a run's folder or a checkpoint")
    if source.is_file() or (source / MANIFEST).is_file():
        return [Kept(_step(source), source)]
    kept = []
    for path in sorted(source.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime):
        try:
            kept.append(Kept(_step(path), path))
        except ValueError as error:
            print(f"skipped: {error}", file=sys.stderr)
    if not kept:
        raise ValueError(f"export: {source} has no checkpoints (*.ckpt); give a run's folder or a checkpoint")
    return sorted(kept, key=lambda one: one.step)


def _step(path: Path) -> int:
    known = read_manifest(path) if path.is_dir() else metadata_of(path)
    if known is not None:
        return int(known.get("about", {}).get("step") or 0)
    named = re.search(r"step=(\d+)", path.name)
    return int(named[1]) if named else int(read_file(path).get("global_step", 0))


def choose(kept: Sequence[Kept], step: int | None) -> Kept:
    """The checkpoint of a step; the newest, if none is asked for."""
    for one in reversed(kept):
        if step in (None, one.step):
            return one
    steps = ", ".join(str(step) for step in sorted({one.step for one in kept}))
    raise ValueError(f"export: step {step} was not kept; these were: {steps}")


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
    checkpoint = read(kept.path) if is_ours(kept.path) else read_file(kept.path)
    reader = checkpoint["state_dict"].reader
    about = reader.about or checkpoint.get("about") or {}
    if "model" not in about:
        first = reader.specs[f"weights/{reader.weights[0]}"]
        about = about_run(kept.path) | {"dtype": str(first[1]).removeprefix("torch.")}
    leave_out_beside(reader, about)
    holder = build(about | ({"model": model} if model else {}), from_scratch=not about.get("base_digest"))
    restore_(holder, reader)
    return cast(Policy, holder.policy), model or about["model"]


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
