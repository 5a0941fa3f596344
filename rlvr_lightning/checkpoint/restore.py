"""Giving a module the weights of a checkpoint: in place, one tensor at a time, nothing if they do not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from rlvr_lightning.checkpoint.start import Start, base_digest, first_names
from rlvr_lightning.checkpoint.state import Reader
from rlvr_lightning.delta.file import signed
from rlvr_lightning.delta.tensor import describe, flat_bits
from rlvr_lightning.heap import give_back
from rlvr_lightning.reference import Reference


def restore_(
    module: torch.nn.Module, reader: Reader, start: Start | None = None, reference: Reference | None = None
) -> None:
    """Give a module the weights of a checkpoint; nothing is written if they do not fit.

    Args:
        module: its weights are the start's, unless `start` is given.
        reader: of the checkpoint.
        start: of the module.
        reference: of the module: is told of each parameter before it changes.

    Raises:
        ValueError: the module has other tensors, or starts from other weights.
    """
    state = module.state_dict()
    check_fits(state, reader)
    wanted = reader.about.get("base_digest")
    start = start if start and start.readable else None
    found = start.digest if start else base_digest(module) if wanted else None
    if wanted and wanted != found:
        raise ValueError(
            f"checkpoint: {reader.file.path} was made from {reader.about.get('model')!r} ({wanted[:12]}), but this "
            f"module starts from other weights ({found[:12] if found else 'none'}); set model and dtype as then"
        )
    parameters = dict(module.named_parameters())
    for name in reader.weights:
        give_back()
        target = state[name]
        base = start.value(name) if start else None
        after = (target if base is None else base).detach().cpu().clone()
        reader.write_(f"weights/{name}", signed(flat_bits(after)), after.dtype)
        if reference is not None and name in parameters:
            reference.rebase({parameters[name]: after})
        target.copy_(after)


def check_fits(state: dict[str, Tensor], reader: Reader) -> None:
    """Raise ValueError unless a state has a checkpoint's tensors and no others."""
    names, aliases = first_names(state)
    theirs = {*reader.weights, *reader.aliases}
    for name in sorted(theirs ^ {*names, *aliases}):
        here = "has no" if name in theirs else "also has a"
        raise ValueError(
            f"checkpoint: the module {here} tensor {name!r}, unlike {reader.file.path}; set `model` and `lora` as then"
        )
    for name in reader.weights:
        _, dtype, shape = reader.specs[f"weights/{name}"]
        if (state[name].dtype, tuple(state[name].shape)) != (dtype, shape):
            raise ValueError(
                f"checkpoint: {name!r} is {dtype} {list(shape)} in {reader.file.path}, but {describe(state[name])} in "
                "this module; set `model`, `dtype` and `lora` as then"
            )
