"""A checkpoint that is a folder: files that several processes write, and a manifest that says when they are whole.

It is written beside its place, under a name that begins with a dot and ends in `.part`, and moved there when every file
and the manifest are on disk. A checkpoint that was there before is moved aside first (`.old`) and deleted at the end;
if the process is killed between the two moves, `sweep` moves it back. `manifest.json` holds

    format, version, kind   `delta` (containers, see `checkpoint/file.py`) or `dcp` (torch.distributed.checkpoint)
    about, aliases          as in a container
    files                   name: digest (a container's checksum; SHA-256 of any other file)
    checksum                SHA-256 of the manifest with an empty checksum
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from rlvr_lightning.checkpoint.file import sweep, temporary_name
from rlvr_lightning.delta.writer import canonical, sync_folder
from rlvr_lightning.ranks import ALONE, Ranks

MANIFEST, FORMAT, VERSION = "manifest.json", "rlvr_lightning.checkpoint.folder", "1"
_MOST_BYTES = 100_000_000


def write_folder(
    path: Path, ranks: Ranks, write: Callable[[Path], Mapping[str, str]], manifest: Callable[[], dict[str, Any]]
) -> None:
    """Let all ranks write their files into a folder; it is there whole when this returns, and unchanged if it raises.

    Args:
        path: of the folder, the same on all ranks and visible to them.
        ranks: that take part.
        write: is given the folder to write into; returns this rank's files and their digests.
        manifest: the rest of the manifest; called on the first rank when all have written.

    Raises:
        ValueError: on all ranks, if one of them cannot write.
    """
    part = Path(ranks.gather(str(path.parent / temporary_name(path)))[0])
    if ranks.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        part.mkdir()
    agree(ranks, None)
    files, error = tried(lambda: dict(write(part)))
    try:
        agree(ranks, error)
        everything = ranks.gather(files)
        if ranks.rank == 0:
            files = {name: digest for some in everything for name, digest in some.items()}
            _, error = tried(lambda: _finish(part, path, manifest() | {"files": files}))
        agree(ranks, error)
    finally:
        if ranks.rank == 0:
            shutil.rmtree(part, ignore_errors=True)


def tried(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it returns, or why it failed, in one line."""
    try:
        return work(), None
    except CheckpointException as error:  # torch's own: of all ranks
        rank, (reason, _) = next(iter(error.failures.items()))
        return {}, f"checkpoint: rank {rank} cannot write: {reason}"
    except OSError as error:
        return {}, f"checkpoint: cannot write {error.filename}: {error.strerror}; make room or choose another folder"
    except ValueError as error:
        return {}, str(error)


def agree(ranks: Ranks, error: str | None) -> None:
    """Raise ValueError on all ranks if there is an error on one; returns when all have come here."""
    for found in ranks.gather(error):
        if found is not None:
            raise ValueError(found)


def _finish(part: Path, path: Path, manifest: dict[str, Any]) -> None:
    if missing := [name for name in manifest["files"] if not (part / name).is_file()]:
        raise ValueError(
            f"checkpoint: {missing[0]}, written by another process, cannot be seen by the first; put the run folder on "
            "a file system that all machines share"
        )
    manifest = {"format": FORMAT, "version": VERSION, **manifest, "checksum": ""}
    manifest["checksum"] = hashlib.sha256(canonical(manifest)).hexdigest()
    with (part / MANIFEST).open("wb") as file:
        file.write(canonical(manifest))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(part)
    aside = path.parent / temporary_name(path, "old")
    if path.exists():
        path.rename(aside)
    part.rename(path)
    sync_folder(path.parent)
    remove(aside)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_whole(path: Path) -> None:
    """Delete a checkpoint so that a kill leaves it whole or gone."""
    if path.is_dir():
        gone = path.parent / temporary_name(path)
        path.rename(gone)
        path = gone
    remove(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked against its own checksum.

    Raises:
        ValueError: the folder is no checkpoint, or the manifest is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"checkpoint: {folder} is not whole or no checkpoint of ours: it has no {MANIFEST}")
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError("size")
        manifest = json.loads(file.read_bytes())
        checksum = manifest.pop("checksum")
        if hashlib.sha256(canonical(manifest | {"checksum": ""})).hexdigest() != checksum or not all(
            isinstance(manifest[name], dict) for name in ("files", "about", "aliases")
        ):
            raise ValueError("checksum")
        if any(Path(name).name != name or not isinstance(digest, str) for name, digest in manifest["files"].items()):
            raise ValueError("files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged(folder, "its manifest is not as it was written") from None
    if (manifest["format"], manifest["version"]) != (FORMAT, VERSION) or manifest["kind"] not in ("delta", "dcp"):
        raise ValueError(f"checkpoint: {folder} has version {manifest['version']!r}, this program reads {VERSION!r}")
    return dict(manifest)


def damaged(path: Path, why: str) -> ValueError:
    """The error to raise when something in a checkpoint is not as it was written."""
    return ValueError(f"checkpoint: {path} is truncated or altered ({why}); resume from another one")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_presence(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ValueError if a file of a checkpoint is missing."""
    for name in manifest["files"]:
        if not (folder / name).is_file():
            raise damaged(folder, f"{name} is missing")


def check_files(folder: Path, manifest: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
    """Compare files with their digests, each rank its share of them.

    Raises:
        ValueError: on all ranks, if one is missing or altered.
    """
    error = None
    for index, (name, digest) in enumerate(sorted(manifest["files"].items())):
        if index % ranks.size == ranks.rank:
            file = folder / name
            if not file.is_file() or file_digest(file) != digest:
                error = str(damaged(folder, f"{name} is {'altered' if file.is_file() else 'missing'}"))
    agree(ranks, error)
