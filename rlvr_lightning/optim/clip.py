"""The global norm of gradients, and the factor that clips it; in fp32 whatever the gradients' dtype."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rlvr_lightning.compute import cast
from rlvr_lightning.delta.tensor import local
from rlvr_lightning.optim.sgd import SGD
from rlvr_lightning.optim.update import CHUNK_ENTRIES
from rlvr_lightning.ranks import Ranks


def squared_norm(grad: Tensor, shards: Ranks) -> Tensor:
    """Sum of squares, a float32 scalar (bf16 would keep 8 bits of it); of a sharded one, this rank's part of the sum.

    By chunks, since 16-bit ones are cast.
    """
    size = CHUNK_ENTRIES.get(grad.device.type, CHUNK_ENTRIES["cuda"])
    norms = [torch.linalg.vector_norm(cast(part, torch.float32)) for part in local(grad).reshape(-1).split(size)]
    return torch.stack(norms).square().sum() / shards.copies_of(grad)


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients with; `max_norm` 0 never clips (else as `torch.nn.utils.clip_grad_norm_`, in fp32).

    Example:
        >>> clip_factor(0.5, 1.0), round(clip_factor(4.0, 1.0), 4), clip_factor(4.0, 0.0)
        (1.0, 0.25, 1.0)
    """
    return min(1.0, float(max_norm / (torch.tensor(norm) + 1e-6))) if max_norm else 1.0


def grad_norm(parameters: Iterable[Tensor], shards: Ranks) -> float:
    """Global norm of the gradients there are.

    Args:
        parameters: of which all ranks have gradients, or none.
        shards: ranks that hold parts of them.
    """
    return norm_of([squared_norm(p.grad, shards) for p in parameters if p.grad is not None], shards)


def norm_of(squares: list[Tensor], shards: Ranks) -> float:
    """The norm that `squared_norm`s make together, over all ranks."""
    if not squares:
        return 0.0
    if shards.size == 1:  # the bits of torch's: a float32's square has it for its root
        return float(torch.linalg.vector_norm(torch.stack(squares).sqrt()))
    return float(shards.sum(torch.stack(squares).sum()).sqrt())


def scale_gradients(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], factor: float) -> None:
    """Let the next step use gradients times `factor`."""
    if isinstance(optimizer, SGD):
        optimizer.grad_scale = factor
    elif factor != 1.0:
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(factor)
