"""Where callbacks write, and how they log whole numbers without rounding them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run; every rank must call it, since the answer is broadcast from rank 0."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def append_line(path: Path, value: Any) -> None:
    """Append one JSON object as a line (JSON Lines)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def exact(values: dict[str, int]) -> dict[str, Tensor]:
    """Integers as float64 scalars: Lightning logs Python numbers as float32, which rounds bytes above 2**24.

    >>> int(exact({"a": 2**24 + 1})["a"])
    16777217
    """
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
