"""Who owns the tensors of a running GRPO module, told to a counter under the names of `ledger.Held`.

Weights, reference, optimizer state and gradients are what the module holds; logits, keys and values, and casts of
weights are what the functions make that are named below; all else belongs to the phase in which it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from rlvr_lightning import compute
from rlvr_lightning.delta.tensor import local
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.logprobs import _TokenLogprobs
from rlvr_lightning.optim import SGD, bits, update
from rlvr_lightning.profiling.ledger import Ledger, of_phases
from rlvr_lightning.profiling.sharding_counter import REDUCING, ShardingCounter
from rlvr_lightning.rollout import hf
from rlvr_lightning.rollout.attention import PromptPass
from rlvr_lightning.rollout.cache import SharedCache

PHASES = {  # of a GRPO module: the owner of what is made in it
    "rollout": "rollout_workspace",
    "reference": "activations",
    "forward": "activations",
    "backward": "activations",
    "optimizer": "optimizer_workspace",
}
MAKERS: list[tuple[Any, str, str]] = [  # all that these make
    (_TokenLogprobs, "forward", "logits"),
    (_TokenLogprobs, "backward", "logits"),
    (hf, "sample", "logits"),
    (SharedCache, "add", "kv_cache"),
    (SharedCache, "keep", "kv_cache"),
    (SharedCache, "open_column", "kv_cache"),
    (SharedCache, "_write", "kv_cache"),
    (SGD, "update_parameter", "optimizer_workspace"),
]
RESULTS: list[tuple[Any, str, str]] = [  # what these return
    (hf._Run, "_logits", "logits"),
    (compute, "scratch", "compute_copy"),
    (update, "scratch", "optimizer_workspace"),
    (bits, "scratch", "optimizer_workspace"),
]
SMALL_BYTES = 1 << 14
"""Tensors up to this size are not told by it to be gradients."""


class Owners:
    """Watches one module; `counter` has the bytes."""

    def __init__(self) -> None:
        self.counter = ShardingCounter("other", self._classify)
        self.phase = ""
        self.peaks: dict[str, dict[str, int]] = {}
        """Phase -> bytes by owner when there were most in it, of the last step of several that held as much."""
        self._module: GRPO | None = None
        self._parameters: list[Tensor] = []
        self._gradients: set[int] = set()
        self._reducing: set[int] = set()

    @contextmanager
    def watching(self, module: GRPO) -> Iterator[None]:
        """Count what happens in here."""
        self._module = module
        module.phase_listeners.append(self.enter)
        try:
            with ExitStack() as stack:
                for place, name, owner in MAKERS:
                    stack.enter_context(replaced(place, name, self._making(owner)))
                for place, name, owner in RESULTS:
                    stack.enter_context(replaced(place, name, self._giving(owner)))
                stack.enter_context(replaced(PromptPass, "attend", self._reading))
                self.own()
                self.counter.reset_peak()
                stack.enter_context(self.counter)
                yield
        finally:
            self._note()
            module.phase_listeners.remove(self.enter)

    def enter(self, phase: str) -> None:
        """The module enters a phase; "" is none."""
        self._note()
        self.own()
        self.counter.reset_peak()
        self.phase = self.counter.phase = phase
        self.counter.relabel(PHASES.get(phase, "other"))

    def own(self) -> None:
        """Give the counter what lives from step to step."""
        module = self._module
        if module is None or module.policy is None:
            return
        # those of the first time: while FSDP has gathered a layer, it puts whole tensors in the place of shards
        self._parameters = parameters = self._parameters or list(module.policy.parameters())
        trained = [p for p in parameters if p.requires_grad]
        self._gradients = {local(p).nbytes for p in trained if local(p).nbytes > SMALL_BYTES}
        wholes = {p.numel() * width for p in trained for width in (2, 4) if hasattr(p, "placements")}
        self._reducing = {size for size in wholes if size > SMALL_BYTES}
        self.counter.own("weights", parameters)
        if module.reference is not None:
            for kept in module.reference._kept.values():
                self.counter.own("reference", [kept] if isinstance(kept, Tensor) else [kept.indices, kept.values])
        if module.frozen is not None:
            self.counter.own("subnetwork", module.frozen.bits.values())
        for optimizer in module.trainer.optimizers if module._trainer else []:
            for state in optimizer.state.values():
                self.counter.own("optimizer_state", [v for v in state.values() if isinstance(v, Tensor)])
        self.counter.own("gradients", [p.grad for p in parameters if p.grad is not None])

    def ledger(self) -> Ledger:
        """An instant for each phase seen.

        Raises:
            ValueError: there was none.
        """
        return of_phases(self.peaks)

    def _note(self) -> None:
        most = self.counter.peak_by_owner
        if sum(most.values()) >= sum(self.peaks.get(self.phase, {}).values()):
            self.peaks[self.phase] = dict(most)

    def _classify(self, label: str, size: int) -> str:
        """Storages of exactly a parameter's size made by the backward pass are gradients before autograd says so.

        Of a sharded one's whole size they are on their way to shards.
        """
        backward = self.phase == "backward" and label in ("activations", "logits")
        if backward and size in self._reducing:
            return REDUCING
        return "gradients" if backward and size in self._gradients else label

    def _making(self, owner: str) -> Callable[[Any], Any]:
        def wrap(function: Any) -> Any:
            def inside(*args: Any, **kwargs: Any) -> Any:
                with self.counter.label(owner):
                    return function(*args, **kwargs)

            return inside

        return wrap

    def _giving(self, owner: str) -> Callable[[Any], Any]:
        def wrap(function: Any) -> Any:
            def given(*args: Any, **kwargs: Any) -> Any:
                result = function(*args, **kwargs)
                self.counter.own(owner, [result])
                return result

            return given

        return wrap

    def _reading(self, function: Any) -> Any:
        def attend(state: PromptPass, layer: int, *args: Any) -> Any:
            result = function(state, layer, *args)
            self.counter.own("kv_cache", state.layers[layer])
            return result

        return attend


@contextmanager
def replaced(place: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """In here `place.name` is what `wrap` makes of it."""
    before = vars(place)[name]
    static = isinstance(before, staticmethod)
    wrapped = wrap(before.__func__ if static else before)
    setattr(place, name, staticmethod(wrapped) if static else wrapped)
    try:
        yield
    finally:
        setattr(place, name, before)
