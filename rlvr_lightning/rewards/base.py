"""What a reward is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from rlvr_lightning.schema import Sample


class Reward(ABC):
    """Judges completions, each by itself: the same sample earns the same reward in any company.

    It may raise: `rlvr_lightning.rewards.score.score` contains it. Several rewards are asked at the same time, each in
    a thread of its own, so that those that wait for other processes or machines wait together.
    """

    @abstractmethod
    def __call__(self, samples: Sequence[Sample]) -> Sequence[float] | Awaitable[Sequence[float]]:
        """One finite number for each sample, in their order; may be `async def`."""

    def names_answers(self, record: Mapping[str, Any]) -> bool:
        """Whether it says what the answer in a completion is, so that completions of a record can vote."""
        return type(self).answer is not Reward.answer

    def answer(self, sample: Sample) -> str | None:
        """What a completion states, for counting equal answers: equal ones are the same text. None: it states nothing.

        A reward that does not override this names no answers (`names_answers`).
        """
        return None

    def explain(self, sample: Sample) -> str:
        """Why a sample earned what it did, in a line for people; by default nothing."""
        return ""
