"""torch's own record of every block of a GPU, for its viewer at pytorch.org/memory_viz."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MOST_EVENTS = 200_000
"""Kept by the allocator; of more, the last."""


@contextmanager
def cuda_history(path: Path) -> Iterator[None]:
    """Record what is allocated and freed on the GPUs in here, with stacks, and write it down, also after an error.

    Args:
        path: of the snapshot, a pickle that the viewer reads; nothing here ever loads it.
    """
    torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
