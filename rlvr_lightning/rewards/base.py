"""What a reward is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence

from rlvr_lightning.schema import Sample


class Reward(ABC):
    """Judges completions, each by itself: the same sample earns the same reward in any company.

    It may raise: `rlvr_lightning.rewards.score.score` contains it. Several rewards are asked at the same time, each in
    a thread of its own, so that those that wait for other processes or machines wait together.
    """

    @abstractmethod
    def __call__(self, samples: Sequence[Sample]) -> Sequence[float] | Awaitable[Sequence[float]]:
        """One finite number for each sample, in their order; may be `async def`."""

    def answer(self, sample: Sample) -> str | None:
        """What a completion states, for counting equal answers: equal ones are the same text. None: it states nothing.

        A reward that does not override this names no answers at all (`names_answers`).
        """
        return None

    def explain(self, sample: Sample) -> str:
        """Why a sample earned what it did, in a line for people; by default nothing."""
        return ""


def names_answers(reward: Reward) -> bool:
    """Whether a reward says what a completion's answer is, so that completions can vote."""
    return type(reward).answer is not Reward.answer
