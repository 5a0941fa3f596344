"""What a claim is, and what its rules are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

PASS, TEST, ALL = "val/arithmetic/pass@1", "val/test/pass@1", "val/all/pass@1"
DENSITY = "update/changed_frac_total/bf16"
ALIKE = 0.03
"""Accuracies that differ by less count as alike."""
Verdict = Literal["confirmed", "in part", "not confirmed", "not run"]


class Scale(NamedTuple):
    """A model that learned by reinforcement, under SGD (`sgd`) and AdamW (`adamw`), and the folder of these runs."""

    name: str
    rl: str


TINY, SMOLLM2 = Scale("tiny", "tiny_seeds"), Scale("SmolLM2", "smollm2_study")
SCALES = (TINY, SMOLLM2)
IMITATION = "tiny_sft_seeds"
"""Imitation by the tiny model; the runs of OPTIMIZER at the rate of reinforcement are `sft_OPTIMIZER_rl_rate`."""


class Seen(NamedTuple):
    """What the records show."""

    text: str
    verdict: Verdict


@dataclass(frozen=True)
class Claim:
    """One line of the page."""

    paper: str
    says: str
    rule: str
    """What would confirm it here."""
    look: Callable[[Path], Seen]


def verdict(*parts: bool) -> Verdict:
    """Confirmed if all parts hold, in part if some do.

    >>> verdict(True, True), verdict(True, False), verdict(False)
    ('confirmed', 'in part', 'not confirmed')
    """
    return "confirmed" if all(parts) else "in part" if any(parts) else "not confirmed"


def inside(interval: tuple[float, float, float], bound: float) -> bool:
    """Whether a whole interval lies within +-bound.

    >>> inside((0.0, -0.01, 0.02), 0.03), inside((0.0, -0.04, 0.02), 0.03)
    (True, False)
    """
    return -bound < interval[1] and interval[2] < bound


def frac(definition: str, part: str = "all") -> Callable[[Any], float]:
    """Share of entries changed, of a record of `dissect`."""
    return lambda one: float(one["parts"][part]["changed_frac"][definition])


def of_spectrum(name: str) -> Callable[[Any], float]:
    """Share of the changed entries that are `low` or `principal`, of a record of `dissect`."""
    return lambda one: float(one["spectrum"][f"{name}_frac"])


def of_rank(measure: str, bound: int) -> Callable[[Any], float]:
    """Share of the full rank that the changes have, `matrix` or `effective`: at least (bound 0), at most (1)."""
    return lambda one: float(one[f"{measure}_rank_frac"][bound])
