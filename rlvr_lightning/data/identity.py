"""What makes two problems the same one: a name that files can share, and a text without what does not matter."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

_WORD = re.compile(r"\w+")
_SPACE = re.compile(r"\s+")
_IDLE_SPACE = re.compile(r" (?=\W)|(?<=\W) ")


def problem_id(prompt: str) -> str:
    """The name of a problem in files: the first 16 hexadecimal digits of the SHA-256 of its prompt's UTF-8.

    The prompt is the whole text that the model sees, chat template included: asked in other words, a problem is
    another one, with a pass rate of its own.

    Example:
        >>> problem_id("1+1=")
        '477d64453f163442'
    """
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def problem_text(record: Mapping[str, Any]) -> str:
    """The problem itself, where the record has it beside the prompt, else the prompt."""
    return str(record.get("problem") or record["prompt"])


def words(text: str) -> list[str]:
    r"""Words, numbers and names of commands in lower case, without punctuation, operators and spacing.

    Example:
        >>> words("Find  $\\frac{1}{2}$ of X.")
        ['find', 'frac', '1', '2', 'of', 'x']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def normal_text(text: str) -> str:
    r"""The text without what two copies of a problem differ in: case, spacing, dollar signs, the last full stop.

    Example:
        >>> normal_text("Is $x = 1$ ?"), normal_text("is x=1"), normal_text("2*(3+4)") == normal_text("2*3+4")
        ('is x=1', 'is x=1', False)
    """
    text = _SPACE.sub(" ", unicodedata.normalize("NFKC", text).lower().replace("$", " ").replace("\u2212", "-"))
    return _IDLE_SPACE.sub("", text).strip(" .?:")
