r"""Which part of a text is the answer, and how it is written. Pure functions on strings."""

from __future__ import annotations

import re
from fractions import Fraction

BOX = "\\boxed"
MAX_CHARS = 400  # of an answer; longer ones are wrong. Most golds are under 40
UNFINISHED = ("\\sum", "\\prod", "\\int", "\\lim")
STATED = re.compile(
    r"(?:final answer|answer|solution)\W{0,12}?(?:\bis\b|\bare\b|:|=)(?!\s*(?:\bis\b|:))|####", re.IGNORECASE
)
WORDS = re.compile(r"[^\W\d_]{3,}(?:[ -][^\W\d_]+)*")
JOINT = re.compile(r"(?:\s|[$,;&()]|\\[()\[\],;:! ]|\\q?quad|\\text\s*\{\s*(?:and|or)\s*\}|\band\b|\bor\b){0,24}")
RATIONAL = re.compile(r"([+-]?)\s*(?:(\d+)|\\[dt]?frac\s*\{([+-]?\d+)\}\s*\{(\d+)\}|(\d+)\s*/\s*(\d+))")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox|textit)\s*\{([^{}]*)\}")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)(?:\\overline\s*\{(\d+)\}|\\dot\s*\{?(\d)\}?(?!\d))")
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?:(?:\\[,;:! ]|\s|\{,\})\d{3})+)(?![\d])")


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} holds, braces balanced; None if there is none, or it is empty, open or too long.

    Boxes with nothing but "and", "or" or punctuation between them are one answer, the list of them.

    Example:
        >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}"), last_boxed(r"$\boxed{1}$ and $\boxed{2}$")
        ('\\frac{1}{2}', '1, 2')
        >>> last_boxed(r"\boxed{1} and \boxed{2") is None
        True
    """
    start = text.rfind(BOX)
    found = box_at(text, start) if start >= 0 else None
    if found is None:
        return None
    answers = [found[0]]
    while (before := text.rfind(BOX, 0, start)) >= 0:
        earlier = box_at(text, before)
        if earlier is None or not JOINT.fullmatch(text, earlier[1], start):
            break
        answers.insert(0, earlier[0])
        start = before
    joined = ", ".join(answers)
    return joined if len(joined) <= MAX_CHARS else None


def box_at(text: str, start: int) -> tuple[str, int] | None:
    """What the box that opens there holds, and where it ends; None if it is empty, open or too long."""
    opening = re.compile(r"\s*\{").match(text, start + len(BOX))
    if opening is None:
        return None
    depth = 1
    for at in range(opening.end(), min(len(text), opening.end() + MAX_CHARS + 1)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            inside = text[opening.end() : at].strip()
            return (inside, at + 1) if inside else None
    return None


def stated_answer(text: str) -> str | None:
    r"""The last box, else what follows the last "answer is", "Answer:" or "####" on its line; None if there is neither.

    Example:
        >>> stated_answer("So 7 of 9 remain.\nThe final answer is $\\frac{7}{9}$.")
        '\\frac{7}{9}'
        >>> stated_answer("**Answer:** 12 apples"), stated_answer("It is 12.")
        ('12 apples', None)
    """
    if BOX in text:
        return last_boxed(text)
    found = list(STATED.finditer(text))
    if not found:
        return None
    line = text[found[-1].end() :].lstrip(" *_:").partition("\n")[0]
    return bare(line.strip("*_ ")) if line.strip() else None


def gold_text(gold: str) -> str | None:
    r"""The answer in a gold text: the content of its last \boxed{}, else the text itself without dollar signs.

    Example:
        >>> gold_text(r"Thus $x=\boxed{7}$."), gold_text("$125$ miles")
        ('7', '125  miles')
    """
    return last_boxed(gold) if BOX in gold else bare(gold.replace("\\$", " ").replace("$", " "))


def bare(text: str) -> str | None:
    r"""A text without the signs around its mathematics and the full stop after; None if nothing or too much is left.

    Example:
        >>> bare(" $x = 3$. "), bare(r"\(7\)"), bare("")
        ('x = 3', '7', None)
    """
    text = text.strip().rstrip(".").strip()
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(left) and text.endswith(right) and len(text) >= len(left) + len(right):
            text = text[len(left) : len(text) - len(right)].strip().rstrip(".").strip()
    return text if 0 < len(text) <= MAX_CHARS else None


def plain(text: str) -> str:
    r"""An answer in a form that math-verify reads whole; it reads only a part of some others, or nothing.

    Example:
        >>> plain(r"0.1\overline{36}"), plain(r"\$1\,234{,}567"), plain(r"\mathrm{e}^2"), plain(r"\text{north east}")
        ('\\frac{135}{990}', '1234567', 'e^2', 'north east')
        >>> plain("$1,000.99")
        '1,000.99'
    """
    text = text.replace("\\$", "")
    text = text.replace("$", "") if text.count("$") == 1 else text  # of a sum of money; two would hide a second answer
    text = (
        re.sub("[\u20ac\u00a3\u00a5]", "", text)
        .replace("\\mathrm{e}", "e")
        .replace("\\displaystyle", "")
        .replace("~", " ")
    )
    text = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = _REPEATING.sub(_fraction, text)
    whole = _TEXT.fullmatch(text.strip())
    return (whole[1] if whole else text).strip()


def _fraction(match: re.Match[str]) -> str:
    """0.abc with c repeated is (abc - ab) / 990..0."""
    whole, fixed, repeated = match[1] or "0", match[2], match[3] or match[4]
    top = int(whole + fixed + repeated) - int(whole + fixed)
    return rf"\frac{{{top}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"


def words(text: str) -> str | None:
    r"""The words of an answer that is nothing else, folded; None for mathematics, to which `xy` belongs.

    Example:
        >>> words(plain(r"\text{North East}")), words("x+1"), words("xy")
        ('north east', None, None)
    """
    return " ".join(text.casefold().split()) if WORDS.fullmatch(text) else None


def rational(text: str) -> Fraction | None:
    r"""An integer or a fraction of integers; None for any other answer, decimals included: these are compared rounded.

    Example:
        >>> rational(r"-\frac{3}{6}"), rational("17"), rational("1.0"), rational("1/0")
        (Fraction(-1, 2), Fraction(17, 1), None, None)
    """
    match = RATIONAL.fullmatch(text)
    if match is None:
        return None
    sign, whole, top, bottom, left, right = match.groups()
    below = int(bottom or right or 1)
    return Fraction(int(whole or top or left), below) * (-1 if sign == "-" else 1) if below else None


def worth_asking(gold: str, answer: str) -> bool:
    """Whether an answer is one finished expression.

    A dollar sign would end it and start another, of which math-verify accepts any; and a sum or integral left standing
    is a question, costly to evaluate, unless the right answer has it too.
    """
    return "$" not in answer and not any(sign in answer and sign not in gold for sign in UNFINISHED)
