"""ORPO: imitation of the chosen sides and preferences by odds in one loss, without a reference.

Run it: ``python -m rlvr_lightning fit --config orpo.yaml``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from rlvr_lightning.offline import Text, lengths_of
from rlvr_lightning.preference import PAIR_MEANS, Preferences, check_positive
from rlvr_lightning.preference_losses import orpo_loss
from rlvr_lightning.schema import LossOutput


class ORPO(Preferences):
    """Learns from pairs by ORPO; also logs `nll`, nats per token of the chosen sides.

    Args:
        model: the policy: `tiny`, `smollm2`, a folder, or a hub name.
        optimizer: any torch optimizer; called with the trainable parameters.
        weight: of the term on the ratio of odds (lambda).
        kwargs: see `Offline` and `PolicyModule`.

    Raises:
        ValueError: settings that cannot work together, before any weights are loaded.
    """

    means: ClassVar[dict[str, str]] = PAIR_MEANS | {"nll": "nll/tokens"}

    def __init__(self, model: str, optimizer: OptimizerCallable, weight: float = 0.1, **kwargs: Any) -> None:
        check_positive(weight=weight)
        super().__init__(model=model, optimizer=optimizer, reference="none", **kwargs)
        self.weight = weight

    def loss_of(
        self, texts: Sequence[Text], logprobs: Tensor, ref_logprobs: Tensor | None, totals: Mapping[str, Any]
    ) -> LossOutput:
        """The mean over all chosen tokens, and over all pairs, of the batch."""
        lengths = lengths_of(texts, logprobs)
        return orpo_loss(logprobs, lengths, self.weight, totals["texts"], totals["first_tokens"])
