"""The weights that a run started from: which they are, and where their values can be had when a checkpoint is written.

A checkpoint holds what differs from them, so each needs to know them, one tensor at a time. Where a KL term keeps a
reference, that is them. Otherwise they are copied once to a file without a name in the run's folder: disk, not memory,
as much as the trained 16-bit weights take, given back when the process ends. Reading the model's own folder again
instead would spare that file, but its tensors are not those of the module one by one for every architecture: names,
fused experts, dtypes differ, and a wrong guess would show only on resuming.

No start is kept for what is stored whole anyway: float32 weights, of which a step changes nearly every entry (against
the start they would take 0.6 instead of 0.8 of their size, at a tenth of the speed), and adapters, which start from
random numbers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from rlvr_lightning.delta.digest import combine, tensor_digest, ties
from rlvr_lightning.delta.tensor import flat_bits, local, whole
from rlvr_lightning.ranks import ALONE, Ranks
from rlvr_lightning.reference import Reference


def in_base(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters that checkpoints describe by their base: those that move, and those that never do.

    A model without adapters whose weights have 16 bits moves; of one with adapters everything else stays. Tied weights
    appear once, under their first name in `module.state_dict()`. What a module has beside its model is not among them.
    """
    beside = getattr(module, "beside", ())
    found = {name: p for name, p in module.named_parameters() if not name.startswith(tuple(beside))}
    frozen: dict[str, Tensor] = {name: p for name, p in found.items() if not p.requires_grad}
    if frozen:
        return {}, frozen
    return {name: p for name, p in found.items() if p.element_size() == 2}, {}


def base_digest(module: nn.Module, ranks: Ranks = ALONE) -> str | None:
    """Digest of what `in_base` lists as it is now, by the names of the model's own folder; None if that is nothing.

    Args:
        module: sharded or not; shards are gathered one tensor at a time, so that sharding changes no digest.
        ranks: that hold the shards between them, and share the work.
    """
    moving, frozen = in_base(module)
    found = {model_name(name): parameter for name, parameter in (moving | frozen).items()}
    return digest_of(found, ranks) if found else None


def digest_of(tensors: Mapping[str, Tensor], ranks: Ranks = ALONE) -> str:
    """Digest of tensors, sharded or not, which sharding does not change; arguments as of `base_digest`."""
    mine = []
    for index, (name, tensor) in enumerate(tensors.items()):
        everything = whole(tensor.detach())
        if index % ranks.size == ranks.rank:
            mine.append((name, tensor_digest(name, everything)))
    return combine(pair for part in ranks.gather(mine) for pair in part)


def model_name(name: str) -> str:
    """A parameter's name in the transformers model.

    >>> model_name("policy.model.base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> model_name("policy.model.model.norm.weight")
    'model.norm.weight'
    """
    return name.removeprefix("policy.model.").removeprefix("base_model.model.").replace(".base_layer.", ".")


def about_model(module: Any) -> dict[str, Any]:
    """What it takes to build the same model again: `model`, `dtype`, `lora`; and what else there is: `beside`."""
    lora = getattr(module, "lora", None)
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    beside = list(getattr(module, "beside", ()))
    return {"model": module.model_name, "dtype": dtype, "lora": asdict(lora) if lora else None, "beside": beside}


class Start:
    """The weights of a module as they are when this is made; of sharded ones, this rank's parts.

    Args:
        module: with all its parameters in memory.
        reference: of the module's KL term, if there is one; made at the same moment.
        folder: for a copy of what no reference keeps; None on ranks that write no checkpoints.
        ranks: that hold the weights between them.

    Raises:
        ValueError: weights are sharded by something else than rows, or the folder has no room.
    """

    def __init__(
        self, module: nn.Module, reference: Reference | None, folder: Path | None, ranks: Ranks = ALONE
    ) -> None:
        for name, parameter in module.named_parameters():
            check_rows(name, parameter)
        self.moving, self.frozen = in_base(module)
        self.digest = base_digest(module, ranks)
        self.reference = reference if reference is not None and not reference.adapter else None
        self.copy = TensorFile(folder, self.moving) if folder and self.moving and self.reference is None else None

    def value(self, name: str) -> Tensor | None:
        """A parameter's value at the start, a new tensor, of a sharded one this rank's part.

        None if it is not in the base, or not kept by this rank.
        """
        parameter = self.moving.get(name)
        if parameter is None:
            return None
        if self.reference is not None:
            return self.reference.start(parameter)
        return self.copy.read(name) if self.copy else None

    @property
    def readable(self) -> bool:
        """Whether this rank keeps the values."""
        return not self.moving or self.reference is not None or self.copy is not None

    def names(self) -> Iterable[str]:
        """Of the parameters in the base."""
        return [*self.moving, *self.frozen]


class TensorFile:
    """Values of tensors in a file without a name, which is gone however the process ends."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        self.places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file: BinaryIO = tempfile.TemporaryFile(dir=folder, prefix=".start_")  # noqa: SIM115
            for name, tensor in tensors.items():
                part = local(tensor)
                self.places[name] = (self.file.tell(), part.dtype, part.shape)
                self.file.write(_bytes(part.cpu()))
            self.file.flush()
        except OSError as error:
            total = sum(local(tensor).nbytes for tensor in tensors.values())
            raise ValueError(
                f"DeltaCheckpointIO: cannot keep the start weights ({total} bytes) in {folder}: {error.strerror}; make "
                "room, or keep a reference (objective.kl_coef above 0)"
            ) from error

    def read(self, name: str) -> Tensor:
        """One tensor, new, on the CPU."""
        at, dtype, shape = self.places[name]
        tensor = torch.empty(shape, dtype=dtype)
        self.file.seek(at)
        if self.file.readinto(_bytes(tensor)) != tensor.nbytes:  # type: ignore[attr-defined]
            raise ValueError("DeltaCheckpointIO: the file with the start weights cannot be read back")
        return tensor


def by_rows(tensor: Tensor) -> bool:
    """Whether every rank's part of a tensor is a run of its entries."""
    return all(getattr(placement, "dim", 0) == 0 for placement in getattr(tensor, "placements", ()))


def check_rows(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless this rank's part of a tensor is a run of its entries."""
    if not by_rows(tensor):
        raise ValueError(
            f"DeltaCheckpointIO: {name!r} is not sharded by rows ({tensor.placements}); leave trainer.plugins out, and "  # type: ignore[attr-defined]
            "checkpoints are the strategy's own"
        )


def _bytes(tensor: Tensor) -> memoryview:
    return flat_bits(tensor).numpy().data.cast("B")


def first_names(state: Mapping[str, Tensor]) -> tuple[list[str], dict[str, str]]:
    """Names of distinct tensors, and the other names of the same."""
    tied = ties(state)
    return [name for name in state if tied[name] == name], {n: first for n, first in tied.items() if n != first}
