"""KTO: completions that are good or bad, each by itself, against how far the policy is from the reference.

How far is estimated in every batch, before it is learned from, by completions behind the prompts of others: text i's
prompt and text i+1's completion, over the whole batch and all ranks (arXiv 2402.01306, section 4.1); and where such
neighbours have the same prompt, as in files of several completions a prompt, that of a text further on. So a batch
should have some dozens of texts, of several prompts, in an order in which good and bad ones are mixed; `PromptData`
draws such an order for training.

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

from rlvr_lightning.offline import Offline, Record, Text, ids_of, keys
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
        ids, label = ids_of(record, "completion", self.tokenizer, self.ends), record.get("label")
        if not isinstance(label, bool):
            said = f"the label {label!r}" if "label" in record else f"no label; its fields are {keys(record)}"
            raise ValueError(f"data: record {record.get('index')} has {said}; make it true or false")
        return Text(prompt_ids=record["prompt_ids"], completions=[ids], good=label)

    @torch.no_grad()
    def before(self, texts: Sequence[Text]) -> dict[str, Any]:
        """The estimate of KL(policy || reference)."""
        assert self.reference is not None
        mine = self._share(mismatched(texts))
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


def mismatched(texts: Sequence[Text]) -> list[Text]:
    """Each text with the completion some places further on, cyclically, without those that have the same prompt.

    As many places as keep the most texts, and of these the fewest; then each completion is taken once at most.

    Example:
        >>> some = [Text(prompt_ids=[p], completions=[[c]]) for p, c in ((1, 5), (1, 6), (2, 7), (2, 8))]
        >>> [(text.prompt_ids, text.completions) for text in mismatched(some)]
        [([1], [[7]]), ([1], [[8]]), ([2], [[5]]), ([2], [[6]])]
    """
    prompts, num = [tuple(text.prompt_ids) for text in texts], len(texts)
    kept = [[i for i in range(num) if prompts[i] != prompts[(i + shift) % num]] for shift in range(1, num)]
    if not kept:
        return []
    best = max(range(num - 1), key=lambda at: len(kept[at]))  # the first of equal ones
    return [replace(texts[i], completions=texts[(i + best + 1) % num].completions) for i in kept[best]]
