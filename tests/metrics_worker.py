"""What `test_evaluation` runs in two processes: metrics of unequal shares, and a validation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import random_rollouts
from test_evaluation import validated

from rlvr_lightning.advantage import has_signal
from rlvr_lightning.metrics import Attempts, MajorityAtK, PassAtK, RolloutMetrics, TokenMeans, over
from rlvr_lightning.ranks import ALONE, Ranks
from rlvr_lightning.rewards.score import Scores
from rlvr_lightning.strategy import Sharded

PROMPTS, GROUP = 5, 3


def case() -> tuple[Any, Scores]:
    """Rollouts of 5 prompts with 3 completions each, and what they earned; the same in every process."""
    torch.manual_seed(7)
    rollouts = random_rollouts(prompt_lengths=(2,) * PROMPTS, group=GROUP)
    total = torch.rand(PROMPTS * GROUP).round(decimals=1)
    total[3:6] = 0.5  # a group without signal
    answers = [None if r % 4 == 3 else str(r % 3 * (r // 6)) for r in range(len(total))]
    return rollouts, Scores(total=total, parts={"a": total / 2}, failed=2, answers=answers)


def share(prompts: list[int]) -> tuple[Any, Scores]:
    """The case, of some prompts."""
    rollouts, scores = case()
    rows = rollouts.rows(prompts)
    return rollouts.select(prompts), Scores(
        total=scores.total[rows],
        parts={"a": scores.parts["a"][rows]},
        failed=2 if 0 in prompts else 0,
        answers=[scores.answers[row] for row in rows],
    )


def problems() -> list[Attempts]:
    """Attempts at 7 problems."""
    torch.manual_seed(8)
    right = (torch.rand(7, 5) < torch.linspace(0, 1, 7)[:, None]).tolist()
    answers = [["1" if each else f"{i % 2}no" for i, each in enumerate(row)] for row in right]
    return [
        Attempts(correct=row, lengths=[3] * 5, truncated=[False] * 5, answers=said)
        for row, said in zip(right, answers, strict=True)
    ]


def measured(ranks: Ranks, numbers: list[int], how: dict[str, Any]) -> dict[str, Any]:
    """All metrics of this process's numbers, prompts or problems, with those of the others."""
    found: dict[str, Any] = {}
    tokens = TokenMeans(**how)
    for number in numbers:
        tokens.update({"tokens": number + 1.0, "ratio": number / 3} | ({"kl": 0.1} if number == 2 else {}))
    found |= tokens.compute()
    rollouts = RolloutMetrics(**how)
    drawn, scores = share([number for number in numbers if number < PROMPTS])
    rollouts.update(drawn, scores, has_signal(scores.total, GROUP))
    found |= rollouts.compute()
    for name, metric in {"pass@2": PassAtK(2, **how), "maj@5": MajorityAtK(5, **how)}.items():
        metric.update(numbers, [problems()[number] for number in numbers])
        found[name] = list(metric.compute())
    return found


def main(out: str) -> None:
    """Each process writes RANK.json, the first also the files of a validation."""
    validated(Path(out, "two"), strategy=Sharded(), devices=2)
    ranks = Ranks(rank=dist.get_rank(), size=2)
    uneven = [[6, 0, 3, 1, 4], [5, 2]][ranks.rank]
    everything = [list(range(7)), []][ranks.rank]
    found = {
        "ours": measured(ranks, uneven, over(ranks)),
        "torchmetrics": measured(ranks, uneven, {}),
        "one has all": measured(ranks, everything, over(ranks)),
        "one has all, torchmetrics": measured(ranks, everything, {}),
        "alone": measured(ALONE, list(range(7)), over(ALONE)),
    }
    Path(out, f"{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
