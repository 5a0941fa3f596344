"""Processes that do not exist, and a CPU that takes the memory of a GPU: where a step is simulated."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from torch import Tensor, nn

from rlvr_lightning import policy
from rlvr_lightning.delta import TensorDelta
from rlvr_lightning.delta.tensor import index_dtype, local
from rlvr_lightning.optim import update
from rlvr_lightning.packing import Packed
from rlvr_lightning.profiling.owners import replaced


class Elsewhere(LightningEnvironment):
    """The other processes are not ours to start."""

    @property
    def creates_processes_externally(self) -> bool:
        """See Lightning's."""
        return True


@contextmanager
def fake_processes(count: int) -> Iterator[None]:
    """This process as the first of many that do not exist; each of them would say what this one says."""
    if count == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def gathered(values: list[Any], value: Any, group: Any = None) -> None:
        values[:] = [value] * len(values)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        with ExitStack() as stack:  # objects travel as bytes, which shapes have none of
            stack.enter_context(replaced(dist, "all_gather_object", lambda _: gathered))
            stack.enter_context(replaced(dist, "broadcast_object_list", lambda _: lambda *args, **kwargs: None))
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def memory_of(device: str) -> Iterator[None]:
    """Let our SGD take the temporaries that it takes on a kind of device."""
    if device == "cpu":
        yield
        return
    chunk = update.CHUNK_ENTRIES["cpu"]
    update.CHUNK_ENTRIES["cpu"] = update.CHUNK_ENTRIES[device]
    try:
        with replaced(update, "_step", _fused):
            yield
    finally:
        update.CHUNK_ENTRIES["cpu"] = chunk


def _fused(step: Callable[..., Any]) -> Callable[..., Any]:
    """As the kernel for bf16 weights, which takes no temporaries."""

    def stepped(at: update.Storage, *args: Any) -> Any:
        if at.weight.dtype != torch.bfloat16:
            return step(at, *args)
        return torch.zeros((), dtype=torch.int32), None, None

    return stepped


@contextmanager
def shapes_alone(changed_frac: float) -> Iterator[None]:
    """Let pass what torch and deltas refuse to do with tensors that have no numbers.

    Modules stay what and where they are (adapters are made in their dtype); a delta has as many entries as the settings
    say, of which nobody could tell which they are. Of the tokens to be predicted nothing is decided, and it takes half
    the time if they are shapes, too.
    """

    def stay(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return module

    def between(old: Tensor, new: Tensor) -> TensorDelta:
        whole = local(new)
        count = int(whole.numel() * changed_frac)
        indices = torch.empty(count, dtype=index_dtype(whole.numel()))
        return TensorDelta(indices, torch.empty(count, dtype=new.dtype), whole.numel())

    def without_targets(pack: Callable[..., Packed]) -> Callable[..., Packed]:
        def packed(*args: Any) -> Packed:
            made = pack(*args)
            return replace(made, targets=torch.zeros(made.targets.shape).long())

        return packed

    with ExitStack() as stack:
        stack.enter_context(replaced(policy, "pack", without_targets))
        stack.enter_context(replaced(nn.Module, "to", lambda _: stay))
        stack.enter_context(replaced(nn.Module, "cpu", lambda _: stay))
        stack.enter_context(replaced(TensorDelta, "between", lambda _: between))
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning and the module say of a run."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
