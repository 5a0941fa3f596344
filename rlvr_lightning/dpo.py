"""DPO and IPO: preferences as a classification of pairs, with the policy at the start as reference.

The reference is the policy's own state at the start, kept as what has changed since (`reference.py`): one more forward
pass of each pair, no second model, no file of log-probabilities that has to fit the data, and the same numbers after a
resume.

Run it: ``python -m rlvr_lightning fit --config dpo.yaml``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from rlvr_lightning.offline import Text
from rlvr_lightning.preference import Preferences, check_positive
from rlvr_lightning.preference_losses import PairLoss, dpo_loss
from rlvr_lightning.schema import LossOutput


class DPO(Preferences):
    """Learns from pairs by DPO or IPO.

    Args:
        model: the policy: `tiny`, `smollm2`, a folder, or a hub name. The reference is its state at the start.
        optimizer: any torch optimizer; called with the trainable parameters.
        beta: how much the policy is held to the reference; IPO's tau.
        loss: `sigmoid` is DPO, `ipo` is IPO; see `preference_losses.dpo_loss`.
        label_smoothing: share of the labels taken to be wrong, of `sigmoid` alone.
        reference: how the reference is kept: as the entries that changed since the start, or as a copy; both give the
            same numbers. Under LoRA it is the model without its adapters, and costs nothing.
        kwargs: see `Offline` and `PolicyModule`.

    Raises:
        ValueError: settings that cannot work together, before any weights are loaded.
    """

    def __init__(
        self,
        model: str,
        optimizer: OptimizerCallable,
        beta: float = 0.1,
        loss: PairLoss = "sigmoid",
        label_smoothing: float = 0.0,
        reference: Literal["delta", "copy"] = "delta",
        **kwargs: Any,
    ) -> None:
        check_positive(beta=beta)
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"model.label_smoothing must lie in [0, 0.5), got {label_smoothing}")
        if label_smoothing and loss == "ipo":
            raise ValueError("model.label_smoothing is of loss: sigmoid; leave it out with ipo")
        super().__init__(model=model, optimizer=optimizer, reference=reference, **kwargs)
        self.beta, self.loss, self.label_smoothing = beta, loss, label_smoothing

    def loss_of(
        self, texts: Sequence[Text], logprobs: Tensor, ref_logprobs: Tensor | None, totals: Mapping[str, Any]
    ) -> LossOutput:
        """The mean over all pairs of the batch."""
        assert ref_logprobs is not None
        return dpo_loss(logprobs, ref_logprobs, self.beta, totals["texts"], self.loss, self.label_smoothing)
