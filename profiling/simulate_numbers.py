"""Tensors of which only shapes are there, beside token ids, masks and lengths that are real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
REAL_BYTES = 16 << 20
"""Integers and masks up to this size are real."""
UNWRITTEN = {aten.empty.memory_format, aten.empty_strided.default}
UNWRITTEN_BYTES = 1 << 12
"""Those with nothing written to them yet are real up to this size: torch copies objects by way of such."""


class WithoutNumbers(FakeTensorMode):
    """Weights, activations and gradients are shapes; token ids, masks, positions and lengths are there.

    What an operation returns is real if its tensors are, or if it takes none and makes integers or booleans; except
    where that would be large. So a program decides by lengths and masks as ever, and
    what it decides by a number that is not there (a norm, a loss) is decided as if the number were 1.

    Args:
        scratch: keep the buffers of `heap.scratch`, as is done on a CPU.

    Example:
        >>> with WithoutNumbers():
        ...     weight, ids = torch.ones(5, 3), torch.tensor([1, 4])
        ...     print(weight[ids].shape, ids.sum().item(), weight.sum().item())
        torch.Size([2, 3]) 5 1.0
    """

    def __init__(self, scratch: bool = True) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.scratch: dict[Any, Tensor] | None = {} if scratch else None

    def __deepcopy__(self, memo: dict[int, Any]) -> WithoutNumbers:
        """A tensor's copy is of the same mode: torch's weak references do not survive to be copied."""
        return self

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation for real, or on shapes."""
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            if func is aten._local_scalar_dense.default:
                return torch.ones((), dtype=given[0].dtype).item()
            return super().__torch_dispatch__(func, types, args, kwargs)
        if torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        try:
            shapes = super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(shapes) if isinstance(leaf, Tensor)]
        most = UNWRITTEN_BYTES if func in UNWRITTEN else REAL_BYTES
        missing = any(t.nbytes > most or (not given and t.is_floating_point()) for t in made)
        return shapes if missing else func(*args, **kwargs)
