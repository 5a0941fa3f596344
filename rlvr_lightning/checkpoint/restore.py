"""Giving a module the weights of a checkpoint: in place, one tensor at a time, nothing if they do not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from rlvr_lightning.checkpoint.start import Start, base_digest, by_rows, first_names
from rlvr_lightning.checkpoint.state import DELTA, Reader
from rlvr_lightning.checkpoint.stored import Source, sharded_as
from rlvr_lightning.delta.file import signed
from rlvr_lightning.delta.tensor import box, describe, first_entry, flat_bits, local, whole
from rlvr_lightning.heap import give_back
from rlvr_lightning.ranks import ALONE, Ranks
from rlvr_lightning.reference import Reference


@torch.no_grad()
def restore_(
    module: torch.nn.Module,
    reader: Source,
    start: Start | None = None,
    reference: Reference | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Give a module the weights of a checkpoint; nothing is written if they do not fit.

    Args:
        module: sharded or not; its weights are the start's, unless `start` is given.
        reader: of the checkpoint.
        start: of the module.
        reference: of the module: is told of each parameter before it changes.
        ranks: that hold the module between them, and call this together.

    Raises:
        ValueError: the module has other tensors, or starts from other weights.
    """
    state = module.state_dict()
    check_fits(state, reader)
    wanted = reader.about.get("base_digest")
    start = start if start and start.readable else None
    found = start.digest if start else base_digest(module, ranks) if wanted else None
    if wanted and wanted != found:
        raise ValueError(
            f"checkpoint: {reader.path} was made from {reader.about.get('model')!r} ({wanted[:12]}), but this "
            f"module starts from other weights ({found[:12] if found else 'none'}); set model and dtype as then"
        )
    parameters = dict(module.named_parameters())
    for name in reader.weights:
        give_back()
        target, entry = state[name], f"weights/{name}"
        if isinstance(reader, Reader) and reader.specs[entry][0] == DELTA:
            base = start.value(name) if start else None
            after = from_base(reader, entry, target, local(target) if base is None else base, ranks)
        else:
            after = reader.part(entry, target)
        if reference is not None and name in parameters:
            reference.rebase({parameters[name]: after})
        local(target).copy_(after)


def from_base(reader: Reader, entry: str, like: Tensor, base: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """This rank's part of a tensor that is stored as a delta, on the CPU.

    Args:
        reader: of the checkpoint.
        entry: the tensor's name in it.
        like: sharded as the result.
        base: this rank's part of what the delta starts from; gathered, one tensor at a time, where segments of the
            delta do not end where the ranks' parts do.
        ranks: that hold the tensor between them.
    """
    if not by_rows(like):
        everything = whole(sharded_as(like, base)).cpu().clone()
        reader.write_(entry, signed(flat_bits(everything)), base.dtype)
        return box(everything, like)
    first, entries = first_entry(like), base.numel()
    low, high = reader.cover(entry, first, first + entries)
    if ranks.any((low, high) != (first, first + entries)):
        flat = flat_bits(whole(sharded_as(like, base)))[low:high].cpu().clone()
    else:
        flat = flat_bits(base).cpu().clone()
    reader.write_(entry, signed(flat), base.dtype, low)
    return flat[first - low : first - low + entries].view(base.dtype).view(base.shape)


def check_fits(state: dict[str, Tensor], reader: Source) -> None:
    """Raise ValueError unless a state has a checkpoint's tensors and no others."""
    names, aliases = first_names(state)
    theirs = {*reader.weights, *reader.aliases}
    for name in sorted(theirs ^ {*names, *aliases}):
        here = "has no" if name in theirs else "also has a"
        raise ValueError(
            f"checkpoint: the module {here} tensor {name!r}, unlike {reader.path}; set `model` and `lora` as then"
        )
    for name in reader.weights:
        _, dtype, shape = reader.specs[f"weights/{name}"]
        if (state[name].dtype, tuple(state[name].shape)) != (dtype, shape):
            raise ValueError(
                f"checkpoint: {name!r} is {dtype} {list(shape)} in {reader.path}, but {describe(state[name])} in "
                "this module; set `model`, `dtype` and `lora` as then"
            )
