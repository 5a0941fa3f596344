"""Which problems are among those to evaluate on: by runs of words that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlvr_lightning.data.identity import normal_text, words


@dataclass(frozen=True)
class Overlap:
    """What a problem shares with one to evaluate on."""

    row: int
    """Of the problem, in the texts that were looked through."""
    benchmark: str
    other: int
    """Place of the problem to evaluate on, in its benchmark."""
    shared: str
    """The words that both have."""


def overlaps(texts: Sequence[str], benchmarks: Mapping[str, Sequence[str]], ngram: int = 13) -> list[Overlap]:
    r"""Texts that have `ngram` words in a row, or their whole text, in common with a text of a benchmark.

    Case, spacing and punctuation do not count between words. Whole texts are compared with their punctuation and
    operators, and so are all shorter ones: 1+2 and 1-2 are not the same.

    Args:
        texts: to look through.
        benchmarks: texts to look for, by the benchmark's name.
        ngram: how many words in a row; 13 is what GPT-3's authors took (arXiv 2005.14165, appendix C).

    Returns:
        The first overlap of each text that has one, in the order of the texts.

    Example:
        >>> overlaps(["Find x, if 2x = 4!", "Add 1"], {"b": ["1", "find X if 2x=4"]}, ngram=5)
        [Overlap(row=0, benchmark='b', other=1, shared='find x if 2x 4')]
    """
    whole: dict[str, tuple[str, int]] = {}
    runs: dict[str, tuple[str, int]] = {}
    for name, others in benchmarks.items():
        for place, text in enumerate(others):
            whole.setdefault(normal_text(text), (name, place))
            for run in runs_of(words(text), ngram):
                runs.setdefault(run, (name, place))
    found = []
    for row, text in enumerate(texts):
        if (owner := whole.get(normal_text(text))) is not None:
            found.append(Overlap(row, *owner, text))
            continue
        shared = next((run for run in runs_of(words(text), ngram) if run in runs), None)
        if shared is not None:
            found.append(Overlap(row, *runs[shared], shared))
    return found


def runs_of(tokens: Sequence[str], length: int) -> list[str]:
    """Every `length` words in a row, joined by spaces."""
    return [" ".join(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]
