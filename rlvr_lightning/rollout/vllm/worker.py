"""The part of this package that runs inside vLLM's worker: taking in weights, and telling what it holds.

vLLM imports this module by the name of its worker extension, in whatever process the worker is. Updates come in the
checkpoint's own names and shapes, whole tensors or flat indices with values; vLLM's loaders take them to where they
belong in fused and sharded weights. They come as tensors from the same process, or in a safetensors file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm import _custom_ops
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)

BACKEND = "rlvr_lightning"
INDICES, VALUES = "/indices", "/values"
_custom_ops._supports_onednn = False  # it packs linear weights into a form of its own, which no update reaches


@dataclass
class Init(WeightTransferInitInfo):
    """Nothing to agree upon."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """A part of a sync: all dense or all sparse."""

    shapes: Mapping[str, Sequence[int]]
    """Of the tensors that it updates, by their checkpoint names."""
    tensors: Mapping[str, Tensor] | None = None
    """name -> tensor, or name/indices and name/values; in one process."""
    file: str | None = None
    """A safetensors file with the same."""


class Transfer(WeightTransferEngine[Init, Update]):
    """Applies updates in place through the model's own loader."""

    init_info_cls, update_info_cls = Init, Update
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: Init) -> None:
        """There is no connection to open."""

    def start_weight_update(self) -> None:
        """Updates are in place."""

    def finish_weight_update(self) -> None:
        """Updates are in place."""

    def shutdown(self) -> None:
        """There is nothing to close."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Without the base class's synchronization, which a CPU does not have."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Update) -> None:
        """Load the tensors, or the entries."""
        held = update_info.tensors if update_info.file is None else load_file(update_info.file)
        assert held is not None
        load_checkpoint_weight_patches(
            self.model,
            [patch(name, tuple(shape), held, self.device) for name, shape in update_info.shapes.items()],
            validate_unique_indices=False,
        )


def patch(name: str, shape: tuple[int, ...], held: Mapping[str, Tensor], device: torch.device) -> CheckpointWeightPatch:
    """What changes of one tensor."""
    if name in held:
        values = held[name].to(device).reshape(-1)
        return CheckpointWeightPatch(name, shape, values.dtype, values)
    values, indices = held[name + VALUES].to(device), held[name + INDICES].to(device)
    return CheckpointWeightPatch(name, shape, values.dtype, values, indices)


class Extension:
    """Mixed into vLLM's worker, so that `collective_rpc` finds its methods."""

    model_runner: Any

    def weight_digests(self, shapes_json: str) -> dict[str, str]:
        """SHA-256 of what the engine holds for each tensor of a checkpoint, in the engine's dtype.

        The model's loader is run with empty tensors of these shapes, and where it would write, what is there is read
        instead: so it is read from where an update goes, whatever was fused.

        Args:
            shapes_json: name -> shape, as JSON, for only texts reach a server.
        """
        shapes = json.loads(shapes_json)
        return {name: _read(self.model_runner.get_model(), name, tuple(shape)) for name, shape in shapes.items()}


def _read(model: torch.nn.Module, name: str, shape: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    original = torch.Tensor.copy_

    def read(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        digest.update(destination.detach().contiguous().cpu().view(torch.uint8).numpy().data)
        return destination

    nothing = torch.zeros((), dtype=next(model.parameters()).dtype).expand(shape)
    torch.Tensor.copy_ = read  # type: ignore[method-assign, assignment]
    try:
        model.load_weights([(name, nothing)])  # type: ignore[operator]
    finally:
        torch.Tensor.copy_ = original  # type: ignore[method-assign]
    return digest.hexdigest()


WeightTransferEngineFactory.register_engine(BACKEND, Transfer)
