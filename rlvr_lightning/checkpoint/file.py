"""The container of a checkpoint: one safetensors file, written whole or not at all, checked whole before it is used.

Its tensors are uint8, and each is a row of blobs, every blob after its length (4 bytes, little-endian). The metadata
hold `format`, `version`, JSON objects that the caller gives (see `rlvr_lightning.checkpoint`), and `checksum`: SHA-256
of the header with an empty checksum, followed by the SHA-256 of the rest. The header is padded with spaces.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from rlvr_lightning.delta.writer import canonical, sync_folder

FORMAT, VERSION = "rlvr_lightning.checkpoint", "1"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LENGTH = 4
_CHUNK_BYTES = 1 << 22
_HEADER_BYTES = 100_000_000  # the most that safetensors allows
_WIDE = 1 << 60  # stands for numbers not yet known when room is left for the header
_HOST = re.sub(r"\W", "_", socket.gethostname()) or "localhost"


def temporary_name(path: Path, ending: str = "part") -> str:
    """Of a file or folder that this process is about to put at a path; see `sweep`."""
    return f".{path.name}.{_HOST}-{os.getpid()}.{ending}"


class Writer:
    """Writes a container blob by blob; it appears under its name when `finish` has succeeded.

    Args:
        path: of the file; an existing one is replaced.
        names: of its tensors; blobs must come in this order.
        metadata: JSON objects by name.

    Raises:
        ValueError: when left: the disk is full. Nothing of the file is left behind.
    """

    def __init__(self, path: Path, names: Sequence[str], metadata: Mapping[str, Any]) -> None:
        self.path, self.metadata = path, dict(metadata)
        self.sizes = dict.fromkeys(names, 0)
        self.hash = hashlib.sha256()
        self.reserved = len(self._header(dict.fromkeys(names, _WIDE), "0" * 64)) + 4096  # numbers `finish` adds
        self.reserved = -(-self.reserved // 8) * 8

    def __enter__(self) -> Writer:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.path.parent / temporary_name(self.path)
        self.file = self.temporary.open("wb")
        self.file.seek(8 + self.reserved)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what was not yet written does not fit either
            self.file.close()
        written = self.temporary.stat().st_size if self.temporary.exists() else 0
        self.temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            free = shutil.disk_usage(self.path.parent).free
            raise ValueError(
                f"checkpoint: the disk is full: {self.path} needs more than {written} bytes, {free} are free now "
                f"({error.strerror}); make room (or keep fewer: save_top_k, every_n_train_steps) and resume from the "
                "last checkpoint, which is intact"
            ) from error

    def write(self, name: str, blob: bytes) -> None:
        """Add the next blob of a tensor."""
        for piece in (len(blob).to_bytes(LENGTH, "little"), blob):
            self.sizes[name] += len(piece)
            self.hash.update(piece)
            self.file.write(piece)

    def finish(self, **metadata: Any) -> int:
        """Write the header, make everything durable, give the file its name; returns its size in bytes.

        Args:
            metadata: more objects, of at most 4000 characters in all.
        """
        self.metadata |= metadata
        self.checksum = hashlib.sha256(self._header(self.sizes, "") + self.hash.digest()).hexdigest()
        header = self._header(self.sizes, self.checksum).ljust(self.reserved)
        assert len(header) == self.reserved
        self.file.seek(0)
        self.file.write(len(header).to_bytes(8, "little") + header)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.temporary.replace(self.path)
        sync_folder(self.path.parent)
        return 8 + self.reserved + sum(self.sizes.values())

    def _header(self, sizes: Mapping[str, int], checksum: str) -> bytes:
        texts = {name: json.dumps(value) for name, value in self.metadata.items()}
        header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": VERSION, **texts, "checksum": checksum}}
        at = 0
        for name, size in sizes.items():
            header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
            at += size
        return canonical(header)


def sweep(folder: Path) -> None:
    """Tidy up after writers that are dead now: on this host by their pid, of others after a day.

    What they left half written (`.part`) is deleted. What they had moved aside (`.old`) goes back, unless its successor
    is in its place.
    """
    for path in folder.glob(".*"):
        found = re.fullmatch(r"\.(.+)\.(\w+)-(\d+)\.(part|old)", path.name)
        if not found:
            continue
        with suppress(FileNotFoundError):
            dead = time.time() - path.stat().st_mtime > 86400
            if found[2] == _HOST:
                dead = not _alive(int(found[3]))
            if dead and found[4] == "old" and not (folder / found[1]).exists():
                path.rename(folder / found[1])
            elif dead:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _alive(pid: int) -> bool:
    if pid == os.getpid():  # this process sweeps before it writes: the pid was another's
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def metadata_of(path: Path) -> dict[str, Any] | None:
    """The metadata of a container, unchecked, without reading the rest; None if the file is something else."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= min(path.stat().st_size - 8, _HEADER_BYTES):
            return None
        text = file.read(size)
    try:
        metadata = json.loads(text)["__metadata__"]
        if metadata["format"] != FORMAT:
            return None
        return {name: json.loads(value) for name, value in metadata.items() if value[:1] in ("{", "[")}
    except (ValueError, KeyError, TypeError):
        return None


