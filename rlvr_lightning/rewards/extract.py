"""Which part of a completion is its answer."""

from __future__ import annotations

import re
from typing import Literal, get_args

from rlvr_lightning.rewards.math_text import BOX, last_boxed, stated_answer
from rlvr_lightning.schema import Sample

Extract = Literal["whole", "first_line", "last_line", "boxed", "stated", "tag"]
ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def extract_answer(text: str, how: Extract) -> str | None:
    r"""The answer in a completion, without white space around it; None if there is none. Naming many earns nothing.

    Args:
        text: the completion.
        how: `whole`, all of it; `first_line`; `last_line`, of those that are not blank; `boxed`, the last \boxed{};
            `stated`, that or what follows the last "answer is", "Answer:" or "####" on its line; `tag`, what the last
            <answer>...</answer> holds.

    Example:
        >>> text = "<think>2 or 3</think>\n<answer>3</answer>"
        >>> extract_answer(text, "tag"), extract_answer(text, "first_line"), extract_answer(text, "boxed")
        ('3', '<think>2 or 3</think>', None)
    """
    if how == "boxed":
        return last_boxed(text)
    if how == "stated":
        return stated_answer(text)
    if how == "tag":
        found = ANSWER_TAG.findall(text)
        return (found[-1].strip() or None) if found else None
    text = text if how == "first_line" else text.strip()
    lines = {"whole": text, "first_line": text.partition("\n")[0], "last_line": text.rpartition("\n")[2]}
    return lines[how].strip() or None


def answer_of(sample: Sample, how: Extract) -> str | None:
    """The answer in a completion; a truncated one has none, unless a closing brace or tag shows that it is whole."""
    closed = how in ("boxed", "tag") or (how == "stated" and BOX in sample.text)
    return extract_answer(sample.text, how) if closed or not sample.truncated else None


def check_extract(how: str) -> None:
    """Raise ValueError for a word that `extract_answer` does not know."""
    if how not in get_args(Extract):
        raise ValueError(f"extract must be one of {', '.join(get_args(Extract))}, got {how!r}")
