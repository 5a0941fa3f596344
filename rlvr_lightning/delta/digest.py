"""Digests of states: which weights exactly a delta starts from and leads to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rlvr_lightning.delta.tensor import local

CHUNK_BYTES = 1 << 26


class Hash(Protocol):
    """What hashlib returns."""

    def update(self, data: memoryview, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The digest of the bytes so far."""


def tensor_hash(name: str, dtype: torch.dtype, shape: Sequence[int]) -> Hash:
    """A SHA-256 that knows a tensor's name, dtype and shape; its bytes in row-major order are to follow."""
    header = json.dumps([name, str(dtype).removeprefix("torch."), list(shape)])
    return hashlib.sha256(f"{header}\n".encode())


def tensor_digest(name: str, tensor: Tensor) -> str:
    """SHA-256 over name, dtype, shape and bytes of a tensor, or of this rank's shard of a DTensor."""
    tensor = local(tensor)
    digest = tensor_hash(name, tensor.dtype, tensor.shape)
    flat = tensor.reshape(-1).view(torch.uint8)
    for start in range(0, len(flat), CHUNK_BYTES):
        digest.update(flat[start : start + CHUNK_BYTES].cpu().numpy().data)
    return digest.hexdigest()


def combine(digests: Iterable[tuple[str, str]]) -> str:
    """One digest of (name, digest of the tensor), in any order: so sharding does not matter.

    >>> combine([("a", "1"), ("b", "2")]) == combine([("b", "2"), ("a", "1")])
    True
    """
    lines = sorted(json.dumps(pair) for pair in digests)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """For every name the first one that is the same tensor in the same memory, often itself."""
    first: dict[tuple, str] = {}
    found = {}
    for name, tensor in state.items():
        entries, tensor = tensor.numel(), local(tensor)
        memory = tensor.data_ptr() or tensor.untyped_storage()._cdata  # an empty shard lies nowhere
        place = (tensor.device, memory, tensor.dtype, tensor.shape, tensor.stride())
        found[name] = first.setdefault(place, name) if entries else name
    return found


def digest_state(state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of a state, hexadecimal; equal for equal names, dtypes, shapes and bits, wherever they are stored.

    Args:
        state: of a mapping, tied tensors count once, under their first name; of an iterator, every pair counts.
    """
    pairs: Iterable[tuple[str, Tensor]]
    if isinstance(state, Mapping):
        pairs = [(name, state[name]) for name, first in ties(state).items() if name == first]
    else:
        pairs = state
    return combine((name, tensor_digest(name, tensor)) for name, tensor in pairs)
