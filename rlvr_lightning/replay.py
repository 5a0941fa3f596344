"""`python -m rlvr_lightning replay FOLDER`: what each completion of a batch does to the loss and the gradient.

FOLDER is what a run kept when it stopped because its gradients were not finite. Each completion goes forward and
backward by itself, and its loss and the norm of its gradient are printed: by the model that the run started from, by
another (`--model`), or by a checkpoint (`--checkpoint`, a file, a folder, or a run of which the newest is taken). The
loss of PPO includes that of the values that the run had before it learned from the batch; the gradient is the policy's.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlvr_lightning.advantage import of_completions
from rlvr_lightning.experience import Experience
from rlvr_lightning.export import DTYPES, choose, kept_steps, restored
from rlvr_lightning.kept_batch import load_batch
from rlvr_lightning.losses import Counts, Objective, policy_loss, token_weights, value_loss
from rlvr_lightning.policy import LoRA, Policy, compute_dtype_of, load_model


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """One completion."""

    rank: int
    row: int
    tokens: int
    advantage: float
    """The mean over its tokens, where each has its own."""
    loss: float
    """Its share of the loss of the step."""
    grad_norm: float
    before: tuple[str, ...]
    """What was not finite before the model came into it: `advantages`, `rollout_logprobs`, or one of `CHECKED`."""

    @property
    def finite(self) -> bool:
        """Whether nothing is amiss."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm) and not self.before

    def __str__(self) -> str:
        """A row of the table."""
        found = [name for name in ("loss", "grad_norm") if not math.isfinite(getattr(self, name))]
        amiss = f"   not finite: {', '.join([*self.before, *found])}" if not self.finite else ""
        numbers = f"{self.advantage:>10.4g} {self.loss:>11.4g} {self.grad_norm:>10.4g}"
        return f"{self.rank:>4} {self.row:>5} {self.tokens:>7} {numbers}{amiss}"


CHECKED = ("ref_logprobs", "old_values", "returns")
"""What only some algorithms have."""
HEADER = "rank   row  tokens  advantage        loss  grad norm"


def replay(policy: Policy, parts: list[tuple[Experience, dict[str, Any]]]) -> Iterator[Replayed]:
    """Forward and backward for each completion alone.

    Args:
        policy: whole, in this process; its gradients are dropped.
        parts: from `load_batch`.
    """
    device = next(policy.parameters()).device
    masks = [experience.mask for experience, _ in parts]
    for rank, (experience, about) in enumerate(parts):
        counts = Counts(
            tokens=int(sum(mask.sum() for mask in masks)),
            completions=int(sum(mask.any(1).sum() for mask in masks)),
            max_tokens=about["max_tokens"],
        )
        whole = replace(experience, rollouts=experience.rollouts.split_groups(experience.rollouts.group))
        for row in range(len(whole.advantages)):
            one = whole.select([row])
            loss, norm = _loss_and_norm(policy, one, about, counts, device)
            checked = {"advantages": one.advantages, "rollout_logprobs": one.rollouts.rollout_logprobs}
            checked |= {name: value for name in CHECKED if (value := getattr(one, name)) is not None}
            yield Replayed(
                rank=rank,
                row=row,
                tokens=int(one.mask.sum()),
                advantage=float(of_completions(one.advantages, one.mask)),
                loss=loss,
                grad_norm=norm,
                before=tuple(name for name, tensor in checked.items() if not bool(tensor.isfinite().all())),
            )


def _loss_and_norm(
    policy: Policy, one: Experience, about: dict[str, Any], counts: Counts, device: torch.device
) -> tuple[float, float]:
    def there(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.to(device)

    names = ("completion_ids", "completion_mask", "rollout_logprobs", "truncated")
    rollouts = replace(one.rollouts, **{name: there(getattr(one.rollouts, name)) for name in names})
    now = policy(rollouts, about["temperature"])
    out = policy_loss(
        now.logprobs,
        rollouts.rollout_logprobs,
        there(one.advantages),
        there(one.mask),
        Objective(**about["objective"]),
        counts,
        entropy=now.entropy,
        ref_logprobs=there(one.ref_logprobs),
        old_logprobs=there(one.old_logprobs),
    )
    policy.zero_grad(set_to_none=True)
    out.loss.backward()
    squares = [p.grad.float().square().sum() for p in policy.parameters() if p.grad is not None]
    policy.zero_grad(set_to_none=True)
    loss = float(out.loss.detach())
    if one.old_values is not None and one.returns is not None:
        weights = token_weights(one.mask, about["objective"]["normalization"], counts)
        loss += float(value_loss(one.old_values, one.old_values, one.returns, weights, clip=0.0).loss)
    return loss, math.sqrt(sum(float(s) for s in squares)) if squares else 0.0


def load_policy(about: dict[str, Any], model: str | None, checkpoint: Path | None) -> Policy:
    """The policy of a checkpoint, or as a run starts with it."""
    if checkpoint is not None:
        policy, _ = restored(choose(kept_steps(checkpoint), None), model)
    else:
        fresh = load_model(model or about["model"], DTYPES[about["dtype"]])
        policy = Policy(LoRA(**about["lora"]).adapt(fresh) if about["lora"] else fresh)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy.compute_in(compute_dtype_of(policy, about["compute_dtype"], device))
    return policy.to(device)


def main(argv: list[str]) -> int:
    """Replay; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rlvr_lightning replay", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="runs/NAME/version_K/not_finite/...")
    parser.add_argument("--model", help="a folder, hub name, tiny or smollm2; that of the run by default")
    parser.add_argument("--checkpoint", type=Path, help="of the run, or a run's folder: its newest")
    options = parser.parse_args(argv)
    try:
        parts = load_batch(options.folder)
        policy = load_policy(parts[0][1], options.model, options.checkpoint)
        print(HEADER)
        rows = []
        for one in replay(policy, parts):
            print(one, flush=True)
            rows.append(one)
    except ValueError as error:
        print(f"error: replay: {error}", file=sys.stderr)
        return 2
    for one in rows:
        if not one.finite:
            sample = parts[one.rank][1]["samples"][one.row]
            print(f"\nrank {one.rank}, row {one.row}: {sample['prompt']!r} -> {sample['completion']!r}")
    print(f"\n{sum(not one.finite for one in rows)} of {len(rows)} completions are not finite")
    return 0
