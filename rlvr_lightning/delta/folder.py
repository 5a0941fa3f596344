"""Deltas between folders of safetensors, read and written a segment at a time: no file is mapped, no tensor is held."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from rlvr_lightning.delta.codec import SEGMENT, SIGNED, decode, encode
from rlvr_lightning.delta.digest import Hash, combine, tensor_hash
from rlvr_lightning.delta.file import DeltaFile
from rlvr_lightning.delta.tensor import positions_cpu
from rlvr_lightning.delta.writer import DeltaWriter, sync_folder

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
"""Would still be the base's in a copy of its folder; only the safetensors that are read are copied."""
Progress = Callable[[int], object]
"""Told how many bytes more are done."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.numel * self.dtype.itemsize

    def segments(self) -> Iterator[tuple[int, int]]:
        """First entry and number of entries of each segment."""
        for first in range(0, self.numel, SEGMENT):
            yield first, min(SEGMENT, self.numel - first)

    def read(self, first: int, entries: int) -> np.ndarray:
        """The bits of some entries, as signed integers."""
        array = np.empty(entries, SIGNED[self.dtype.itemsize])
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + first * array.itemsize)
            view = array.data.cast("B")
            done = 0
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise ValueError(f"delta: {self.path} is cut; fetch it again")
                done += got
        return array

    def write(self, first: int, array: np.ndarray) -> None:
        """Replace some entries."""
        with self.path.open("r+b") as file:
            file.seek(self.start + first * array.itemsize)
            file.write(array.data.cast("B"))


def find_tensors(folder: Path) -> dict[str, Place]:
    """The tensors of a model's folder, in one safetensors file or in the shards its index names.

    Raises:
        ValueError: there is no model.safetensors nor its index, or a file is malformed.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        shards = [single.name]
    elif index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        raise ValueError(f"delta: {folder} has no model.safetensors nor its index; save the model with save_pretrained")
    found: dict[str, Place] = {}
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ValueError(f"delta: {folder} has no file {shard!r}, which its index names; fetch it again")
        for name, place in _read_header(folder / shard).items():
            if name in found:
                raise ValueError(f"delta: {name!r} is in both {found[name].path.name} and {shard} of {folder}")
            found[name] = place
    return found


def _read_header(path: Path) -> dict[str, Place]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length) if length <= min(size, 100_000_000) else b"")
            header.pop("__metadata__", None)
            return {name: _place(path, name, entry, 8 + length, size) for name, entry in header.items()}
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
            raise ValueError(f"delta: {path} is no safetensors file, or cut; fetch it again") from None


def _place(path: Path, name: str, entry: Mapping, at: int, size: int) -> Place:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"delta: {name!r} of {path} has dtype {entry['dtype']}, not one of {', '.join(DTYPES)}")
    start, end = entry["data_offsets"]
    place = Place(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), at + start)
    if not 0 <= start <= end or end - start != place.nbytes or at + end > size:
        raise ValueError(f"delta: {path} is cut or malformed at {name!r}; fetch it again")
    return place


def digest_folder(tensors: Mapping[str, Place], progress: Progress) -> str:
    """`digest_state` of these tensors."""
    digests = []
    for name, place in tensors.items():
        digest = tensor_hash(name, place.dtype, place.shape)
        for first, entries in place.segments():
            digest.update(_bytes(place.read(first, entries)))
            progress(entries * place.dtype.itemsize)
        digests.append((name, digest.hexdigest()))
    return combine(digests)


def diff_folders(base: Path, tuned: Path, out: Path, progress: Progress) -> None:
    """Write the delta from one model to another.

    Args:
        base: folder of the first.
        tuned: folder of the second; its shards may be others.
        out: the file to write.
        progress: told of twice the model's bytes.

    Raises:
        ValueError: the folders do not hold the same tensors.
    """
    old, new = find_tensors(base), find_tensors(tuned)
    check_same(old, new, base, tuned)
    digests: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    with DeltaWriter(out, {name: (p.dtype, p.shape) for name, p in old.items()}, {}, True) as writer:
        for name, place in old.items():
            hashes = [tensor_hash(name, place.dtype, place.shape) for _ in digests]
            _diff_tensor(writer, name, (place, new[name]), hashes, progress)
            for found, digest in zip(digests, hashes, strict=True):
                found.append((name, digest.hexdigest()))
        writer.finish(*map(combine, digests))


