"""Who holds how many bytes of tensors at the worst moment: every storage counted from its birth to its death.

Works on any device: a dispatch mode sees each tensor that an operation returns, in the forward and the backward pass
alike, and each storage that is made larger or smaller (FSDP frees and refills those of gathered weights). What happens
inside an operation (a library's packed copy of a matrix) is not a tensor and not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationCounter(TorchDispatchMode):
    """Counts the bytes of storages alive, by owner, and remembers the moment when there were most.

    A storage belongs to the owner it was given to (`own`), else to what `classify` says, else to the label under which
    it was made (`label`, `relabel`).

    Args:
        default: label of what is made outside of any `label` block.
        classify: `classify(label, size_bytes)` names the owner of a new storage.

    Example:
        >>> with AllocationCounter() as counter:
        ...     counter.own("weights", [weight := torch.zeros(10)])
        ...     with counter.label("work"):
        ...         for _ in range(3):
        ...             product = weight * 2
        ...     del product
        >>> counter.live(), counter.peak_by_owner  # the second product was made while the first was still held
        ({'weights': 40}, {'weights': 40, 'work': 80})
    """

    def __init__(self, default: str = "other", classify: Callable[[str, int], str] | None = None) -> None:
        super().__init__()
        self._label = default
        self._classify = classify or (lambda label, size_bytes: label)
        self._owner: dict[int, str] = {}
        self._size: dict[int, int] = {}
        self._finalizers: dict[int, weakref.finalize[Any, Any]] = {}
        self._by_owner: Counter[str] = Counter()
        self._total = 0
        self.peak_bytes = 0
        """The most that was alive at once since the last `reset_peak`."""
        self.peak_by_owner: dict[str, int] = {}
        """Who held it then."""
        self.on_change: Callable[[int, Mapping[str, int]], None] | None = None
        """Called with the bytes alive, in all and by owner, whenever a storage was made, went or changed its size."""

    def own(self, owner: str, tensors: Iterable[Tensor]) -> None:
        """Give the storages of some tensors to an owner, also those that were made before counting began."""
        for tensor in tensors:
            self._count(tensor, owner)

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """What is made in here belongs to `name`, unless it is given to another."""
        before, self._label = self._label, name
        try:
            yield
        finally:
            self._label = before

    def relabel(self, name: str) -> None:
        """From now on what is made belongs to `name`."""
        self._label = name

    def live(self) -> dict[str, int]:
        """Bytes alive now, by owner."""
        return {owner: size for owner, size in self._by_owner.items() if size}

    def reset_peak(self) -> None:
        """Begin a new peak at what is alive now."""
        self.peak_bytes, self.peak_by_owner = self._total, self.live()

    def __enter__(self) -> AllocationCounter:
        """Start counting."""
        self._resize = resize = torch.UntypedStorage.resize_

        def counted(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            self._resized(storage)
            return result

        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stop counting what is made; what is there is still counted until it goes."""
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages that it made."""
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf, None)
        return out

    def _count(self, tensor: Tensor, owner: str | None) -> None:
        for part in _strided_parts(tensor):
            storage = part.untyped_storage()
            key = storage._cdata
            if key not in self._size:
                self._size[key] = size = storage.nbytes()
                self._owner[key] = owner or self._classify(self._label, size)
                self._finalizers[key] = weakref.finalize(storage, self._gone, key)
                self._by_owner[self._owner[key]] += size
                self._total += size
                self._tell()
            elif owner and self._owner[key] != owner:
                self._by_owner[self._owner[key]] -= self._size[key]
                self._by_owner[owner] += self._size[key]
                self._owner[key] = owner
        if self._total > self.peak_bytes:
            self.reset_peak()

    def _resized(self, storage: Any) -> None:
        """No dispatcher sees this."""
        key = storage._cdata
        if key in self._size:
            grown = storage.nbytes() - self._size[key]
            self._size[key] += grown
            self._by_owner[self._owner[key]] += grown
            self._total += grown
            self._tell()
            if self._total > self.peak_bytes:
                self.reset_peak()

    def _gone(self, key: int) -> None:
        size = self._size.pop(key)
        self._total -= size
        self._by_owner[self._owner.pop(key)] -= size
        del self._finalizers[key]
        self._tell()

    def _tell(self) -> None:
        if self.on_change is not None:
            self.on_change(self._total, self._by_owner)


def _strided_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors with storage that make up one: of a sparse tensor its indices and values, of a DTensor its shard."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return [tensor] if tensor.layout == torch.strided else []
