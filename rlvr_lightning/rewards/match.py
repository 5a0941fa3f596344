"""The same text, or the same number."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.extract import Extract, answer_of, check_extract
from rlvr_lightning.schema import Sample

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40})"  # no other script's, which Decimal would read
NUMBER = re.compile(rf"[$\u20ac\u00a3]?\s*([+-]?{_DIGITS}(?:\.[0-9]{{1,40}})?(?:[eE][+-]?[0-9]{{1,3}})?)\s*(%?)\.?")


def folded(text: str) -> str:
    """Text without regard to case and amounts of white space.

    >>> folded("  North  East")
    'north east'
    """
    return " ".join(text.casefold().split())


class ExactMatch(Reward):
    """1 if the answer is the record's text, or one of its list of texts; else 0.

    Args:
        field: key of the right answer in the data record.
        extract: where the answer is, see `extract_answer`.
        ignore_case: compare without regard to case and amounts of white space.

    Example:
        >>> sample = lambda text: Sample(prompt="", text=text, token_ids=[], record={"answer": ["NYC", "New York"]})
        >>> ExactMatch()([sample(" new  york"), sample("York")]), ExactMatch(ignore_case=False)([sample("nyc")])
        ([1.0, 0.0], [0.0])
    """

    def __init__(self, field: str = "answer", extract: Extract = "whole", ignore_case: bool = True) -> None:
        check_extract(extract)
        self.field, self.extract, self.ignore_case = field, extract, ignore_case

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """1.0 or 0.0 for each sample; KeyError if a record has no answer."""
        return [float(self._right(sample)) for sample in samples]

    def answer(self, sample: Sample) -> str | None:
        """The answer as it is compared."""
        answer = answer_of(sample, self.extract)
        return answer if answer is None else self._alike(answer)

    def explain(self, sample: Sample) -> str:
        """What was compared."""
        return f"{answer_of(sample, self.extract)!r:.60} against {sample.record[self.field]!r:.60}"

    def _right(self, sample: Sample) -> bool:
        answer, right = answer_of(sample, self.extract), sample.record[self.field]
        rights = [str(each) for each in right] if isinstance(right, list | tuple) else [str(right)]
        if answer is None:
            return False
        return self._alike(answer) in [self._alike(each) for each in rights]

    def _alike(self, text: str) -> str:
        return folded(text) if self.ignore_case else text.strip()


class NumericMatch(Reward):
    """1 if the answer is the record's number to within a tolerance; else 0. A percentage is a number over 100.

    Args:
        field: key of the right answer in the data record: a number, or a text that reads as one.
        extract: where the answer is, see `extract_answer`; it must be a number and nothing else.
        tolerance: largest allowed |answer - right|, relative to |right|.

    Example:
        >>> sample = lambda text: Sample(prompt="", text=text, token_ids=[], record={"answer": 1200})
        >>> NumericMatch()([sample("1,200.0"), sample("1201"), sample("1200 or 1201")])
        [1.0, 0.0, 0.0]
        >>> NumericMatch(tolerance=0.01)([sample("1201")])
        [1.0]
    """

    def __init__(self, field: str = "answer", extract: Extract = "whole", tolerance: float = 1e-6) -> None:
        check_extract(extract)
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1), got {tolerance}")
        self.field, self.extract, self.tolerance = field, extract, tolerance

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """1.0 or 0.0 for each sample; ValueError if a record's answer is no finite number."""
        return [float(self._right(sample)) for sample in samples]

    def answer(self, sample: Sample) -> str | None:
        """The number."""
        answer = number(answer_of(sample, self.extract) or "")
        return answer if answer is None else str(answer.normalize() + 0)  # no -0

    def explain(self, sample: Sample) -> str:
        """What was compared."""
        answer = answer_of(sample, self.extract)
        return f"{answer!r:.60} reads as {number(answer or '')}; right is {sample.record[self.field]!r:.60}"

    def _right(self, sample: Sample) -> bool:
        right = as_number(sample.record[self.field], self.field)
        answer = number(answer_of(sample, self.extract) or "")
        return answer is not None and abs(answer - right) <= Decimal(self.tolerance) * abs(right)


def number(text: str) -> Decimal | None:
    """The number that a text is, exactly; None if it is none or does not fit a float.

    >>> number("$1,234.5"), number("5%"), number("1e400"), number("5 apples")
    (Decimal('1234.5'), Decimal('0.05'), None, None)
    """
    match = NUMBER.fullmatch(text.strip())
    if match is None or not math.isfinite(float(match[1].replace(",", ""))):
        return None
    value = Decimal(match[1].replace(",", ""))
    return value / 100 if match[2] else value


def as_number(value: Any, field: str) -> Decimal:
    """A record's number."""
    found = number(str(value))
    if found is None:
        raise ValueError(f"{field}: {value!r:.60} is not a finite number")
    return found
