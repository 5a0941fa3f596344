"""From counts per parameter to the record of one measurement, and what measuring costs. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlvr_lightning.callbacks.change_counts import kind_of, layer_of


def as_record(counts: Tensor, definitions: Sequence[str]) -> dict[str, Any]:
    """Names for the numbers that `count_changed` returns.

    >>> as_record(torch.tensor([[4, 1], [2, 0]]), ["bf16"])
    {'entries': 4, 'zeros': 1, 'changed': {'bf16': 2}, 'changed_zeros': {'bf16': 0}}
    """
    (entries, zeros), *rest = counts.tolist()
    return {
        "entries": entries,
        "zeros": zeros,
        "changed": {name: row[0] for name, row in zip(definitions, rest, strict=True)},
        "changed_zeros": {name: row[1] for name, row in zip(definitions, rest, strict=True)},
    }


def summarise(names: Sequence[str], counts: Tensor, definitions: Sequence[str]) -> dict[str, Any]:
    """Counts overall, by kind of tensor and by layer.

    Args:
        names: n names of parameters.
        counts: int64 [n, 1 + definitions, 2].
        definitions: names of the rows after the first.
    """

    def grouped(key: Callable[[str], str]) -> dict[str, Any]:
        groups: dict[str, Tensor] = {}
        for name, row in zip(names, counts, strict=True):
            groups[key(name)] = groups.get(key(name), torch.zeros_like(row)) + row
        return {group: as_record(row, definitions) for group, row in groups.items()}

    return as_record(counts.sum(0), definitions) | {"kinds": grouped(kind_of), "layers": grouped(layer_of)}


def fractions(record: dict[str, Any], prefix: str) -> dict[str, float]:
    """Changed entries over all entries, by definition.

    >>> fractions({"entries": 8, "changed": {"bf16": 2}}, "update/changed_frac")
    {'update/changed_frac/bf16': 0.25}
    """
    return {f"{prefix}/{name}": count / max(record["entries"], 1) for name, count in record["changed"].items()}


@dataclass
class Cost:
    """Seconds spent measuring, against seconds spent training."""

    every_n_steps: int
    """One measurement serves so many steps."""
    measured_s: float = 0.0
    trained_s: float = 0.0
    """Seconds of training steps, without measuring."""
    steps: int = 0
    measurements: int = 0
    last_s: float = 0.0
    """Seconds of the last measurement."""

    def add(self, seconds: float) -> None:
        """One measurement is complete; `seconds` since the part that `last_s` already holds."""
        self.last_s += seconds
        self.measured_s += self.last_s
        self.measurements += 1

    def frac(self) -> float:
        """Seconds of measuring per second of training, once the steps that the last measurement serves are done.

        >>> Cost(every_n_steps=10, measured_s=2.0, trained_s=8.0, steps=2, measurements=1).frac()
        0.05
        """
        served = max(self.steps, self.measurements * self.every_n_steps)
        return self.measured_s * self.steps / (self.trained_s * served) if self.trained_s > 0 and self.steps else 0.0
