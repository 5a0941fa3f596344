"""The reward of the few-shot problems and of any task of reasoning-gym: the answer and nothing else."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.extract import Extract, answer_of, check_extract
from rlvr_lightning.schema import Sample

EVALUATES = re.compile(r"(?<![\w.])(?:eval|exec)\((?!entry\[)|\b(?:sympy|sp)\.(?:parse_expr|sympify)\(")
"""Of text that is not the data set's own."""


class TaskReward(Reward):
    r"""1 if the answer is right, else 0; problems of reasoning-gym are judged by the gym's own scorer.

    Such a problem's record holds the gym's `entry`; it counts when its scorer gives full marks, because partial credit
    for an answer among other text would reward listing answers. Any other answer must match exactly, but for white
    space around it. A completion cut by the length limit earns 0, unless the answer's closing brace or tag is there.

    Args:
        extract: where the answer is, see `extract_answer`.
        partial: take the gym's marks between 0 and 1 as they are.

    Raises:
        ValueError: (on scoring a problem of it) the package reasoning-gym is missing, or its scorer of the task would
            run the answer as Python code.

    Example:
        >>> sample = lambda text: Sample(prompt="3 + 4 =", text=text, token_ids=[], record={"answer": "7"})
        >>> TaskReward()([sample(" 7\n"), sample(" 7 or 8"), sample("07")])
        [1.0, 0.0, 0.0]
    """

    def __init__(self, extract: Extract = "first_line", partial: bool = False) -> None:
        check_extract(extract)
        self.extract, self.partial = extract, partial
        self._scorers: dict[str, Callable[[str, Mapping[str, Any]], float]] = {}

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """From 0.0 to 1.0 for each sample; KeyError if a record has no answer."""
        marks = [self._marks(sample) for sample in samples]
        return marks if self.partial else [float(mark >= 1.0) for mark in marks]

    def answer(self, sample: Sample) -> str | None:
        """The answer as it is judged."""
        return answer_of(sample, self.extract)

    def explain(self, sample: Sample) -> str:
        """What was judged."""
        entry = sample.record.get("entry") or sample.record
        return f"{answer_of(sample, self.extract)!r:.60} gets {self._marks(sample):g}; right is {entry['answer']!r:.60}"

    def _marks(self, sample: Sample) -> float:
        answer = answer_of(sample, self.extract)
        if answer is None:
            return 0.0
        entry = sample.record.get("entry")
        if entry is None:
            return float(answer == str(sample.record["answer"]))
        return float(self._scorer(entry["metadata"]["source_dataset"])(answer, entry))

    def _scorer(self, dataset: str) -> Callable[[str, Mapping[str, Any]], float]:
        if dataset not in self._scorers:
            refuse_evaluation(dataset)
            self._scorers[dataset] = reasoning_gym().get_score_answer_fn(dataset)
        return self._scorers[dataset]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_scorers": {}}  # found again when needed


def refuse_evaluation(dataset: str) -> None:
    """Raise ValueError for a task of reasoning-gym whose scorer runs the answer as Python code.

    Some pass it to `eval`, some to sympy's `parse_expr`, which does the same: a model could run programs on this
    machine, or give itself full marks.
    """
    from reasoning_gym.factory import DATASETS

    scorer = DATASETS[dataset][0].score_answer
    module = inspect.getmodule(scorer)
    source = inspect.getsource(scorer)
    bare = (
        getattr(getattr(module, "parse_expr", None), "__module__", "").startswith("sympy") and "parse_expr(" in source
    )
    if bare or EVALUATES.search(source):
        raise ValueError(
            f"task {dataset}: its scorer in reasoning-gym runs the answer as Python code, which may do anything; "
            "leave it out" + (", or use the reward Countdown" if dataset == "countdown" else "")
        )


def reasoning_gym() -> Any:
    """The package, imported when first needed; ValueError naming the extra if it is missing."""
    try:
        import reasoning_gym as package
    except ImportError:
        raise ValueError("these tasks need the package reasoning-gym: pip install 'rlvr-lightning[gym]'") from None
    return package
