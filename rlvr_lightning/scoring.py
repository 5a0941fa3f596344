"""From sampled token ids to rewards: decoding, stop strings, and what is shown of the samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.score import Scores, judge, score
from rlvr_lightning.schema import Rollouts, Sample

Record = dict[str, Any]
SHOWN = 3
PLAIN = str | int | float | None | list | tuple | Mapping | Reward


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores rollouts by several rewards."""

    tokenizer: Any
    rewards: dict[str, Reward]
    weights: dict[str, float]
    """1 for a reward that is not named."""
    stop: list[str]
    """Strings that end a completion; what a reward sees ends before the first."""

    @property
    def verifier(self) -> Scorer:
        """A scorer by the first reward alone, which says what is right."""
        name = next(iter(self.rewards))
        return replace(self, rewards={name: self.rewards[name]}, weights={})

    def names_answers(self, record: Record) -> bool:
        """Whether the verifier says what the answers to a record's problem are."""
        return next(iter(self.rewards.values())).names_answers(record)

    def settings(self) -> dict[str, Any]:
        """Classes of the rewards and their arguments, as far as they are plain values."""
        return plain_values(self.rewards)

    def why_not_judged(self, record: Record) -> str | None:
        """Why no completion of a record could be scored, in a line; None if they can."""
        probe = Sample(prompt=record["prompt"], text="?", token_ids=[0], record=record)
        for name, reward in self.rewards.items():
            if failures := judge(reward, [probe])[1]:
                return f"{name}: {failures[0].strip().splitlines()[-1]}"
        return None

    def drawn(self, rollouts: Rollouts) -> tuple[list[list[int]], list[str]]:
        """Tokens of R completions, and their texts with the stop strings that ended them.

        Special tokens are left out, end-of-sequence among them, but for one that is a stop string.
        """
        ids = rollouts.completion_ids.tolist()
        rows = [row[:length] for row, length in zip(ids, rollouts.lengths.tolist(), strict=True)]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True) if rows else []
        return rows, [text + self._special_stop(row[-1:]) for text, row in zip(texts, rows, strict=True)]

    def _special_stop(self, last: list[int]) -> str:
        """The text of a completion's last token if it is special, a stop string, and not end-of-sequence."""
        if not self.stop or not last or last[0] not in self.tokenizer.all_special_ids:
            return ""
        text = "" if last[0] == self.tokenizer.eos_token_id else self.tokenizer.decode(last)
        return text if any(stop in text for stop in self.stop) else ""

    def samples(self, rollouts: Rollouts, records: list[Record]) -> list[Sample]:
        """Decoded completions beside their records (P of them), as rewards see them; R samples."""
        rows, texts = self.drawn(rollouts)
        for stop in self.stop:
            texts = [text.split(stop, 1)[0] for text in texts]
        owners = [records[r // rollouts.group] for r in range(len(rows))]
        return [
            Sample(prompt=record["prompt"], text=text, token_ids=row, record=record, truncated=cut)
            for record, text, row, cut in zip(owners, texts, rows, rollouts.truncated.tolist(), strict=True)
        ]

    def __call__(self, rollouts: Rollouts, records: list[Record], failures_file: Path) -> Scores:
        """Rewards of R completions; what made a reward fail goes to the file."""
        return score(self.rewards, self.weights, self.samples(rollouts, records), failures_file)


def plain_values(value: Any) -> Any:
    """Of nested values those that read the same on every run; a reward is its class and its own such values.

    >>> plain_values({"a": [1, "x", None], "b": print, "_c": 0})
    {'a': [1, 'x', None]}
    """
    if isinstance(value, Reward):
        return [type(value).__qualname__, plain_values(vars(value))]
    if isinstance(value, Mapping):
        kept = {str(name): part for name, part in value.items() if not str(name).startswith("_")}
        return {name: plain_values(part) for name, part in kept.items() if isinstance(part, PLAIN)}
    return (
        [plain_values(part) for part in value if isinstance(part, PLAIN)] if isinstance(value, list | tuple) else value
    )


def describe(samples: list[Sample], scores: Scores, advantages: Tensor, step: int) -> list[Record]:
    """One dictionary a completion, for tables and files."""
    return [
        {
            "step": step,
            "prompt": sample.prompt,
            "completion": sample.text,
            "reward": float(scores.total[r]),
            "parts": {name: float(part[r]) for name, part in scores.parts.items()},
            "advantage": float(advantages[r]),
            "truncated": sample.truncated,
            "record": {name: value for name, value in sample.record.items() if name not in ("prompt", "prompt_ids")},
        }
        for r, sample in enumerate(samples)
    ]


def no_signal(told: list[Record], group: int) -> str:
    """What to say of a batch (see `describe`) in which no group has anything to learn from, with examples."""
    groups = [{sample["reward"] for sample in told[at : at + group]} for at in range(0, len(told), group)]
    if len(set.union(*groups)) == 1:
        how = f"all rewards are {told[0]['reward']:g}"
    elif all(len(rewards) == 1 for rewards in groups):
        how = "rewards differ between prompts only"
    else:
        how = "rewards differ within groups, but not in what is learned from"
    lines = [
        f"no signal: there is nothing to learn from in any of {len(groups)} groups ({how}). Look at the rewards, the "
        "stop strings, sampling.max_tokens and how hard the problems are; `python -m rlvr_lightning reward` says why a "
        "completion earns what it does. Some of them:"
    ]
    for sample in told[:: max(group, len(told) // SHOWN)][:SHOWN]:
        cut = ", cut at the limit" if sample["truncated"] else ""
        ends = f"{sample['prompt'][-60:]!r} -> {sample['completion'][-120:]!r}"
        lines.append(f"  reward {sample['reward']:g}{cut}: {ends}")
    return "\n".join(lines)
