"""Names of groups of tensors, and sums over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from torch import Tensor

from rlvr_lightning.callbacks.change_counts import kind_of, layer_of, matrix_of

OUTSIDE = "none"
"""The layer of embeddings, the output layer and the last norm."""
Item = TypeVar("Item")


def matrices(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The matrices in a tensor by name: itself, each of a stack of experts, none of a vector.

    >>> import torch
    >>> {name: list(matrix.shape) for name, matrix in matrices("w", torch.zeros(2, 5, 3)).items()}
    {'w[0]': [5, 3], 'w[1]': [5, 3]}
    """
    if tensor.dim() == 3:
        return {f"{name}[{index}]": part for index, part in enumerate(tensor) if min(part.shape) > 0}
    return {name: tensor} if tensor.dim() == 2 and min(tensor.shape) > 0 else {}


def by_group(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    """Names of tensors by group; layers in the order of their numbers, other groups in that of their names.

    >>> by_group(["h.10.w", "h.2.w", "wte"], layer_of)
    {'2': ['h.2.w'], '10': ['h.10.w'], 'none': ['wte']}
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return dict(sorted(groups.items(), key=lambda item: (not item[0].isdecimal(), item[0].zfill(6))))


def groupings(names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """All of them, those that are no norms and those that are; by kind of matrix; by layer."""
    names = list(names)
    norms = [name for name in names if kind_of(name) == "norm"]
    parts = {"all": names, "all but norms": [n for n in names if kind_of(n) != "norm"], "norms": norms}
    return {
        "parts": {part: members for part, members in parts.items() if members},
        "kinds": by_group(names, matrix_of),
        "layers": by_group(names, layer_of),
    }


def cells(values: Mapping[str, Item]) -> dict[tuple[str, str], list[Item]]:
    """Values of tensors by (layer, kind of matrix)."""
    found: dict[tuple[str, str], list[Item]] = {}
    for name, value in values.items():
        found.setdefault((layer_of(name), matrix_of(name)), []).append(value)
    return found
