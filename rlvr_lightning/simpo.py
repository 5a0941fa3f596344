"""SimPO: preferences by the mean log-probability of a side's tokens, without a reference.

Run it: ``python -m rlvr_lightning fit --config simpo.yaml``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from rlvr_lightning.offline import Text, lengths_of
from rlvr_lightning.preference import Preferences, check_positive
from rlvr_lightning.preference_losses import simpo_loss
from rlvr_lightning.schema import LossOutput


class SimPO(Preferences):
    """Learns from pairs by SimPO.

    Args:
        model: the policy: `tiny`, `smollm2`, a folder, or a hub name.
        optimizer: any torch optimizer; called with the trainable parameters.
        beta: scale of the rewards, which are beta times the mean log-probability of a side's tokens.
        margin: by which the chosen side's reward should be higher (gamma).
        kwargs: see `Offline` and `PolicyModule`.

    Raises:
        ValueError: settings that cannot work together, before any weights are loaded.
    """

    def __init__(
        self, model: str, optimizer: OptimizerCallable, beta: float = 2.0, margin: float = 1.0, **kwargs: Any
    ) -> None:
        check_positive(beta=beta)
        super().__init__(model=model, optimizer=optimizer, reference="none", **kwargs)
        self.beta, self.margin = beta, margin

    def loss_of(
        self, texts: Sequence[Text], logprobs: Tensor, ref_logprobs: Tensor | None, totals: Mapping[str, Any]
    ) -> LossOutput:
        """The mean over all pairs of the batch."""
        return simpo_loss(logprobs, lengths_of(texts, logprobs), self.beta, self.margin, totals["texts"])
