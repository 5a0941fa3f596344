"""Old values of parameters, kept in an anonymous host file: on the device they would be a second model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from rlvr_lightning.callbacks.tensors import local_part

CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
"""On a CPU what stays in its cache; on a GPU enough to keep it and the bus busy."""


class Snapshot:
    """The local parts of some tensors as they were when last written.

    The file has no name (it is unlinked as soon as it is open, where the system can do that), so nothing is left behind
    however the process ends. Values go to it and come back in chunks.
    """

    def __init__(self, folder: Path, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = tempfile.TemporaryFile(dir=folder, prefix=".snapshot_", buffering=0)  # noqa: SIM115
        self._buffers: dict[str, Tensor] = {}

    def _buffer(self, device: torch.device) -> Tensor:
        """A page of host memory; page-locked where a GPU copies to it."""
        if device.type not in self._buffers:
            size = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
            self._buffers[device.type] = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        return self._buffers[device.type]

    def _pieces(self) -> Iterator[tuple[int, Tensor]]:
        """(which tensor, a piece of it as one-dimensional bytes); at most one tensor is copied, if not contiguous."""
        for index, tensor in enumerate(self._tensors):
            part = local_part(tensor)
            flat = part.contiguous().view(-1).view(torch.uint8) if part.numel() else part.new_empty(0)
            for start in range(0, flat.numel(), self._buffer(part.device).numel()):
                yield index, flat[start : start + self._buffer(part.device).numel()]

    def write(self) -> None:
        """Keep the values of now.

        Raises:
            OSError: the disk is full or gone.
        """
        self._file.seek(0)
        for _, piece in self._pieces():
            host = piece
            if piece.device.type != "cpu":
                host = self._buffer(piece.device)[: piece.numel()]
                host.copy_(piece)
            _write_all(self._file, host.numpy().data)

    def compare(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each chunk: which tensor, the values kept, the values of now; one-dimensional, on the tensor's device.

        The values kept are valid until the next chunk.

        Raises:
            OSError: the file cannot be read.
        """
        self._file.seek(0)
        for index, piece in self._pieces():
            host = self._buffer(piece.device)[: piece.numel()]
            _read_all(self._file, host.numpy().data)
            dtype = self._tensors[index].dtype
            yield index, host.to(piece.device).view(dtype), piece.view(dtype)

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()
        self._buffers = {}


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while data:  # one system call may write less than asked
        data = data[file.write(data) :]


def _read_all(file: BinaryIO, data: memoryview) -> None:
    while data:
        count = file.readinto(data)  # type: ignore[attr-defined]
        if not count:
            raise OSError("a snapshot of the weights is shorter than it was written")
        data = data[count:]
