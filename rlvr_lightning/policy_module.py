"""What every algorithm needs to train a policy: the model, its precision, the optimizer, and one step of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer

from rlvr_lightning.checkpoint import DeltaCheckpoints
from rlvr_lightning.checkpoint.start import model_name
from rlvr_lightning.learning_rate import with_warmup
from rlvr_lightning.metrics import summed
from rlvr_lightning.optim.release import GradientRelease
from rlvr_lightning.optim.subnetwork import Frozen, open_subnetwork
from rlvr_lightning.optim.updates import Updates
from rlvr_lightning.policy import LoRA, Policy, load_model, load_tokenizer, resolve_model
from rlvr_lightning.reference import Reference
from rlvr_lightning.rollout import HFEngine, stop_token_ids
from rlvr_lightning.schema import LossOutput, one_token
from rlvr_lightning.strategy import Layout, build_policy
from rlvr_lightning.trainer_checks import check_optimizer, check_steps, check_subnetwork, check_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Part = TypeVar("Part")


class PolicyModule(DeltaCheckpoints):
    """A causal LM with an optimizer; a subclass turns batches into losses and calls `take_step`.

    Args:
        model: the policy: `tiny`, `smollm2`, a folder, or a hub name. The reference is its state at the start.
        optimizer: any torch optimizer; called with the trainable parameters.
        scheduler: learning-rate schedule, stepped after each optimizer step; None keeps the rate.
        warmup_steps: optimizer steps over which the rate rises linearly to its value.
        max_grad_norm: clip the gradient's global norm to this; 0 turns it off (unclipped SGD can destroy a model).
        reference: how the policy's state at the start is kept: as the entries that changed since, or as a copy; both
            give the same numbers. Under LoRA it is the model without its adapters, and costs nothing.
        lora: train adapters of this shape instead of the weights.
        dtype: of the stored weights.
        compute_dtype: of activations and arithmetic; `auto` is that of the weights, but float32 for 16-bit weights on a
            CPU, which is several times faster there. Layers cast their weights as they run, never the whole model.
        gradient_release: update weights during the backward pass, so that gradients never exist all at once.
        activation_checkpointing: recompute layers in the backward pass: less memory, about a third more time.
        subnetwork: a file of `subnetwork` or `delta diff`: train the entries of its mask, or those that it changes, and
            freeze all others, bit for bit.
        seed: of all that is drawn; use the run's seed.

    Raises:
        ValueError: settings that cannot work together, before any weights are loaded.
    """

    counts: tuple[str, ...] = ("nonfinite_in_row",)

    def __init__(  # noqa: PLR0913 (the YAML's `model:` block, flat on purpose)
        self,
        model: str,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        max_grad_norm: float = 1.0,
        reference: Literal["delta", "copy", "none"] = "none",
        lora: LoRA | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        gradient_release: GradientRelease | None = None,
        activation_checkpointing: bool = False,
        subnetwork: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        check_subnetwork(subnetwork, optimizer, bool(lora), getattr(torch, dtype))
        if reference == "copy" and lora:
            raise ValueError(
                "model.reference: copy does not go with lora, whose reference is the model without its adapters and "
                "costs nothing; leave it out"
            )
        check_optimizer(optimizer, gradient_release, reference == "delta" and not lora and dtype == "bfloat16")
        self.model_name = resolve_model(model)
        self.tokenizer = load_tokenizer(self.model_name)
        self.make_optimizer, self.make_scheduler, self.warmup_steps = optimizer, scheduler, warmup_steps
        self.max_grad_norm, self.keep_reference, self.gradient_release = max_grad_norm, reference, gradient_release
        self.lora, self.weights_dtype, self.compute_dtype = lora, getattr(torch, dtype), compute_dtype
        self.activation_checkpointing, self.seed = activation_checkpointing, seed
        self.policy: Policy = cast(Policy, None)  # built by configure_model
        self.reference: Reference | None = None
        self.updates: Updates = cast(Updates, None)  # made with the optimizer
        self.subnetwork = subnetwork
        self.frozen: Frozen | None = None
        self.layout = Layout()
        self.nonfinite_in_row = 0  # optimizer steps
        self.phase_listeners: list[Callable[[str], None]] = []

    # ---- building ----

    def configure_model(self) -> None:
        """Load the policy, and the reference if there is to be one, once."""
        if self.policy is not None:
            return
        how = (self._trainer, self.compute_dtype, self.activation_checkpointing)
        self.policy, self.layout = build_policy(self._new_policy, *how)
        if self.keep_reference != "none":
            self.reference = Reference(self.policy, self.keep_reference)
        if self.subnetwork:
            self.frozen = self._freeze(Path(self.subnetwork).expanduser())
        self.remember_start(self.reference)

    def _freeze(self, path: Path) -> Frozen:
        """Before the optimizer is made, whose hooks may use up gradients."""
        own = {model_name(name): p for name, p in self.named_parameters() if name.startswith("policy.model.")}
        try:
            return Frozen(own, open_subnetwork(path, own))
        except ValueError as error:
            raise ValueError(f"model.subnetwork: {error}") from None

    def _new_policy(self, empty: bool) -> Policy:
        model = self.load_model(empty)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # adapters are drawn alike, however many numbers were drawn before
            return Policy(self.lora.adapt(model) if self.lora else model)

    def load_model(self, empty: bool = False) -> PreTrainedModel:
        """The causal LM to train, or only its shapes (see `policy.load_model`); a subclass may make one of its own."""
        return load_model(self.model_name, self.weights_dtype, empty=empty)

    def embedded_engine(self, stop: Iterable[str], max_batch: int) -> HFEngine:
        """An engine that samples from the policy's own weights.

        Args:
            stop: strings that end a completion beside the end-of-sequence token.
            max_batch: completions decoded at once.
        """
        stops, pad = stop_token_ids(self.tokenizer, list(stop)), self.tokenizer.pad_token_id
        runner = self.layout.runner(self.policy)
        return HFEngine(self.policy.model, stops, pad, max_batch=max_batch, runner=runner)

    def trained(self) -> list[torch.nn.Parameter]:
        """What the optimizer gets."""
        return [p for p in self.policy.parameters() if p.requires_grad]

    def groups(self) -> list[Any]:
        """How the optimizer gets it: as it is, or as parameter groups with settings of their own."""
        return self.trained()

    def configure_optimizers(self) -> Any:
        """The optimizer over trainable parameters, with its schedule."""
        optimizer = self.make_optimizer(self.groups())
        if self.updates is not None:  # of an earlier fit
            self.updates.close()
        shards = self.layout.shards
        self.updates = Updates(optimizer, self.manual_backward, self.max_grad_norm, self.gradient_release, shards)
        if self.reference is not None:
            self.reference.listen(optimizer)
        scheduler = with_warmup(optimizer, self.make_scheduler, self.warmup_steps)
        return [optimizer], [] if scheduler is None else [scheduler]

    def setup(self, stage: str) -> None:
        """Check what the trainer and the data module bring."""
        super().setup(stage)
        if stage == "fit":
            self.check(self.trainer, getattr(self.trainer, "datamodule", None))

    def check(self, trainer: Trainer, data: Any) -> None:
        """Raise ValueError for a trainer or a data module that a fit cannot work with, before anything is loaded."""
        check_trainer(trainer, self.weights_dtype)
        check_steps(trainer)

    # ---- one optimizer step ----

    def take_step(self, parts: Sequence[Part], loss_of: Callable[[Part], LossOutput]) -> dict[str, float]:
        """Forward and backward pass of each part, then one step of the optimizer and of its schedule.

        All ranks call it together. The parts' losses must add up, over all parts of all ranks, to the loss of the step:
        then neither the cut into parts nor the number of ranks changes the gradient.

        Args:
            parts: of this rank; ranks may have different numbers of them, or none.
            loss_of: the forward pass of a part.

        Returns:
            This rank's sums of the parts' metrics and of their `loss`, `steps`: 1, and what `Updates.finish` tells,
            which is of all ranks.
        """
        most = self.layout.data.most(len(parts))
        self.updates.begin(most)
        sums = summed(self._forward_backward(loss_of, part) for part in parts)
        for _ in range(most - len(parts)):
            self._idle_pass()
        self._phase("optimizer")
        finite = not self.layout.data.any(not math.isfinite(sums.get("loss", 0.0)))
        optimizers = self.optimizers()
        own = cast(LightningOptimizer, optimizers[0] if isinstance(optimizers, list) else optimizers)
        sums |= {"steps": 1.0} | self.updates.finish(own.step, finite)
        self.nonfinite_in_row = self.nonfinite_in_row + 1 if "nonfinite" in sums else 0
        if (scheduler := self.lr_schedulers()) is not None:
            scheduler.step()  # type: ignore[union-attr]
        return sums

    def _forward_backward(self, loss_of: Callable[[Part], LossOutput], part: Part) -> dict[str, float]:
        self._phase("forward")
        out = loss_of(part)
        self._phase("backward")
        self.updates.backward(out.loss * self.layout.data.size)  # ranks are averaged, the weights are global
        maxima = {f"{name}_max": value for name, value in out.maxima.items()}
        found = out.metrics | maxima | {"loss": out.loss.detach()}
        return {name: float(value) for name, value in found.items()}

    def _idle_pass(self) -> None:
        """A forward and a backward pass for nothing but the ranks that have more: layers are gathered by all."""
        out = self.policy(one_token(cast(int, self.tokenizer.pad_token_id), self.layout.data.device))
        self.updates.backward(0.0 * torch.stack([part.sum() for part in out if part is not None]).sum())

    def _phase(self, name: str) -> None:
        for listener in self.phase_listeners:
            listener(name)
