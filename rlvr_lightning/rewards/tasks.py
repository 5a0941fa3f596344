"""The reward of the few-shot problems: the answer, the whole answer and nothing else on the line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.schema import Sample


class TaskReward(Reward):
    r"""1 if the first line of the completion is the right answer, else 0.

    A problem of reasoning-gym (its record holds the gym's `entry`) is judged by the gym's own scorer, and counts when
    that gives full marks: its partial credit for an answer among other text would reward listing answers. Any other
    answer must match exactly, but for white space around it. A completion cut by the length limit earns 0.

    Raises:
        ValueError: (on scoring a problem of it) the package reasoning-gym is missing.

    Example:
        >>> sample = lambda text: Sample(prompt="3 + 4 =", text=text, token_ids=[], record={"answer": "7"})
        >>> TaskReward()([sample(" 7\n"), sample(" 7 or 8"), sample("07")])
        [1.0, 0.0, 0.0]
    """

    def __init__(self) -> None:
        self._scorers: dict[str, Callable[[str, Mapping[str, Any]], float]] = {}

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """1.0 or 0.0 for each sample; KeyError if a record has no answer."""
        return [float(self._right(sample)) for sample in samples]

    def _right(self, sample: Sample) -> bool:
        answer = sample.text.split("\n", 1)[0].strip()
        if sample.truncated or not answer:
            return False
        entry = sample.record.get("entry")
        if entry is None:
            return answer == str(sample.record["answer"])
        return self._scorer(entry["metadata"]["source_dataset"])(answer, entry) >= 1.0

    def _scorer(self, dataset: str) -> Callable[[str, Mapping[str, Any]], float]:
        if dataset not in self._scorers:
            self._scorers[dataset] = reasoning_gym().get_score_answer_fn(dataset)
        return self._scorers[dataset]

    def __getstate__(self) -> dict[str, Any]:
        return {"_scorers": {}}  # found again when needed


def reasoning_gym() -> Any:
    """The package, imported when first needed; ValueError naming the extra if it is missing."""
    try:
        import reasoning_gym as package
    except ImportError:
        raise ValueError("these tasks need the package reasoning-gym: pip install 'rlvr-lightning[gym]'") from None
    return package
