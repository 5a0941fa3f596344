"""What GRPO logs of a batch, over all ranks. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from rlvr_lightning.advantage import has_signal
from rlvr_lightning.rewards.score import Scores
from rlvr_lightning.schema import Rollouts

PER_TOKEN = {
    "ratio_mean": "ratio",
    "clip_frac": "clipped",
    "entropy": "entropy",
    "rollout_kl": "rollout_kl",
    "kl": "kl",
}
"""Metrics that are means over the tokens that went through the model, and the sums they are made of."""


def facts(rollouts: Rollouts, scores: Scores, group: int) -> dict[str, list[float]]:
    """Numbers of each completion or group, by name; the lists of several ranks can be joined."""
    return {
        "total": scores.total.tolist(),
        "length": rollouts.lengths.tolist(),
        "truncated": rollouts.truncated.tolist(),
        "signal": has_signal(scores.total, group).tolist(),
        "failed": [float(scores.failed)],
    } | {f"part {name}": part.tolist() for name, part in scores.parts.items()}


def score_metrics(ranks: Sequence[Mapping[str, list[float]]]) -> dict[str, float]:
    """Metrics of a batch of rollouts.

    Args:
        ranks: what `facts` gave on each.
    """
    joined = {name: torch.tensor([x for part in ranks for x in part[name]]).double() for name in ranks[0]}
    parts = {name: values for name, values in joined.items() if name.startswith("part ")}
    metrics = {
        "reward/mean": joined["total"].mean(),
        "response/length_mean": joined["length"].mean(),
        "reward/std": joined["total"].std(),
        "reward/no_signal_frac": 1 - joined["signal"].mean(),
        "reward/failed": joined["failed"].sum(),
        "response/truncated_frac": joined["truncated"].mean(),
    } | {f"reward/{name.removeprefix('part ')}": values.mean() for name, values in parts.items()}
    return {name: float(value) for name, value in metrics.items()}


def pass_rates(ranks: Sequence[Mapping[tuple[str, str, str], list[float]]]) -> dict[str, float]:
    """Mean share of correct answers.

    Args:
        ranks: on each, (split, benchmark, mode) -> a share for every problem.

    Returns:
        `split/benchmark/mode` -> mean over problems; also with `all` for the benchmark where there are several.

    >>> a, b = ("val", "a", "pass@1"), ("val", "b", "pass@1")
    >>> pass_rates([{a: [0.5, 1.0]}, {a: [0.0], b: [0.5]}])
    {'val/a/pass@1': 0.5, 'val/b/pass@1': 0.5, 'val/all/pass@1': 0.5}
    """
    joined: dict[tuple[str, str, str], list[float]] = {}
    for part in ranks:
        for key, shares in part.items():
            joined.setdefault(key, []).extend(shares)
    if len({benchmark for _, benchmark, _ in joined}) > 1:
        for (split, _, mode), shares in list(joined.items()):
            joined.setdefault((split, "all", mode), []).extend(shares)
    return {"/".join(key): sum(shares) / len(shares) for key, shares in joined.items()}


def summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sums by name; a name that is missing somewhere counts 0 there.

    >>> summed([{"a": 1.0}, {"a": 2.0, "b": 3.0}])
    {'a': 3.0, 'b': 3.0}
    """
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def token_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics `policy/...` from sums over tokens; none if no token went through the model."""
    if not sums.get("tokens"):
        return {}
    return {f"policy/{name}": sums[key] / sums["tokens"] for name, key in PER_TOKEN.items() if key in sums}
