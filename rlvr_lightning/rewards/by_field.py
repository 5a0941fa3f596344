"""Several kinds of problems, each with a reward of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.score import call
from rlvr_lightning.schema import Sample


class ByField(Reward):
    """The reward that a field of the record names: one verifier for benchmarks, or training problems, of several kinds.

    Args:
        rewards: by the value of the field.
        field: key in the data record; `benchmark` is the name under which validation and test problems stand.

    Raises:
        ValueError: there are no rewards, or (on scoring) none for a record.

    Example:
        >>> from rlvr_lightning.rewards.choice import Choice
        >>> from rlvr_lightning.rewards.match import NumericMatch
        >>> judge = ByField({"gpqa": Choice(), "sums": NumericMatch()})
        >>> records = [{"benchmark": "sums", "answer": 7}, {"benchmark": "gpqa", "answer": "B"}]
        >>> judge([Sample(prompt="", text="7", token_ids=[], record=record) for record in records])
        [1.0, 0.0]
    """

    def __init__(self, rewards: dict[str, Reward], field: str = "benchmark") -> None:
        if not rewards:
            raise ValueError("rewards is empty: name a reward for each value of the field")
        self.rewards, self.field = rewards, field

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """What each sample's own reward gives."""
        places: dict[str, list[int]] = {}
        for place, sample in enumerate(samples):
            places.setdefault(self._named(sample.record), []).append(place)
        given = [0.0] * len(samples)
        for name, mine in places.items():
            for place, value in zip(mine, call(self.rewards[name], [samples[place] for place in mine]), strict=True):
                given[place] = value
        return given

    def names_answers(self, record: Mapping[str, Any]) -> bool:
        """Whether the record's own reward does."""
        return self.rewards[self._named(record)].names_answers(record)

    def answer(self, sample: Sample) -> str | None:
        """That of the sample's own reward."""
        return self.rewards[self._named(sample.record)].answer(sample)

    def explain(self, sample: Sample) -> str:
        """That of the sample's own reward."""
        return self.rewards[self._named(sample.record)].explain(sample)

    def _named(self, record: Mapping[str, Any]) -> str:
        name = str(record.get(self.field))
        if name not in self.rewards:
            raise ValueError(f"{self.field}: {name!r:.60} has no reward among {', '.join(self.rewards)}")
        return name
