"""`--ckpt_path last`: the newest checkpoint of a config's runs that is whole."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rlvr_lightning.checkpoint.file import sweep
from rlvr_lightning.checkpoint.folder import MANIFEST, check_presence, read_manifest
from rlvr_lightning.checkpoint.io import is_ours, read


def run_folders(trainer: Trainer) -> list[Path]:
    """Where the runs of a trainer's config put their checkpoints, this one and those before."""
    loggers: list[Any] = trainer.loggers
    found = [Path(logger.save_dir, str(logger.name or "")) for logger in loggers if logger.save_dir is not None]
    callbacks: list[Any] = trainer.checkpoint_callbacks
    found += [Path(c.dirpath) for c in callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    return list(dict.fromkeys(found or [Path(trainer.default_root_dir) / "checkpoints"]))


def find_last(folders: Iterable[Path], check: bool = True, thorough: bool = True) -> Path | None:
    """The newest checkpoint in some folders; None if there is none. What is passed over is named on stderr.

    Args:
        folders: are searched at any depth.
        check: whether it is checked at all.
        thorough: whether every byte is; otherwise only that all of its files are there.

    Raises:
        ValueError: there are some, all damaged.
    """
    folders = list(folders)
    for parent in {path.parent for folder in folders for path in folder.rglob("*.ckpt*")}:
        sweep(parent)
    paths = {path for folder in folders for path in folder.rglob("*.ckpt")}
    reason = None
    for path in sorted(paths, key=_saved_at, reverse=True):
        reason = why_not(path, thorough) if check else None
        if reason is None:
            return path
        print(f"passed over: {reason}", file=sys.stderr)
    if reason is not None:
        raise ValueError(
            f"--ckpt_path last: every checkpoint under {', '.join(map(str, folders))} is damaged; delete them"
        )
    return None


def _saved_at(path: Path) -> tuple[int, str]:
    file = path / MANIFEST if (path / MANIFEST).exists() else path
    return file.stat().st_mtime_ns, path.name


def why_not(path: Path, thorough: bool = True) -> str | None:
    """Why a checkpoint cannot be resumed from, in one line; None if all of its bytes are as they were written.

    Args:
        path: of the checkpoint.
        thorough: False looks only whether the files of a folder are there.
    """
    try:
        if path.is_dir() and not thorough:
            check_presence(path, read_manifest(path))
        elif is_ours(path):
            read(path)
        else:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                return f"checkpoint: {path} is damaged ({broken})"
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        return str(error)
    return None


def resolve(wanted: str | None, trainer: Trainer, command: str | None) -> str | None:
    """The checkpoint that `--ckpt_path` stands for.

    Args:
        wanted: a path, or `last`.
        trainer: tells where to look.
        command: `fit` starts afresh if there is none.

    Raises:
        ValueError: there is none that can be used.
    """
    if wanted != "last":
        return wanted
    folders = run_folders(trainer)
    first = trainer.is_global_zero  # the path that it finds is the one that all load
    found = find_last(folders, check=first, thorough=trainer.world_size == 1)  # several check the bytes as they load
    where = ", ".join(map(str, folders))
    if found is None and command != "fit":
        raise ValueError(f"--ckpt_path last: there is no checkpoint under {where}")
    if first:
        going = "resuming from" if command == "fit" else "reading"
        said = f"{going} {found}" if found else f"no checkpoint under {where} yet: starting afresh"
        print(f"--ckpt_path last: {said}", file=sys.stderr, flush=True)
    return str(found) if found else None
