"""What the algorithms that learn from pairs of completions share: two sides over one prompt, and what is logged.

Both sides of a pair are a group of two over their prompt, so that the prompt is computed once. Logged of training
batches, and as `val/<benchmark>/...` of held-out pairs:

    rewards/chosen, rewards/rejected    the implicit reward of each side, a mean over pairs
    rewards/margin                      chosen less rejected
    rewards/accuracy                    share of pairs whose chosen side has the higher one; equal ones count one half
"""

from __future__ import annotations

from typing import ClassVar

from rlvr_lightning.offline import Offline, Record, Text, ids_of

PAIR_MEANS = {f"rewards/{name}": f"{name}/pairs" for name in ("chosen", "rejected", "margin", "accuracy")}


class Preferences(Offline):
    """Learns from records with `chosen` and `rejected` (str) beside the prompt; a subclass says how (`loss_of`)."""

    field = "chosen"
    group = 2
    means: ClassVar[dict[str, str]] = PAIR_MEANS
    shown = ("rewards/accuracy", "rewards/margin")

    def text_of(self, record: Record) -> Text:
        """Both sides."""
        sides = [ids_of(record, name, self.tokenizer, self.ends) for name in ("chosen", "rejected")]
        if sides[0] == sides[1]:
            raise ValueError(
                f"data: record {record.get('index')} has two equal sides, chosen and rejected; leave it out"
            )
        return Text(prompt_ids=record["prompt_ids"], completions=sides)


def check_positive(**settings: float) -> None:
    """Raise ValueError for a setting of the model that is not positive."""
    for name, value in settings.items():
        if value <= 0:
            raise ValueError(f"model.{name} must be positive, got {value}")
