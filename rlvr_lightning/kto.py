"""KTO: completions that are good or bad, each by itself, against how far the policy is from the reference.

How far is estimated in every batch, before it is learned from, by completions behind the prompts of others: text i's
prompt and text i+1's completion, over the whole batch and all ranks (arXiv 2402.01306, section 4.1). So a batch should
have some dozens of texts, in an order in which good and bad ones are mixed; `PromptData` draws such an order.

Logged: `rewards/chosen` and `rewards/rejected`, the mean implicit reward of good and of bad completions,
`rewards/margin`, their difference, `rewards/accuracy`, the share of completions on the right side of the estimate (one
half for those on it), and `rewards/kl`, the estimate, in nats of a completion.

Run it: ``python -m rlvr_lightning fit --config kto.yaml``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from rlvr_lightning.offline import Offline, Record, Text, ids_of
from rlvr_lightning.preference import check_positive
from rlvr_lightning.preference_losses import kto_kl, kto_loss
from rlvr_lightning.schema import LossOutput


class KTO(Offline):
    """Learns from records with `completion` (str) and `label` (bool) beside the prompt.

    Args:
        model: the policy: `tiny`, `smollm2`, a folder, or a hub name. The reference is its state at the start.
        optimizer: any torch optimizer; called with the trainable parameters.
        beta: how sharply value saturates, and how much the policy is held to the reference.
        good_weight: of good completions; the paper has weight times number of good and bad ones within 1 to 4/3.
        bad_weight: of bad ones.
        reference: how the reference is kept: as the entries that changed since the start, or as a copy; both give the
            same numbers. Under LoRA it is the model without its adapters, and costs nothing.
        kwargs: see `Offline` and `PolicyModule`.

    Raises:
        ValueError: settings that cannot work together, before any weights are loaded.
    """

    field = "label"
    means: ClassVar[dict[str, str]] = {
        "rewards/chosen": "chosen/good",
        "rewards/rejected": "rejected/bad",
        "rewards/accuracy": "accurate/completions",
        "rewards/kl": "kl/completions",
    }
    shown = ("rewards/accuracy", "rewards/margin")

    def __init__(
        self,
        model: str,
        optimizer: OptimizerCallable,
        beta: float = 0.1,
        good_weight: float = 1.0,
        bad_weight: float = 1.0,
        reference: Literal["delta", "copy"] = "delta",
        **kwargs: Any,
    ) -> None:
        check_positive(beta=beta, good_weight=good_weight, bad_weight=bad_weight)
        super().__init__(model=model, optimizer=optimizer, reference=reference, **kwargs)
        self.beta, self.good_weight, self.bad_weight = beta, good_weight, bad_weight

    def text_of(self, record: Record) -> Text:
        """The completion and its label."""
        ids = ids_of(record, "completion", self.tokenizer)
        if not isinstance(record["label"], bool):
            raise ValueError(
                f"data: record {record.get('index')} has the label {record['label']!r}; make it true or false"
            )
        return Text(prompt_ids=record["prompt_ids"], completions=[ids], good=record["label"])

    @torch.no_grad()
    def before(self, texts: Sequence[Text]) -> dict[str, Any]:
        """The estimate of KL(policy || reference)."""
        assert self.reference is not None
        mismatched = [
            replace(text, completions=texts[(i + 1) % len(texts)].completions) for i, text in enumerate(texts)
        ]
        mine = self._share(mismatched) if len(texts) > 1 else []
        now, _ = self.logprobs(mine, lambda rollouts: self.policy(rollouts).logprobs)
        then, _ = self.logprobs(mine, self.reference.logprobs)
        everyones = [pair for part in self.ranks.gather(torch.cat([now, then], 1).tolist()) for pair in part]
        return {"kl": float(kto_kl(*torch.tensor(everyones).view(-1, 2).unbind(1)))}

    def loss_of(
        self, texts: Sequence[Text], logprobs: Tensor, ref_logprobs: Tensor | None, totals: Mapping[str, Any]
    ) -> LossOutput:
        """The mean over all completions of the batch."""
        assert ref_logprobs is not None
        good = torch.tensor([text.good for text in texts], dtype=torch.bool, device=logprobs.device)
        now, then, weights = logprobs[:, 0], ref_logprobs[:, 0], (self.good_weight, self.bad_weight)
        return kto_loss(now, then, good, totals["kl"], self.beta, weights, totals["texts"])

    def _means(self, sums: Mapping[str, float]) -> dict[str, float]:
        found = super()._means(sums)
        if {"rewards/chosen", "rewards/rejected"} <= set(found):
            found["rewards/margin"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found
