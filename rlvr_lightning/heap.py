"""Keeping the heap of a CPU process as small as what it holds."""

from __future__ import annotations

import ctypes
import sys
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

_buffers = threading.local()


@cache
def _trim() -> Any:
    """The function malloc_trim of glibc; None elsewhere."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_back() -> None:
    """Return what was freed to the system; costs milliseconds.

    Up to version 2.37 glibc seldom reuses a freed aligned block for the next of the same size, and torch aligns all its
    tensors: a backward pass that frees each gradient at once still grows the process by several times what it holds.
    Does nothing where the C library is not glibc.
    """
    if (trim := _trim()) is not None:
        trim(0)


def scratch(use: str, entries: int, dtype: torch.dtype) -> Tensor:
    """A flat CPU tensor whose contents nobody keeps: the same memory each time for the same use, dtype and thread.

    For temporaries of loops over chunks, which would grow the heap for the reason above and cost page faults.
    """
    mode = torch._guards.active_fake_mode()  # fake memory must not serve real work later: kept by the mode, if at all
    buffers: dict[Any, Tensor] | None = _buffers.__dict__ if mode is None else getattr(mode, "scratch", None)
    if buffers is None:
        return torch.empty(entries, dtype=dtype)
    buffer = buffers.get((use, dtype))
    if buffer is None or len(buffer) < entries:
        with torch.inference_mode(False):  # a buffer made during validation must serve training, too
            buffer = buffers[use, dtype] = torch.empty(entries, dtype=dtype)
    return buffer[:entries]