def _diff_tensor(
    writer: DeltaWriter, name: str, places: tuple[Place, Place], hashes: list[Hash], progress: Progress
) -> None:
    for first, entries in places[0].segments():
        before, after = (place.read(first, entries) for place in places)
        for digest, array in zip(hashes, (before, after), strict=True):
            digest.update(_bytes(array))
        positions = positions_cpu(before, after)
        blob = encode(positions, after[positions], before, entries, places[0].dtype)
        writer.write(name, blob, len(positions), entries)
        progress(2 * before.nbytes)


def check_same(old: Mapping[str, Place], new: Mapping[str, Place], base: Path, tuned: Path) -> None:
    """Raise ValueError, naming one of them, if tensors, shapes or dtypes differ."""
    for name in sorted(set(old) ^ set(new)):
        there, absent = (base, tuned) if name in old else (tuned, base)
        raise ValueError(
            f"delta: {name!r} is in {there}, not in {absent}; they must be saves of one architecture (tied weights:"
            " save both with the same version of transformers)"
        )
    for name, place in old.items():
        if place.shape != new[name].shape:
            shapes = f"{list(place.shape)} in {base}, {list(new[name].shape)} in {tuned}"
            raise ValueError(f"delta: {name!r} is {shapes}; they must be of one architecture and vocabulary")
        if place.dtype != new[name].dtype:
            dtypes = f"{place.dtype} in {base}, {new[name].dtype} in {tuned}"
            raise ValueError(f"delta: {name!r} is {dtypes}; save one of them again in the other's dtype")


def apply_to_folder(base: Path, delta: DeltaFile, out: Path, progress: Progress) -> None:
    """Write a copy of a model's folder with a delta applied; it appears under its name when its digest is right.

    Args:
        base: folder of the model the delta starts from.
        delta: the delta.
        out: the folder to make.
        progress: told of twice the model's bytes.

    Raises:
        ValueError: the base is another one, or `out` exists.
    """
    if out.exists():
        raise ValueError(f"delta: {out} exists; name a new folder")
    old = find_tensors(base)
    _check_base(old, delta, base)
    names = {name: delta.aliases.get(name, name) for name in old}
    if digest_folder({name: old[name] for name in delta.tensors}, progress) != delta.base_digest:
        raise ValueError(f"delta: {base} is not the model that {delta.path} starts from (its weights' digest differs)")
    with _new_folder(out) as folder:
        skip = shutil.ignore_patterns(*OTHER_WEIGHTS, ".git", ".cache")
        shutil.copytree(base, folder, dirs_exist_ok=True, ignore=skip)
        digests = []
        for shard in sorted({place.path for place in old.values()}):
            shutil.copyfile(shard, folder / shard.name)
        for name, own in names.items():
            place = old[name]
            target = Place(folder / place.path.name, place.dtype, place.shape, place.start)
            digest = _patch(target, own, delta, progress)
            if own == name:
                digests.append((name, digest))
        if combine(digests) != delta.result_digest:
            raise ValueError(f"delta: the result is not what {delta.path} promises; make the delta again")


def _check_base(old: Mapping[str, Place], delta: DeltaFile, base: Path) -> None:
    known = {*delta.tensors, *delta.aliases}
    for name in sorted((set(delta.tensors) - set(old)) | (set(old) - known)):
        where = f"in {base}, not in {delta.path}" if name in old else f"in {delta.path}, not in {base}"
        raise ValueError(f"delta: {name!r} is {where}; give the model the delta was made from")
    for name, place in old.items():
        stored = delta.tensors[delta.aliases.get(name, name)]
        if (stored.dtype, stored.shape) != (place.dtype, place.shape):
            here, there = f"{place.dtype} {list(place.shape)}", f"{stored.dtype} {list(stored.shape)}"
            raise ValueError(
                f"delta: {name!r} is {here} in {base}, {there} in {delta.path}; give the model the delta was made from"
            )


def _patch(place: Place, own: str, delta: DeltaFile, progress: Progress) -> str:
    """Change one tensor in its file; returns its digest."""
    digest = tensor_hash(own, place.dtype, place.shape)
    for first, entries, blob in delta.segments(own):
        array = place.read(first, entries)
        positions, values = decode(blob, array if delta.needs_base else None, entries, place.dtype)
        if len(positions):
            array[positions] = values
            place.write(first, array)
        digest.update(_bytes(array))
        progress(array.nbytes)
    return digest.hexdigest()


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that gets its name when the block ends well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        for path in folder.iterdir():
            sync_folder(path)
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)  # mkdtemp's are private
        folder.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _bytes(array: np.ndarray) -> memoryview:
    return array.data.cast("B")
