r"""Mathematical answers, boxed or stated, compared by the package math-verify in processes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.extract import Extract, answer_of, check_extract
from rlvr_lightning.rewards.math_text import bare, gold_text, plain, rational, words, worth_asking
from rlvr_lightning.rewards.math_verifier import Question, Verifier, require_math_verify
from rlvr_lightning.schema import Sample

WHY = {
    "true": "equal",
    "false": "not equal",
    "unparsable": "the answer cannot be parsed",
    "time": "comparing took longer than time_limit_s",
    "memory": "comparing took too much memory",
}


class MathAnswer(Reward):
    r"""1 if the answer of the completion equals the right answer mathematically, else 0.

    The right answer is the record's `field`: an answer, a worked solution with a last \boxed{}, or a list of answers of
    which any will do. Only the last statement of a completion counts: naming many answers earns nothing. An answer that
    is missing, unbalanced, too long, cannot be parsed or takes too long to compare is wrong, never right. Units are not
    compared (10 cm is 10), a percentage is right with and without its sign (50 % is 50 and 0.5), words must be
    the same words.

    Args:
        field: key of the right answer in the data record.
        time_limit_s: for one comparison; then its process is replaced and the answer is wrong.
        extract: where the answer is, see `extract_answer`.
        workers: processes that compare; null is one for each core.

    Raises:
        ValueError: the package math-verify is missing, or (on scoring) the right answer itself cannot be parsed.
    """

    def __init__(
        self,
        field: str = "answer",
        time_limit_s: float = 5.0,
        extract: Extract = "boxed",
        workers: int | None = None,
    ) -> None:
        if time_limit_s <= 0:
            raise ValueError(f"time_limit_s must be positive, got {time_limit_s}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, or null for one for each core, got {workers}")
        check_extract(extract)
        require_math_verify()
        self.field, self.extract = field, extract
        self.verifier = Verifier(time_limit_s, workers)

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """1.0 or 0.0 for each sample; ValueError if a record's answer cannot be parsed, KeyError if it has none."""
        return [float(verdict == WHY["true"]) for _, verdict in self.judge(samples)]

    def answer(self, sample: Sample) -> str | None:
        r"""The answer as it is compared, without spaces: 2/4 and \frac{1}{2} are one, but 0.5 is another."""
        text = bare(answer_of(sample, self.extract) or "")
        if text is None:
            return None
        text = plain(text)
        exact = rational(text)
        return words(text) or ("".join(text.split()) if exact is None else str(exact))

    def explain(self, sample: Sample) -> str:
        """What was compared with what, and how it came out."""
        ((answer, verdict),) = self.judge([sample])
        return f"{verdict}: {answer!r} against {sample.record[self.field]!r:.80}" if answer else verdict

    def judge(self, samples: Sequence[Sample]) -> list[tuple[str | None, str]]:
        """The answer of each sample, and one of `WHY` or that there is none."""
        answers = [bare(answer_of(sample, self.extract) or "") for sample in samples]
        pairs = [
            [(gold, plain(answer)) for gold in golds] if answer is not None else []
            for golds, answer in zip(self._golds(samples), answers, strict=True)
        ]
        questions: list[Question] = [("same", *pair) for several in pairs for pair in several if at_once(*pair) is None]
        said = dict(zip(questions, self.verifier.verdicts(questions), strict=True))
        found: list[tuple[str | None, str]] = []
        for answer, several in zip(answers, pairs, strict=True):
            verdicts = [at_once(*pair) or said["same", *pair] for pair in several]
            right = "true" in verdicts
            found.append((answer, WHY["true" if right else verdicts[-1]] if verdicts else "no answer was found"))
        return found

    def _golds(self, samples: Sequence[Sample]) -> list[list[str]]:
        stated = [as_list(sample.record[self.field]) for sample in samples]
        wanted = list(dict.fromkeys(gold for golds in stated for gold in golds))
        usable = dict(zip(wanted, usable_golds(wanted, self.verifier), strict=True))
        for golds in stated:
            for gold in golds or [""]:
                if usable.get(gold) is None:
                    raise ValueError(
                        f"{self.field}: {gold!r:.80} cannot be parsed; data sets are cleaned by `answers: math`"
                    )
        return [[kept for raw in golds if (kept := usable[raw]) is not None] for golds in stated]


def as_list(gold: Any) -> list[str]:
    """One right answer or several, as texts."""
    return [str(each) for each in gold] if isinstance(gold, list | tuple) else [str(gold)]


def usable_golds(golds: Sequence[str], verifier: Verifier) -> list[str | None]:
    """Right answers as they are compared, or None for those that nothing can be compared with."""
    texts = [plain(text) if (text := gold_text(gold)) is not None else None for gold in golds]
    sure = [text is not None and (words(text) is not None or rational(text) is not None) for text in texts]
    questions: list[Question] = [
        ("parses", text) for text, known in zip(texts, sure, strict=True) if text and not known and "$" not in text
    ]
    parses = dict(zip(questions, verifier.verdicts(questions), strict=True))
    return [
        text if text and (known or parses.get(("parses", text)) == "true") else None
        for text, known in zip(texts, sure, strict=True)
    ]


def at_once(gold: str, answer: str) -> str | None:
    """The verdict on an answer (both `plain`) that needs no mathematics; None if it does."""
    if answer == gold:
        return "true"
    if not worth_asking(gold, answer):
        return "unparsable"
    if (expected := words(gold)) is not None:
        return "true" if words(answer) == expected else "false"
    numbers = rational(gold), rational(answer)
    if None not in numbers:
        return "true" if numbers[0] == numbers[1] else "false"
    return None
