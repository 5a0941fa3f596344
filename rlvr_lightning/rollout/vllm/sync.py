"""What an engine in another process or another layout needs in order to hold the policy's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlvr_lightning.delta import TensorDelta
from rlvr_lightning.delta.tensor import local
from rlvr_lightning.optim.tensorwise import on_change
from rlvr_lightning.policy import Policy

MAX_DENSITY = 0.2
"""Share of a tensor's entries above which it is sent whole: 6 bytes an entry against 2."""
PART_BYTES = 512 << 20


@dataclass(frozen=True)
class Part:
    """Some tensors of an update, all of them whole or all of them entries."""

    shapes: dict[str, tuple[int, ...]]
    tensors: dict[str, Tensor]
    """name -> tensor, or name/indices (int32) and name/values."""

    @property
    def nbytes(self) -> int:
        """That are sent."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class WeightSync:
    """Follows the policy's weights from one sync to the next.

    What changed is known from the optimizer's own record of it (`follow`), for weights in 16 bits; without one, and
    after an update that did not arrive, everything is sent.

    Adapters of a policy (LoRA) are all that moves: the weights beneath them are sent once.

    Args:
        policy: whole or sharded.
        dtype: in which the engine holds its weights.
    """

    def __init__(self, policy: Policy, dtype: torch.dtype) -> None:
        self.policy, self.dtype = policy, dtype
        self._following = False
        self._changed: dict[Tensor, TensorDelta | None] | None = None
        named = policy.causal_lm.named_parameters()  # tied ones once
        self._names = {p: name.replace(".base_layer.", ".") for name, p in named if "lora_" not in name}
        self.adapter: Any = policy.model if hasattr(policy.model, "peft_config") else None
        """The model with adapters, if it has any."""

    @property
    def dense_bytes(self) -> int:
        """Of a sync of everything."""
        return sum(p.numel() * self._sent_as(p).itemsize for p in self._names)

    def follow(self, optimizer: Optimizer) -> bool:
        """Listen to an optimizer; False if the weights are such that nearly all of them change, or are sharded."""
        trainable = [p for p in self._names if p.requires_grad]
        if not trainable:
            self._following = True
            return True
        if any(p.element_size() != 2 or hasattr(p, "placements") for p in trainable):
            return False
        on_change(optimizer, self._note, lambda p: p in self._names)
        self._following = True
        return True

    def forget(self) -> None:
        """The engine may hold anything: send everything next time."""
        self._changed = None

    def parts(self) -> Iterator[Part]:
        """What to send now; sending must have ended when the next is asked for. After all of it, `arrived`."""
        if self._changed is None:
            yield from self._dense(list(self._names))
            return
        entries = {p: delta for p, delta in self._changed.items() if delta is not None and len(delta)}
        yield from self._sparse(entries)
        yield from self._dense([p for p, delta in self._changed.items() if delta is None])

    def arrived(self) -> None:
        """The engine holds the policy's weights."""
        trainable = [p for p in self._names if p.requires_grad]
        self._changed = {p: TensorDelta.between(p, p) for p in trainable} if self._following else None

    @property
    def sparse(self) -> bool:
        """Whether the next update sends entries."""
        return self._changed is not None

    def save_adapter(self, folder: Path) -> None:
        """Write the adapters, as peft does."""
        self.adapter.save_pretrained(str(folder))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors."""
        return {name: tuple(p.shape) for p, name in self._names.items()}

    def digests(self) -> Iterator[tuple[str, str]]:
        """SHA-256 of each tensor in the engine's dtype."""
        for p, name in self._names.items():
            values = self._whole(p).to(self.dtype).cpu()
            yield name, hashlib.sha256(values.contiguous().view(torch.uint8).numpy().data).hexdigest()

    @torch.no_grad()
    def _note(self, parameter: Tensor, undo: TensorDelta | Tensor) -> None:
        if self._changed is None:
            return
        kept = self._changed.get(parameter)
        merged = None
        if isinstance(undo, TensorDelta) and kept is not None:
            merged = undo.then(kept) if len(undo) + len(kept) <= 2 * MAX_DENSITY * kept.numel else None
        self._changed[parameter] = merged if merged is not None and merged.density <= MAX_DENSITY else None

    @torch.no_grad()
    def _whole(self, parameter: Tensor) -> Tensor:
        full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        return full.detach().to(self._sent_as(parameter))

    def _sent_as(self, parameter: Tensor) -> torch.dtype:
        """The narrower of the two: what the engine widens, it can widen by itself."""
        return parameter.dtype if parameter.dtype.itemsize < self.dtype.itemsize else self.dtype

    def _dense(self, parameters: list[Tensor]) -> Iterator[Part]:
        held: dict[str, Tensor] = {}
        for p in parameters:
            held[self._names[p]] = self._whole(p)
            if sum(t.nbytes for t in held.values()) >= PART_BYTES:
                yield Part({name: tuple(t.shape) for name, t in held.items()}, held)
                held = {}
        if held:
            yield Part({name: tuple(t.shape) for name, t in held.items()}, held)

    @torch.no_grad()
    def _sparse(self, entries: dict[Tensor, TensorDelta]) -> Iterator[Part]:
        held: dict[str, Tensor] = {}
        for p, delta in entries.items():
            indices = delta.indices.to(torch.int32)
            held[self._names[p] + "/indices"] = indices
            held[self._names[p] + "/values"] = local(p).detach().view(-1)[indices.long()].to(self._sent_as(p))
        if held:
            yield Part({self._names[p]: tuple(p.shape) for p in entries}, held)
