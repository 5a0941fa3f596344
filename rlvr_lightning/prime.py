"""PRIME: process rewards without process labels (arXiv 2502.01456).

    r_t = beta * log(model / reference)_t of a token, by a reward model that is a language model itself
    loss of that model: cross-entropy of sigmoid(sum_t r_t) with the verifier's verdict
    A_t = sum over s >= t of gamma^(s - t) * (r_s - mean of the others' mean r) + R - mean of the others' R
    loss of the policy: GRPO's clipped surrogate of those advantages

What differs from GRPO: a second model of the policy's kind, the implicit process reward model, is trained beside it on
nothing but whether completions are right, and what it thinks of each token is added to the outcome's advantage. It
starts as the policy does, and so does the reference, so the first batch's process rewards are 0 and PRIME begins as
RLOO. Each batch is judged by the model as it was, in the forward pass that it then learns from (the paper's single
forward).

It is a whole second model: weights, gradients and optimizer state beside the policy's (`memory/prm_bytes` counts what
stays of it between steps), an optimizer of the same kind with a rate of its own, and the reference, which GRPO needs
only for a KL term. Its gradients are gone before the policy's are made. With `lora` both are adapters on frozen
weights, which each of the two models holds.

Run it: ``python -m rlvr_lightning fit --config prime.yaml``
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from rlvr_lightning.advantage import process_advantages
from rlvr_lightning.experience import Experience
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.losses import outcome_loss
from rlvr_lightning.metrics import summed
from rlvr_lightning.optim.updates import Updates
from rlvr_lightning.policy import Policy
from rlvr_lightning.rewards.score import Scores
from rlvr_lightning.strategy import build_policy
from rlvr_lightning.telling import trained_bytes
from rlvr_lightning.trainer_checks import sharing


class PRIME(GRPO):
    """Train a causal LM on verifiable rewards and on implicit process rewards.

    Args:
        beta: of the implicit reward, a log-ratio.
        gamma: discount of process rewards by token.
        prm_lr: learning rate of the reward model; the optimizer's own by default.
        kwargs: as of GRPO; the first of `rewards` must say from 0 (wrong) to 1 (right).

    Raises:
        ValueError: a setting out of its range.
    """

    beside = ("prm.",)
    needs_reference = True
    models = 2

    def __init__(self, *, beta: float = 0.05, gamma: float = 1.0, prm_lr: float | None = None, **kwargs: Any) -> None:
        if beta <= 0 or not 0 <= gamma <= 1 or (prm_lr is not None and prm_lr < 0):
            raise ValueError(
                f"beta must be positive, gamma lie in [0, 1], prm_lr not be negative; got {beta}, {gamma} and {prm_lr}"
            )
        super().__init__(advantage="leave_one_out", **kwargs)
        if self.keep_reference == "none":
            raise ValueError("reference: none leaves PRIME nothing to compare with; set it to delta or copy")
        self.beta, self.gamma, self.prm_lr = beta, gamma, prm_lr
        self.prm: Policy = cast(Policy, None)  # built by configure_model
        self.prm_updates: Updates = cast(Updates, None)

    def configure_model(self) -> None:
        """Load the reward model beside the policy."""
        if self.policy is None:
            super().configure_model()
            how = (self._trainer, self.compute_dtype, self.activation_checkpointing)
            self.prm, _ = build_policy(self._new_policy, *how)

    def configure_optimizers(self) -> Any:
        """A second optimizer, of the reward model; the schedule is the policy's alone."""
        optimizers, schedulers = super().configure_optimizers()
        if self.prm_updates is not None:  # of an earlier fit
            self.prm_updates.close()
        rate = {} if self.prm_lr is None else {"lr": self.prm_lr}
        own = self.make_optimizer([{"params": [p for p in self.prm.parameters() if p.requires_grad]} | rate])
        settings = (self.max_grad_norm, self.gradient_release, self.layout.shards)
        self.prm_updates = Updates(own, self.manual_backward, *settings)
        return [*optimizers, own], schedulers

    def check(self, trainer: Trainer, data: Any) -> None:
        """The reward model learns from a whole batch at once, also where the policy does from minibatches."""
        super().check(trainer, data)
        if self.gradient_release and (prompts := getattr(data, "prompts_per_step", None)):
            self.gradient_release.check(prompts // sharing(trainer) * self.group_size, self.batching.micro_batch)

    def credit(self, found: Experience, rewards: Tensor, scores: Scores) -> Experience:
        """Process rewards and outcomes, each against the others of the group; the reward model takes a step."""
        labels = scores.parts[next(iter(self.scorer.rewards))].to(rewards.device)
        if self.ranks.any(bool(((labels < 0) | (labels > 1)).any())):
            raise ValueError("PRIME: the first of rewards must say from 0 (wrong) to 1 (right); put a verifier first")
        process = self.judge_tokens(found, labels)
        if (penalty := self.kl_penalty(found)) is not None:
            rewards = rewards - penalty.sum(1)
        advantages = process_advantages(process, rewards, found.mask, self.group_size, self.gamma)
        return replace(found, advantages=advantages)

    def judge_tokens(self, found: Experience, labels: Tensor) -> Tensor:
        """Process rewards, float32 [R, T], by the reward model as it is; then it takes a step on the labels.

        Args:
            found: with the reference's log-probs.
            labels: float32 [R], 0 to 1.
        """
        self._phase("prm")
        process = torch.zeros(found.mask.shape, device=found.mask.device)
        completions = self._global_counts(found.mask).completions
        numbered = replace(
            found, advantages=torch.arange(len(labels), device=process.device)
        )  # rows, to find them again
        micros = list(numbered.micro_batches(self.batching.micro_batch))
        self.prm_updates.begin(len(micros))
        made = []
        for micro in micros:
            gap = self.prm(micro.rollouts, self.sampling.temperature).logprobs - cast(Tensor, micro.ref_logprobs)
            own = (self.beta * gap).masked_fill(~micro.mask, 0.0)
            out = outcome_loss(own, labels[micro.advantages], micro.mask, completions)
            process[micro.advantages] = own.detach()
            self.prm_updates.backward(out.loss * self.ranks.size)  # ranks are averaged, the count is global
            made.append({name: float(value) for name, value in out.metrics.items()})
        sums = summed(made)
        finite = not self.ranks.any(not math.isfinite(sums["prm_loss"]))
        # Past Lightning's wrapper, which would count the step: `max_steps` is of the policy's.
        update = self.prm_updates.finish(self.prm_updates.optimizer.step, finite)
        self._tell_prm(sums, update, completions)
        return process

    def _tell_prm(self, sums: Mapping[str, float], update: Mapping[str, float], completions: int) -> None:
        mine = torch.tensor([sums["prm_loss"], sums["prm_right"]], dtype=torch.float64)
        loss, right = (self.ranks.sum(mine) / max(completions, 1)).tolist()
        told = {"prm/loss": loss, "prm/accuracy": right, "prm/nonfinite_steps": update.get("nonfinite", 0.0)}
        told["prm/grad_norm"] = update.get("grad_norm", math.nan)  # loggers would repeat the last one
        held = trained_bytes(self, self.prm.parameters(), self.prm_updates.optimizer)
        self.log_dict(told | {"memory/prm_bytes": held})
