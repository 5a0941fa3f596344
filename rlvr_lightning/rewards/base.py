"""What a reward is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from rlvr_lightning.schema import Sample


class Reward(ABC):
    """Judges completions, each by itself: the same sample earns the same reward in any company.

    It may raise: `rlvr_lightning.rewards.score.score` contains it.
    """

    @abstractmethod
    def __call__(self, samples: Sequence[Sample]) -> Sequence[float]:
        """One finite number for each sample, in their order."""
