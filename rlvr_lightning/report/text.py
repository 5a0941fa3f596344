"""Text that a model wrote: shown as it is, but able to do nothing."""

from __future__ import annotations

import unicodedata

LONGEST = 2_000
"""Characters of a prompt or completion that are shown."""


def harmless(text: str, longest: int = LONGEST) -> str:
    r"""Text without characters that steer what shows it (control, direction, surrogates), which become escapes.

    Line ends and tabs stay. Of a long text the middle is left out, and counted.

    >>> harmless("2 + 2\n\x1b[2J"), harmless("abcdefgh", longest=4)
    ('2 + 2\n\\x1b[2J', 'ab [... 4 characters left out ...] gh')
    """
    if len(text) > longest:
        half = longest // 2
        gap = f" [... {len(text) - 2 * half:,} characters left out ...] "
        text = text[:half] + gap + text[-half:]
    return "".join(_escaped(c) if unicodedata.category(c)[0] == "C" and c not in "\n\t" else c for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