class Container:
    """A container whose every byte has been checked, and its blobs, read one at a time.

    Args:
        path: of the file.
        check: False if another process checks all bytes after the header.

    Raises:
        ValueError: it is truncated or altered, or of another version.
    """

    def __init__(self, path: Path, check: bool = True) -> None:
        self.path, self.check = path, check
        with path.open("rb") as file:
            try:
                self._open(file)
            except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
                if str(error).startswith("checkpoint:"):
                    raise
                raise self.damaged(f"its header is malformed ({type(error).__name__})") from None

    def damaged(self, why: str) -> ValueError:
        """The error to raise when something in it is not as it was written."""
        return ValueError(f"checkpoint: {self.path} is truncated or altered ({why}); resume from another one")

    def _open(self, file: BinaryIO) -> None:
        file_bytes = self.path.stat().st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 0 < header_bytes <= min(file_bytes - 8, _HEADER_BYTES):
            raise self.damaged("its header is cut")
        text = file.read(header_bytes)
        header = json.loads(text)
        metadata = header["__metadata__"]
        if metadata["version"] != VERSION:
            raise ValueError(
                f"checkpoint: {self.path} has version {metadata['version']!r}, this program reads {VERSION!r}"
            )
        self.checksum: str = metadata["checksum"]
        if canonical(header).ljust(header_bytes) != text:
            raise self.damaged("its header is not as it was written")
        metadata["checksum"] = ""
        rest = hashlib.sha256()
        while self.check and (piece := file.read(_CHUNK_BYTES)):
            rest.update(piece)
        if self.check and hashlib.sha256(canonical(header) + rest.digest()).hexdigest() != self.checksum:
            raise self.damaged("its checksum differs")
        texts = set(metadata) - {"format", "version", "checksum"}
        self.metadata: dict[str, Any] = {name: json.loads(metadata[name]) for name in texts}
        at = 8 + header_bytes
        self.places: dict[str, tuple[int, int]] = {}
        for name in set(header) - {"__metadata__"}:
            start, end = header[name]["data_offsets"]
            if not 0 <= start <= end <= file_bytes - at:
                raise self.damaged(f"{name!r} lies outside of it")
            self.places[name] = (at + start, at + end)

    def blobs(self, name: str, first: int = 0) -> Iterator[bytes]:
        """The blobs of a tensor, in order, from the given one on."""
        at, end = self.places[name]
        with self.path.open("rb") as file:
            while at < end:
                file.seek(at)
                size = int.from_bytes(file.read(LENGTH), "little")
                at += LENGTH + size
                if at > end:
                    raise self.damaged(f"a blob of {name!r} is cut")
                if first:
                    first -= 1
                else:
                    yield file.read(size)
