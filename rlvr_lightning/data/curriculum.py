"""Which problems an epoch serves, by how often each was solved so far in the same run."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlvr_lightning.data.cleaning import check_band

NEWEST = 0.5
"""Weight of the newest group in a running pass rate; the weights of older ones halve each time."""


MOST_OFTEN = 4
"""Times that an epoch serves a problem, about; where few are inside the band, the nearest ones join them."""


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Leave out of an epoch what was always or never solved when it was last seen.

    A problem's running pass rate is an average over its groups of completions in which the newest counts half. Before
    an epoch those outside `band` are set aside, and the others take their places, each about as often as any other and
    at most about four times; what has no rate yet is served. Every `revisit` epochs all are served again, so that none
    is set aside for good.
    """

    band: list[float] = field(default_factory=lambda: [0.1, 0.9])
    """Lowest and highest running pass rate that is served, both included."""
    revisit: int = 4
    """Serve all problems every so many epochs, the first included."""

    def __post_init__(self) -> None:
        check_band(self.band, "curriculum.band")
        if self.revisit < 2:
            raise ValueError(f"curriculum.revisit must be at least 2, got {self.revisit}")


class RunningRates:
    """Running pass rates of problems, and the orders that follow from them.

    Args:
        curriculum: which of them are served.
        start: pass rates measured before the run, None where there is none.
    """

    def __init__(self, curriculum: Curriculum, start: Sequence[float | None]) -> None:
        self.curriculum = curriculum
        self.now = list(start)
        self.then = list(start)
        """As they were when the epoch began: what its order follows from."""

    def observe(self, row: int, rate: float) -> None:
        """Take in the share of a group's completions that is right."""
        known = self.now[row]
        self.now[row] = rate if known is None else (1 - NEWEST) * known + NEWEST * rate

    def served_frac(self) -> float:
        """Share of problems that would be served now."""
        return sum(self._distance(rate) == 0 for rate in self.now) / len(self.now)

    def order(self, shuffled: Sequence[int], batch: int, epoch: int, seed: int) -> list[int]:
        """Rows in the order in which an epoch serves them, whole batches; no row is twice in one batch.

        Args:
            shuffled: all rows, in the epoch's permutation.
            batch: rows in a batch.
            epoch: its number, from 0.
            seed: of the further permutations.
        """
        rows = sorted(shuffled, key=lambda row: self._distance(self.then[row]))  # stable: shuffled among equals
        inside = sum(self._distance(rate) == 0 for rate in self.then)
        wanted = len(shuffled) // batch * batch
        if epoch % self.curriculum.revisit == 0 or inside == len(rows):
            return list(shuffled[:wanted])
        pool = rows[: max(inside, batch, -(-len(rows) // MOST_OFTEN))]  # the nearest, where few are inside
        order: list[int] = []
        for again in range(wanted):
            if again:
                random.Random(f"{seed}/{epoch}/{again}").shuffle(pool)
            order += pool[: len(pool) // batch * batch]
            if len(order) >= wanted:
                break
        return order[:wanted]

    def _distance(self, rate: float | None) -> float:
        low, high = self.curriculum.band
        return 0.0 if rate is None else max(low - rate, rate - high, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Rates now, and when the epoch began."""
        return {"now": list(self.now), "then": list(self.then)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Those of `state_dict`."""
        self.now, self.then = list(state["now"]), list(state["then"])


def tell_curriculum(module: Any, records: Sequence[Mapping[str, Any]], scores: Any) -> dict[str, float]:
    """Tell the data module's curriculum, if it has one, how the training problems of this batch were solved.

    Args:
        module: a GRPO module; its first reward says what is right.
        records: of this rank's prompts, P of them.
        scores: of their P * G completions.

    Returns:
        `data/served_frac`, the share of problems that would be served now; nothing without a curriculum.
    """
    data: Any = getattr(module.trainer, "datamodule", None)
    if getattr(data, "curriculum", None) is None:
        return {}
    right = scores.parts[next(iter(module.scorer.rewards))] >= 1.0
    shares = right.float().view(len(records), -1).mean(1).tolist()
    mine = {record["index"]: share for record, share in zip(records, shares, strict=True)}
    everyone: dict[int, float] = {}
    for part in module.ranks.gather(mine):
        everyone |= part
    return {"data/served_frac": data.observe(everyone)}
