"""Multiple choice."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.extract import Extract, answer_of, check_extract
from rlvr_lightning.rewards.match import folded
from rlvr_lightning.schema import Sample

LETTER = re.compile(r"[*_`(\[{$\s]*(?:\\(?:text|mathrm|textbf|mathbf)\s*\{\s*\(?)?([A-Z])(?:[)\]}.:,*_`$\s]|$)")


class Choice(Reward):
    r"""1 if the answer names the right letter, or repeats the right option word for word; else 0.

    A letter counts at the beginning of the answer, alone or before a bracket or punctuation: "B", "(B)", "B.",
    "**B** because", "\text{B}". Letters beyond the number of options, and two different letters, are wrong.

    Args:
        field: key of the right letter in the data record.
        choices_field: key of the list of options in the order shown, if the record has one.
        extract: where the answer is, see `extract_answer`.

    Example:
        >>> record = {"answer": "B", "choices": ["red", "green", "blue"]}
        >>> sample = lambda text: Sample(prompt="", text=text, token_ids=[], record=record)
        >>> Choice()([sample("The answer is (B)."), sample("Answer: A or B"), sample("answer: green"), sample("B")])
        [1.0, 0.0, 1.0, 0.0]
    """

    def __init__(self, field: str = "answer", choices_field: str = "choices", extract: Extract = "stated") -> None:
        check_extract(extract)
        self.field, self.choices_field, self.extract = field, choices_field, extract

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """1.0 or 0.0 for each sample; ValueError if a record's answer is no letter of its options."""
        return [float(self._chosen(sample) == self._right(sample)) for sample in samples]

    def answer(self, sample: Sample) -> str | None:
        """The letter."""
        return self._chosen(sample)

    def explain(self, sample: Sample) -> str:
        """What was taken for the answer."""
        answer = answer_of(sample, self.extract)
        return f"{answer!r:.60} chooses {self._chosen(sample) or 'nothing'}; right is {self._right(sample)}"

    def _options(self, sample: Sample) -> list[str]:
        return [str(option) for option in sample.record.get(self.choices_field) or []]

    def _right(self, sample: Sample) -> str:
        right, known = str(sample.record[self.field]).strip(), len(self._options(sample)) or 26
        if not re.fullmatch("[A-Z]", right) or ord(right) - ord("A") >= known:
            raise ValueError(f"{self.field}: {right!r:.60} must be a letter, one of the first {known}")
        return right

    def _chosen(self, sample: Sample) -> str | None:
        answer, options = answer_of(sample, self.extract), self._options(sample)
        if answer is None:
            return None
        same = [chr(ord("A") + k) for k, option in enumerate(options) if folded(option) == folded(answer.rstrip("."))]
        if len(same) == 1:
            return same[0]
        letter = LETTER.match(answer)
        if letter is None or (options and ord(letter[1]) - ord("A") >= len(options)):
            return None
        others = set(re.findall(r"\b([A-Z])\b", answer[letter.end() :])) & {
            chr(65 + k) for k in range(len(options) or 5)
        }
        return letter[1] if not others - {letter[1]} else None
