"""Tensors in a folder of torch.distributed.checkpoint: every rank writes its shards, any number of ranks reads them.

The folder holds what `torch.distributed.checkpoint.save` writes (tensors by the names of `Source`), `meta.pt` with
everything that is not tensors, and a manifest (`checkpoint/folder.py`). torch reads the folder's index by unpickling
whatever is in it; here only what belongs into an index is let through.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from rlvr_lightning.checkpoint.folder import check_files, damaged, file_digest, read_manifest
from rlvr_lightning.checkpoint.state import WHOLE, Spec
from rlvr_lightning.delta.tensor import local
from rlvr_lightning.ranks import ALONE, Ranks

REST, INDEX = "meta.pt", ".metadata"
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "WindowsPath", "Path"},
    "pathlib._local": {"PosixPath", "WindowsPath", "Path"},
}


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], rest: bytes, ranks: Ranks) -> dict[str, str]:
    """Write tensors; all ranks together. Returns this rank's files and their digests.

    Args:
        folder: to write into.
        tensors: sharded, or the same on all ranks.
        rest: written by the first rank.
        ranks: all there are.
    """
    storage = FileSystemWriter(folder, per_thread_copy_ahead=1 << 24)
    dcp.save(dict(tensors), storage_writer=storage)
    mine = list(folder.glob(f"__{ranks.rank}_*"))
    if ranks.rank == 0:
        (folder / REST).write_bytes(rest)
        mine += [folder / INDEX, folder / REST]
    return {file.name: file_digest(file) for file in mine}


class DcpReader:
    """A `Source` over such a folder.

    Args:
        path: of the folder.
        ranks: that read it together; each checks its share of the files.

    Raises:
        ValueError: it is damaged.
    """

    def __init__(self, path: Path, ranks: Ranks = ALONE) -> None:
        self.path = path
        manifest = read_manifest(path)
        check_files(path, manifest, ranks)
        self.about: dict[str, Any] = manifest["about"]
        self.aliases: dict[str, str] = manifest["aliases"]
        try:
            with (path / INDEX).open("rb") as file:
                index = _Index(file).load()
            if not isinstance(index, Metadata):
                raise ValueError("index")
            index.storage_meta = index.storage_meta or StorageMeta()
            self.storage = _Storage(path, index)
            self.specs: dict[str, Spec] = {
                name: (WHOLE, found.properties.dtype, tuple(found.size))
                for name, found in index.state_dict_metadata.items()
                if isinstance(found, TensorStorageMetadata)
            }
        except (pickle.UnpicklingError, ValueError, TypeError, AttributeError, EOFError, OSError, KeyError):
            raise damaged(path, "its index cannot be read") from None
        self.weights = sorted(n.removeprefix("weights/") for n in self.specs if n.startswith("weights/"))

    def damaged(self, why: str) -> ValueError:
        """The error to raise when something in it is not as it was written."""
        return damaged(self.path, why)

    def rest(self) -> bytes:
        """What is not tensors."""
        return (self.path / REST).read_bytes()

    def whole(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        _, dtype, shape = self.specs[name]
        return self._read(name, torch.empty(shape, dtype=dtype))

    def part(self, name: str, like: Tensor) -> Tensor:
        """This rank's part of a tensor that is sharded as `like`, on its device."""
        return self._read(name, torch.empty_like(like.detach(), dtype=self.specs[name][1]))

    def _read(self, name: str, into: Tensor) -> Tensor:
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it is alone: it means to be
                dcp.load({name: into}, storage_reader=self.storage, no_dist=True)
        except (dcp.CheckpointException, RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise self.damaged(f"{name!r}: {reason}") from None
        return local(into)


class _Storage(FileSystemReader):
    """Reads tensors by an index that is in memory already."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index


class _Index(pickle.Unpickler):
    """Unpickles an index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name}")
