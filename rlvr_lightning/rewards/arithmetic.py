"""The reward of the built-in arithmetic world."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.schema import Sample

# Few digits: int() of a very long text takes quadratic time, or raises.
INTEGER = re.compile(r"[+-]?[0-9]{1,30}")


class FinalAnswer(Reward):
    """1 if the completion ends with the marker and the right integer, else 0.

    Only what follows the last marker counts, and nothing may follow the number but white space; so naming many answers
    earns nothing. A truncated completion earns 0: its last digits may be missing. Nothing of the text is evaluated.

    Args:
        marker: what announces the answer.
        field: key of the right answer (an int, or a text that reads as one) in the data record.

    Example:
        >>> sample = lambda text: Sample(prompt="1+1=", text=text, token_ids=[], record={"answer": 2})
        >>> FinalAnswer()([sample("+1=2 answer 2"), sample("answer 2 answer 3"), sample("2")])
        [1.0, 0.0, 0.0]
    """

    def __init__(self, marker: str = "answer ", field: str = "answer") -> None:
        if not marker:
            raise ValueError("marker must not be empty")
        self.marker = marker
        self.field = field

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """1.0 or 0.0 for each sample; KeyError if a record has no answer."""
        return [float(self._right(sample)) for sample in samples]

    def answer(self, sample: Sample) -> str | None:
        """The integer."""
        stated = self._stated(sample)
        return stated if stated is None else str(stated)

    def explain(self, sample: Sample) -> str:
        """What the text ends with."""
        _, found, tail = sample.text.rpartition(self.marker)
        cut = ", and the text is cut" if sample.truncated else ""
        return f"{tail if found else None!r:.60} after {self.marker!r}, right is {sample.record[self.field]!r}{cut}"

    def _right(self, sample: Sample) -> bool:
        return self._stated(sample) == int(sample.record[self.field])

    def _stated(self, sample: Sample) -> int | None:
        _, found, tail = sample.text.rpartition(self.marker)
        stated = INTEGER.fullmatch(tail.strip())
        return int(stated[0]) if found and stated and not sample.truncated else None
