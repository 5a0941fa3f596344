"""The frozen reference of a KL term: the policy as it was at the start, kept as what has changed since.

For each parameter of the policy one of two things is kept: the entries that differ from the start, with the start's
values (6 bytes each for bfloat16 weights), or, where that would not pay, a copy. For the reference's forward pass they
are exchanged with the policy's own values, and back again afterwards. There is no second module, and the log-probs are
those of a separate copy bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlvr_lightning.delta import TensorDelta
from rlvr_lightning.delta.tensor import flat_bits, local
from rlvr_lightning.optim.tensorwise import on_change
from rlvr_lightning.policy import Policy
from rlvr_lightning.ranks import Ranks
from rlvr_lightning.schema import Rollouts

log = logging.getLogger(__name__)

CHUNK = 1 << 20
"""Entries of a shard exchanged at a time."""
MAX_DENSITY = 0.2
"""A tensor of which a larger share has changed is kept as a copy: 1/3 is where a bfloat16 delta stops paying, and
merging deltas needs room for two."""


class Reference:
    """The policy as it was when this object was made; not a module, so that no checkpoint holds it.

    Args:
        policy: with LoRA the reference is the policy without its adapter and costs nothing.
        keep: `delta` keeps what changes, parameter by parameter, and a copy where that does not pay (float32 weights
            change in nearly every entry); `copy` keeps copies from the start.
        max_density: share of a parameter's entries above which it is kept as a copy.
    """

    def __init__(
        self, policy: Policy, keep: Literal["delta", "copy"] = "delta", max_density: float = MAX_DENSITY
    ) -> None:
        self.policy, self.max_density = policy, max_density
        self.adapter = hasattr(policy.model, "disable_adapter")
        trainable = [] if self.adapter else [p for p in policy.model.parameters() if p.requires_grad]
        self._kept: dict[Tensor, TensorDelta | Tensor] = {
            p: TensorDelta.between(p, p) if keep == "delta" and p.element_size() == 2 else local(p).clone()
            for p in trainable
        }
        self._told = False

    @property
    def nbytes(self) -> int:
        """Bytes beside the policy's own."""
        return sum(kept.nbytes for kept in self._kept.values())

    def held_bytes(self, shards: Ranks) -> float:
        """This rank's part of the bytes that all shards of it take, counting once what several ranks hold alike."""
        return sum(kept.nbytes / shards.copies_of(parameter) for parameter, kept in self._kept.items())

    @property
    def follows_changes(self) -> bool:
        """Whether it needs to hear of every change of the weights (`listen`)."""
        return any(isinstance(kept, TensorDelta) for kept in self._kept.values())

    def listen(self, optimizer: Optimizer) -> None:
        """Follow the changes that an optimizer makes; before the first step, with the weights on their device.

        Raises:
            ValueError: it cannot tell what it changes.
        """
        for parameter, kept in self._kept.items():
            self._kept[parameter] = _to(kept, parameter.device)
        if self.follows_changes:
            on_change(optimizer, self._changed, lambda p: isinstance(self._kept.get(p), TensorDelta))

    @torch.no_grad()
    def _changed(self, parameter: Tensor, undo: TensorDelta | Tensor) -> None:
        """The weights moved: what was known to lead to the start, led there from their old values."""
        kept = cast(TensorDelta, self._kept[parameter])
        if isinstance(undo, Tensor):  # all of it, as it was
            start = undo.view(local(parameter).shape)
        elif len(undo) + len(kept) <= 2 * self.max_density * kept.numel:  # else merging takes more than a copy
            merged = undo.then(kept).without_returned(parameter)
            if merged.density <= self.max_density:
                self._kept[parameter] = merged
                return
            start = local(parameter).clone()
            merged.apply_(start)
        else:
            start = local(parameter).clone()
            undo.apply_(start)
        kept.apply_(start)
        self._kept[parameter] = start
        self._tell()

    def _tell(self) -> None:
        total = sum(p.numel() for p in self._kept)
        copied = sum(p.numel() for p, kept in self._kept.items() if isinstance(kept, Tensor))
        if not self._told and copied > 0.01 * total:  # norms are dense at once and cost nothing
            self._told = True
            log.warning(
                "reference: %.0f %% of the weights are kept as copies from now on: more than %.0f %% of their entries "
                "differ from the start",
                100 * copied / total,
                100 * self.max_density,
            )

    def rebase(self, weights: Mapping[Tensor, Tensor]) -> None:
        """Prepare for some of the policy's parameters to be overwritten with a checkpoint's.

        Args:
            weights: parameter -> the values it is about to get, sharded as it is.
        """
        for parameter, kept in list(self._kept.items()):
            if isinstance(kept, TensorDelta) and parameter in weights:
                start = self.start(parameter)
                after = local(weights[parameter]).to(parameter.device, parameter.dtype)
                start_after = TensorDelta.between(after, start)
                self._kept[parameter] = start_after if start_after.density <= self.max_density else start

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The policy's module with the reference's weights; the policy's own come back whatever happens."""
        swapped = []
        try:
            for parameter in self._kept:
                self._swap(parameter)
                swapped.append(parameter)
            yield
        finally:
            if torch.cuda.is_initialized() and any(not parameter.is_cuda for parameter in swapped):
                torch.cuda.synchronize()  # offloaded shards may still be on their way to the GPU
            for parameter in swapped:
                self._swap(parameter)

    def start(self, parameter: Tensor) -> Tensor:
        """A trained parameter's value at the start, a new tensor; of a sharded one, this rank's part of it."""
        kept = _to(self._kept[parameter], parameter.device)  # after a run the policy is back on the CPU
        if not isinstance(kept, TensorDelta):
            return kept.clone()
        start = local(parameter).clone()
        kept.apply_(start)
        return start

    @torch.no_grad()
    def _swap(self, parameter: Tensor) -> None:
        kept = self._kept[parameter]
        if isinstance(kept, TensorDelta):
            kept.swap_(parameter)
        elif hasattr(parameter, "placements"):  # FSDP knows a shard by its memory: exchange the contents
            for mine, theirs in zip(flat_bits(parameter).split(CHUNK), flat_bits(kept).split(CHUNK), strict=True):
                moved = mine.clone()
                mine.copy_(theirs)
                theirs.copy_(moved)
        else:  # exchange the memory, not the contents
            parameter.data, self._kept[parameter] = kept, parameter.data

    @torch.no_grad()
    def logprobs(self, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
        """float32 [R, T] log-probabilities of the completions under the reference."""
        if self.adapter:
            with cast(Any, self.policy.model).disable_adapter():
                return self.policy(rollouts, temperature).logprobs
        with self.in_place():
            return self.policy(rollouts, temperature).logprobs


def _to(kept: TensorDelta | Tensor, device: torch.device) -> TensorDelta | Tensor:
    if isinstance(kept, Tensor):
        return kept.to(device)
    return TensorDelta(kept.indices.to(device), kept.values.to(device), kept.numel)
