"""Completions to learn from, as a data set or a file holds them: pairs, labelled ones, demonstrations.

`python -m rlvr_lightning samples` writes such files from a policy's own completions.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any, Literal

from rlvr_lightning.data.hub import worded
from rlvr_lightning.data.prompts import ListedPrompts
from rlvr_lightning.data.reading import Problem, Reading, Shape, Unusable, text_in
from rlvr_lightning.data.wording import Wording

Part = Literal["all", "train", "held_out"]
HELD_OUT = 10
"""One prompt in so many is held out."""
LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
"""What a label may be, in any case of letters."""


class Texts(ListedPrompts):
    """Records of a data set or a file (.jsonl, .json, .csv, .parquet) with some columns; what is unusable is counted.

    Args:
        path: name on the hub (`owner/name`) or a file.
        shape: makes a record of a row.
        fields: that it looks at.
        columns: column of the data set by field, where it has another name.
        config: which configuration of a data set on the hub.
        split: which split of a data set on the hub.
        wording: how the prompt is put.
        num: take this many of the usable rows, drawn at random; None takes all, in order.
        seed: of the drawing.
        part: which of those are kept: one prompt in ten is `held_out`, which one is a function of its text; the others
            are `train`. So there are fewer than `num` of a part.

    Raises:
        ValueError: no such file, a missing column (names those found), or no usable row, and why.
    """

    def __init__(  # noqa: PLR0913 (its subclasses are blocks of the YAML, flat on purpose)
        self,
        path: str,
        shape: Shape,
        fields: tuple[str, ...],
        columns: dict[str, str] | None = None,
        config: str | None = None,
        split: str = "train",
        wording: Wording = Wording(),  # noqa: B008 (frozen)
        num: int | None = None,
        seed: int = 0,
        part: Part = "all",
    ) -> None:
        columns = columns or {}
        if unknown := sorted(set(columns) - set(fields)):
            raise ValueError(f"columns: there is no field {unknown[0]!r}; the fields are {', '.join(fields)}")
        reading = Reading(
            path=path, shape=shape, expected=fields, renamed=columns, config=config, split=split, answers="any"
        )
        records = worded(reading, num, seed, wording, None)
        super().__init__([r for r in records if part in ("all", part_of(r["problem"]))])
        if not self._records:
            raise ValueError(f"part: {path!r} has no prompts that are {part!r}; give it more, or part: all")


class Pairs(Texts):
    """Records with `prompt`, `chosen` and `rejected`; pairs of equal sides are left out, counted and listed.

    Args:
        path: name on the hub (`owner/name`) or a file.
        kwargs: see `Texts`.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(path=path, shape=pair, fields=("prompt", "chosen", "rejected"), **kwargs)


class Labels(Texts):
    """Records with `prompt`, `completion` and `label` (true or false, also as text; or 1 or 0).

    Args:
        path: name on the hub (`owner/name`) or a file.
        kwargs: see `Texts`.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(path=path, shape=labelled, fields=("prompt", "completion", "label"), **kwargs)


class Demonstrations(Texts):
    """Records with `prompt` and, from the column `completion`, `demonstration`.

    Args:
        path: name on the hub (`owner/name`) or a file.
        kwargs: see `Texts`.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(path=path, shape=demonstrated, fields=("prompt", "completion"), **kwargs)


def part_of(prompt: str) -> Part:
    """Whether a prompt is for training or held out.

    >>> [part_of(prompt) for prompt in ("1+1=", "10+6=")]
    ['train', 'held_out']
    """
    return "held_out" if int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % HELD_OUT == 0 else "train"


def pair(row: Mapping[str, Any], _: random.Random) -> Problem:
    """A row with two different sides."""
    sides = {name: text_in(row, name) for name in ("chosen", "rejected")}
    if sides["chosen"] == sides["rejected"]:
        raise Unusable("both sides are equal")
    return {"problem": text_in(row, "prompt")} | sides


def labelled(row: Mapping[str, Any], _: random.Random) -> Problem:
    """A row with a label."""
    label = str(row["label"]).strip().lower()  # a CSV file holds texts
    if label not in LABELS:
        raise Unusable("a label that is neither true nor false")
    return {
        "problem": text_in(row, "prompt"),
        "completion": text_in(row, "completion"),
        "label": LABELS[label],
    }


def demonstrated(row: Mapping[str, Any], _: random.Random) -> Problem:
    """A row with a completion to imitate."""
    return {"problem": text_in(row, "prompt"), "demonstration": text_in(row, "completion")}
