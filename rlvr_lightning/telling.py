"""What a module that learns from rollouts logs of each batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from rlvr_lightning.delta.tensor import local
from rlvr_lightning.metrics import RolloutMetrics, TokenMeans, over, summed
from rlvr_lightning.rewards.score import Scores
from rlvr_lightning.schema import Rollouts
from rlvr_lightning.scoring import no_signal


def log_scores(module: Any, rollouts: Rollouts, scores: Scores, signal: Tensor) -> None:
    """Rewards and lengths, over all ranks; called by all together.

    Args:
        module: a GRPO.
        rollouts: of this rank.
        scores: of its R completions.
        signal: bool [P], groups with something to learn from.
    """
    measured = RolloutMetrics(**over(module.ranks))
    measured.update(rollouts, scores, signal)
    metrics = measured.compute()
    for name in ("reward/mean", "response/length_mean"):
        module.log(name, metrics.pop(name), prog_bar=True)
    module.log_dict(metrics | getattr(module.engine, "metrics", {}))


def of_steps(module: Any, sums: Mapping[str, float]) -> dict[str, float]:
    """What optimizer steps did, by any algorithm: `train/nonfinite_steps`, `update/...`, and bytes kept beside weights.

    Args:
        module: a PolicyModule.
        sums: what its `take_step` returned, or the sum of several; norms and changes are of all ranks already.
    """
    lost = sums.get("nonfinite", 0.0)
    values = {"train/nonfinite_steps": lost, "update/lr": module.updates.optimizer.param_groups[0]["lr"]}
    made = sums["steps"] - lost
    # NaN if all are lost: loggers would repeat that of the steps before
    values["update/grad_norm"] = sums.get("grad_norm", 0.0) / made if made else math.nan
    values |= {"update/changed_entries": sums["changed"]} if "changed" in sums else {}
    for name, kept in (("reference", module.reference), ("subnetwork", module.frozen)):
        if kept is not None:
            held = torch.tensor(kept.held_bytes(module.layout.shards), dtype=torch.float64)
            values[f"memory/{name}_bytes"] = float(module.layout.shards.sum(held))
    return values


def trained_bytes(module: Any, parameters: Iterable[Tensor], optimizer: Optimizer) -> float:
    """What is held of some parameters and their optimizer state, of one copy over all shards; asked by all together."""
    held = 0.0
    for parameter in parameters:
        state = [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
        held += sum(local(tensor).nbytes for tensor in [parameter, *state]) / module.layout.shards.copies_of(parameter)
    return float(module.layout.shards.sum(torch.tensor(held, dtype=torch.float64)))


def log_updates(module: Any, made: Sequence[Mapping[str, float]]) -> None:
    """Of all optimizer steps of a batch, and of the first before any weight had moved; called by all ranks together.

    Args:
        module: a GRPO.
        made: sums over this rank's tokens, of each optimizer step.
    """
    means, fresh = TokenMeans(**over(module.ranks)), TokenMeans(**over(module.ranks))
    for sums in made:
        means.update(sums)
    fresh.update(made[0])
    mine = summed(made)
    own = torch.tensor([mine.get("loss", 0.0), mine["skipped"]], dtype=torch.float64)
    loss, skipped = module.ranks.sum(own).tolist()
    values = {"train/loss": loss / mine["steps"], "train/skipped_groups": skipped} | of_steps(module, mine)
    values |= means.compute()
    if "policy/kl" in values:
        module.log("policy/kl", values.pop("policy/kl"), prog_bar=True)
    first = fresh.compute()
    if "policy/ratio_mean" in first:
        values |= {f"policy/fresh_{name}": first[f"policy/{name}"] for name in FRESH if f"policy/{name}" in first}
        check_fresh(module, first["policy/ratio_mean"])
    module.log_dict(values)


def warn_without_signal(module: Any, signal: Tensor) -> None:
    """Show some completions of the run's first batch if there is nothing to learn from in it; called by all ranks.

    Args:
        module: a GRPO; of groups of one, or with a baseline beside the group, everything teaches.
        signal: bool [P], groups with something to learn from.
    """
    if module.rollout_step != (module.ahead is not None) or module.least_group == 1:
        return
    if not module.ranks.any(bool(signal.any())):
        rank_zero_warn(no_signal(module.last_samples, module.group_size))


FRESH = ("ratio_mean", "rollout_gap", "rollout_gap_max", "rollout_kl")
"""How far the sampler was from the policy: before the first update only one's rounding or age is in it."""


def check_fresh(module: Any, ratio: float) -> None:
    """Before the first update the policy *is* the sampler: say so loudly when it is not."""
    stale = module.ahead is not None and any(module.ahead.lags)
    truncated_sampling = module.sampling.top_p < 1 or module.sampling.top_k > 0
    if abs(ratio - 1) > 0.01 and not truncated_sampling and not stale:
        rank_zero_warn(f"policy/fresh_ratio_mean is {ratio:.4f}, not 1: the sampler's weights are not the policy's")
