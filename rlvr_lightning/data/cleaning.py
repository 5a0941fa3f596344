"""What is taken out of the training problems, and what is said of it: repetitions, overlap, too easy or too hard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from rlvr_lightning.data.contamination import overlaps
from rlvr_lightning.data.identity import normal_text, problem_id, problem_text
from rlvr_lightning.data.tables import read_text_table

Record = dict[str, Any]
SHOWN, SHOWN_CHARS = 3, 100


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """Keep the problems that a model solves now and then."""

    path: str
    """JSONL as `validate` and `test` write it, `problems_val.jsonl`: `id` (of the prompt, see `problem_id`) and
    `pass_rate` (0 to 1) on each line. Problems are known by their prompt, so measure them in the same wording."""
    band: list[float]
    """Lowest and highest pass rate that is kept, both included, such as [0.1, 0.9]."""
    unmeasured: Literal["drop", "keep"] = "drop"
    """What is done with problems that the file does not have."""

    def __post_init__(self) -> None:
        check_band(self.band, "cleaning.difficulty.band")
        if not Path(self.path).expanduser().is_file():
            raise ValueError(f"cleaning.difficulty.path: there is no file {self.path!r}")


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """What is taken out of the training problems. All of it is counted, and some of it shown."""

    duplicates: Literal["drop", "keep"] = "drop"
    """Problems with the same text as an earlier one, but for case, spacing and dollar signs."""
    contaminated: Literal["drop", "warn"] = "drop"
    """Problems that share `ngram` words in a row, or their whole text, with a problem of `val` or `test`."""
    ngram: int = 13
    difficulty: Difficulty | None = None

    def __post_init__(self) -> None:
        if self.ngram < 2:
            raise ValueError(f"cleaning.ngram must be at least 2, got {self.ngram}")

    def __call__(
        self, records: Sequence[Record], benchmarks: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> list[Record]:
        """The records that are left, in their order; what was taken out is told.

        Args:
            records: of training, with `prompt` and perhaps `problem` and `answer`.
            benchmarks: records to evaluate on, by name.

        Raises:
            ValueError: the file of pass rates is damaged, or has none of these problems.
        """
        kept = list(records)
        if self.duplicates == "drop":
            kept = without_duplicates(kept)
        kept = self._without_contaminated(kept, benchmarks)
        return kept if self.difficulty is None else inside(kept, self.difficulty)

    def _without_contaminated(
        self, records: list[Record], benchmarks: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> list[Record]:
        texts = [problem_text(record) for record in records]
        others = {name: [problem_text(record) for record in several] for name, several in benchmarks.items()}
        found = overlaps(texts, others, self.ngram)
        if not found:
            return records
        per_benchmark = ", ".join(f"{name} {count}" for name, count in Counter(o.benchmark for o in found).items())
        examples = "; ".join(
            f"{name_of(records[o.row])} and {o.benchmark}[{o.other}]: {shortened(o.shared)!r}" for o in found[:SHOWN]
        )
        dropped = self.contaminated == "drop"
        rank_zero_warn(
            f"data.train: {'dropped ' * dropped}{len(found)} of {len(records)} problems that share {self.ngram} words "
            f"in a row, or all, with one to evaluate on ({per_benchmark}), such as {examples}"
        )
        rows = {overlap.row for overlap in found} if dropped else set()
        return [record for row, record in enumerate(records) if row not in rows]


def without_duplicates(records: Sequence[Record]) -> list[Record]:
    """The first of each text; how many repeat one, and how many of these have another answer, is told."""
    first: dict[str, Record] = {}
    repeated: list[tuple[Record, Record]] = []
    for record in records:
        earlier = first.setdefault(normal_text(problem_text(record)), record)
        if earlier is not record:
            repeated.append((record, earlier))
    if repeated:
        differ = [pair for pair in repeated if pair[0].get("answer") != pair[1].get("answer")]
        examples = ", ".join(f"{name_of(again)} of {name_of(one)}" for again, one in (differ or repeated)[:SHOWN])
        rank_zero_warn(
            f"data.train: dropped {len(repeated)} of {len(records)} problems that repeat an earlier one, "
            f"{len(differ)} of them with another answer (such as {examples})"
        )
    return list(first.values())


def inside(records: Sequence[Record], difficulty: Difficulty) -> list[Record]:
    """Records whose measured `pass_rate`, which they are given, lies in the band; the others are counted."""
    rates = pass_rates(difficulty.path)
    measured = [(record, rates.get(problem_id(record["prompt"]))) for record in records]
    known = [(record, rate) for record, rate in measured if rate is not None]
    if records and not known:
        raise ValueError(
            f"cleaning.difficulty.path: {difficulty.path} has none of the {len(records)} training problems; they are "
            "known by their prompts, so measure them with the same wording and chat template"
        )
    low, high = difficulty.band
    kept = [
        record if rate is None else record | {"pass_rate": rate}
        for record, rate in measured
        if (difficulty.unmeasured == "keep" if rate is None else low <= rate <= high)
    ]
    if len(kept) < len(records):
        hard, easy = sum(rate < low for _, rate in known), sum(rate > high for _, rate in known)
        unknown = (len(records) - len(known)) * (difficulty.unmeasured == "drop")
        rank_zero_warn(
            f"data.train: dropped {len(records) - len(kept)} of {len(records)} problems: pass rate of {hard} below "
            f"{low:g}, of {easy} above {high:g}, {unknown} not measured"
        )
    return kept


def pass_rates(path: str) -> dict[str, float]:
    """Pass rates by problem id; the mean where an id has several.

    Raises:
        ValueError: a line has no `id`, or no `pass_rate` from 0 to 1; names file and line.
    """
    table = read_text_table(Path(path).expanduser())
    found: dict[str, list[float]] = {}
    for number, row in enumerate(table.rows):
        name, rate = row.get("id"), row.get("pass_rate")
        if not isinstance(name, str):
            raise ValueError(f"{table.name}: {table.place(number)} has no text under 'id'")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ValueError(
                f"{table.name}: {table.place(number)} has the pass_rate {rate!r}, not a number from 0 to 1"
            )
        found.setdefault(name, []).append(float(rate))
    return {name: sum(rates) / len(rates) for name, rates in found.items()}


def check_band(band: Sequence[float], field: str) -> None:
    """Raise ValueError unless a band is two pass rates, the lower one first."""
    if len(band) != 2 or not 0 <= band[0] <= band[1] <= 1:
        raise ValueError(f"{field} must be two numbers from 0 to 1, the lower one first, got {list(band)}")


def name_of(record: Record) -> str:
    """Where a training record stands in its source."""
    return f"train[{record['index']}]"


def shortened(text: str) -> str:
    """The beginning of a text."""
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."
