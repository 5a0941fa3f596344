"""What a checkpoint holds beside weights: the optimizers' state taken apart, and the rest as bytes that run no code."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlvr_lightning.checkpoint.stored import Source

Record = dict[str, Any]


def lift_state(states: list[Record]) -> tuple[list[Record], dict[str, Tensor]]:
    """Optimizers' state dicts without the tensors of their state, and those by the name of their entry."""
    lifted: dict[str, Tensor] = {}
    rest = []
    for index, state in enumerate(states):
        small: dict[Any, Record] = {}
        for key, values in state.get("state", {}).items():
            small[key] = {}
            for name, value in values.items():
                large = isinstance(value, DTensor) or (isinstance(value, Tensor) and value.numel() > 1)
                if large and not value.is_complex():
                    lifted[f"optimizer/{index}/{key}/{name}"] = value
                else:
                    small[key][name] = value
        rest.append({**state, "state": small})
    return rest, lifted


def to_bytes(rest: Record) -> bytes:
    """What `torch.load(weights_only=True)` reads back.

    Raises:
        ValueError: something is not made of numbers, texts, tensors and containers of them.
    """

    def stored(value: Any) -> bytes | None:
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        except (pickle.PickleError, AttributeError, TypeError):
            return None
        return buffer.getvalue()

    found = stored(rest)
    if found is None:
        name = next((name for name, value in rest.items() if stored(value) is None), "?")
        raise ValueError(
            f"DeltaCheckpointIO: {name!r} of the checkpoint holds objects that only pickle could store; let its "
            "state_dict have numbers, texts, tensors, lists and dicts only"
        )
    return found


def from_bytes(reader: Source) -> Record:
    """Read what `to_bytes` made; it may not unpack to more than it is."""
    blob = reader.rest()
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            files = archive.infolist()
        if any(f.compress_type for f in files) or sum(f.file_size for f in files) > len(blob):
            raise ValueError("compressed")
        checkpoint = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
        if not all(isinstance(optimizer["state"], dict) for optimizer in checkpoint.get("optimizer_states", [])):
            raise ValueError("state")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, pickle.PickleError, zipfile.BadZipFile):
        raise reader.damaged("what is not tensors cannot be read") from None
    return dict(checkpoint)
