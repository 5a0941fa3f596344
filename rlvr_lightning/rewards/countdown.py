"""Numbers that are to be combined to another number: any right expression will do."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.extract import Extract, answer_of, check_extract
from rlvr_lightning.schema import Sample

OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_ALLOWED = re.compile(r"[0-9+\-*/() ]{1,200}")


class Countdown(Reward):
    """1 if the answer combines each of the record's `nums` exactly once to its `target`, else 0.

    The answer is an expression of whole numbers, + - * / and brackets, and nothing else. It is parsed, never run, and
    worked out in exact fractions.

    Args:
        extract: where the answer is, see `extract_answer`.

    Example:
        >>> sample = lambda text: Sample(prompt="", text=text, token_ids=[], record={"nums": [1, 2, 3], "target": 9})
        >>> Countdown()([sample(f"<answer>{text}</answer>") for text in ("(1 + 2) * 3", "3 * 3", "9", "(1+2)*3 = 9")])
        [1.0, 0.0, 0.0, 0.0]
    """

    def __init__(self, extract: Extract = "tag") -> None:
        check_extract(extract)
        self.extract = extract

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """1.0 or 0.0 for each sample; KeyError if a record has no `nums` or no `target`."""
        return [float(self._why(sample) == "right") for sample in samples]

    def explain(self, sample: Sample) -> str:
        """What was taken for the answer, and what is wrong with it."""
        return f"{answer_of(sample, self.extract)!r:.80}: {self._why(sample)}"

    def _why(self, sample: Sample) -> str:
        nums, target = sample.record["nums"], sample.record["target"]
        found = worked_out(answer_of(sample, self.extract) or "")
        if found is None:
            return "no expression of whole numbers, + - * / and brackets"
        value, used = found
        if Counter(used) != Counter(nums):
            return f"uses {sorted(used)}, not {sorted(nums)}"
        return "right" if value == target else f"is {value}, not {target}"


def worked_out(text: str) -> tuple[Fraction, list[int]] | None:
    """The value of an expression, and the numbers in it; None if it is none, or divides by zero.

    Example:
        >>> worked_out("-(7 - 1) / 4"), worked_out("2 ** 9"), worked_out("1 / 0"), worked_out("f(1)")
        ((Fraction(-3, 2), [7, 1, 4]), None, None, None)
    """
    if not _ALLOWED.fullmatch(text):
        return None
    numbers: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(f"{type(node).__name__} is not allowed")

    try:
        return value(ast.parse(text.strip(), mode="eval").body), numbers
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
