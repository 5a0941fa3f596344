"""GRPO: group-relative policy optimization around a policy and a frozen reference.

One training step is one batch of prompts and everything that follows from it::

    prompts -> G completions each -> rewards -> advantages -> [passes x minibatches] of clipped policy gradient

    loss = sum_t w_t * ( -min(ratio_t A, clip(ratio_t) A) + kl_coef * KL(policy || reference)_t )

What differs from the paper (arXiv 2402.03300), on purpose:

- the ratio's denominator is the sampler's own log-prob, not a second forward pass of the trainer;
- tokens are weighted over the whole optimizer step (`Objective.normalization`), whatever the micro-batches;
- a group whose rewards are all equal has no gradient, so it is neither run forward nor backward (its tokens still count
  in the denominator, so that skipping changes no gradient), unless a KL or entropy term needs it;
- the KL term is off by default, and then no reference exists.

The loss starts near 0 and stays there: the ratio is 1 and the advantages of a group sum to 0. Watch the reward.

Run it: ``python -m rlvr_lightning fit --config sgd.yaml``
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from rlvr_lightning.advantage import Baseline, group_advantages, has_signal, of_completions, teaches
from rlvr_lightning.data.curriculum import tell_curriculum
from rlvr_lightning.evaluation import Evaluated
from rlvr_lightning.evaluation_plan import Evaluation
from rlvr_lightning.experience import Batching, Experience, Handling, check_resampling, check_settings
from rlvr_lightning.kept_batch import about_batch, save_batch
from rlvr_lightning.losses import Counts, Objective, policy_loss
from rlvr_lightning.metrics import summed
from rlvr_lightning.policy import TokenLogprobs
from rlvr_lightning.policy_module import PolicyModule
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.score import Scores
from rlvr_lightning.rollout import stop_token_ids
from rlvr_lightning.rollout.ahead import Ahead, FollowedByVLLM
from rlvr_lightning.rollout.choose import Engine, Rollout, corrected, longest, settings_of, vllm_engine
from rlvr_lightning.schema import LossOutput, Rollouts, Sampling
from rlvr_lightning.scoring import Scorer, describe
from rlvr_lightning.seeds import derive_seed
from rlvr_lightning.telling import log_scores, log_updates, warn_without_signal
from rlvr_lightning.trainer_checks import check_batches, check_reference, sharing

Record = dict[str, Any]


class GRPO(FollowedByVLLM, Evaluated, PolicyModule):
    """Train a causal LM on verifiable rewards.

    Args:
        model: the policy: `tiny`, `smollm2`, a folder, or a hub name. The reference is its state at the start.
        rewards: parts of the reward by name; the first is the verifier that `validate` counts.
        optimizer: any torch optimizer; called with the trainable parameters.
        reward_weights: weight of each part; 1 where not given.
        group_size: completions per prompt, G.
        advantage: how a reward is compared with its group (see `group_advantages`).
        objective: the loss.
        sampling: how completions are drawn in training.
        stop: strings that end a completion, such as a newline; matched against single tokens.
        batching: sizes.
        rollout: who draws completions: `hf`, the embedded engine; `vllm`, or settings of it.
        handling: truncated completions, groups without signal, failing rewards.
        evaluation: what validation measures of each problem.
        reference: how the KL term's reference is kept: as the entries that changed since the start, or as a copy; both
            give the same numbers. Without a KL term (`objective.kl_coef`) there is none.
        kwargs: of every algorithm; see `PolicyModule`.

    Raises:
        ValueError: settings that cannot work together, before any weights are loaded.
    """

    counts = ("rollout_step", *PolicyModule.counts)  # the first seeds sampling, so a resumed run goes on with it
    least_group = 2
    """Completions of a prompt without which there is no baseline."""
    needs_reference = False
    """Whether there is a reference also without a KL term."""
    models = 1
    """Language models that are trained."""

    def __init__(  # noqa: PLR0913 (the YAML's `model:` block, flat on purpose)
        self,
        model: str,
        rewards: dict[str, Reward],
        optimizer: OptimizerCallable,
        reward_weights: dict[str, float] | None = None,
        group_size: int = 8,
        advantage: Baseline = "mean_std",
        objective: Objective = Objective(),  # noqa: B008 (frozen)
        sampling: Sampling = Sampling(),  # noqa: B008
        stop: list[str] | None = None,
        batching: Batching = Batching(),  # noqa: B008
        rollout: Rollout = "hf",
        handling: Handling = Handling(),  # noqa: B008
        evaluation: Evaluation = Evaluation(),  # noqa: B008
        reference: Literal["delta", "copy", "none"] = "delta",
        **kwargs: Any,
    ) -> None:
        check_settings(group_size, batching, sampling, rewards, reward_weights, self.least_group)
        check_resampling(group_size, handling)
        check_reference(reference, objective.kl_coef)
        kept = reference if self.needs_reference or objective.kl_coef > 0 else "none"
        super().__init__(model=model, optimizer=optimizer, reference=kept, **kwargs)
        self.vllm = settings_of(rollout, handling.resample_rounds)
        self.scorer = Scorer(tokenizer=self.tokenizer, rewards=rewards, weights=reward_weights or {}, stop=stop or [])
        self.group_size, self.advantage, self.objective = group_size, advantage, corrected(objective, self.vllm)
        self.sampling, self.batching, self.handling = sampling, batching, handling
        self.evaluation = evaluation
        self.engine: Engine = cast(Engine, None)  # built by configure_model
        self.ahead: Ahead | None = None
        self.rollout_step = 0  # batches of rollouts so far; `global_step` counts optimizer steps
        self.last_samples: list[Record] = []

    def configure_model(self) -> None:
        """Load the policy, the reference if a KL term needs one, and the engine around the policy's own weights."""
        if self.policy is not None:
            return
        super().configure_model()
        if self.vllm is None:
            self.engine = self.embedded_engine(self.scorer.stop, self.batching.rollout_batch)
            return
        stops, pad = stop_token_ids(self.tokenizer, self.scorer.stop), self.tokenizer.pad_token_id
        prompt_tokens = getattr(getattr(self._trainer, "datamodule", None), "longest_prompt", 0)
        room = longest(self.policy, prompt_tokens, self.sampling.max_tokens)
        arithmetic = (self.compute_dtype, self._trainer)
        self.engine = vllm_engine(self.policy, self.layout, self.vllm, self.model_name, (stops, pad), room, *arithmetic)
        self.ahead = Ahead(self.engine) if self.vllm.max_staleness else None

    def check(self, trainer: Trainer, data: Any) -> None:
        """Raise ValueError for a trainer or a data module that a fit cannot work with, before anything is loaded."""
        super().check(trainer, data)
        if prompts := getattr(data, "prompts_per_step", None):
            check_batches(prompts, self.group_size, self.batching, self.gradient_release, sharing(trainer))

    # ---- one training step ----

    def training_step(self, batch: list[Record], batch_idx: int) -> None:
        """Sample, score, learn."""
        started = time.perf_counter()
        records = batch[self.ranks.rank :: self.ranks.size]
        if self.ahead is not None and not (records := self.ahead.exchange(self, batch)):
            self.rollout_step += 1
            return  # the first batch is under way, and there is nothing to train on
        rollouts, scores, seconds = self.rollout(records)
        signal = self.with_signal(rollouts, scores)
        log_scores(self, rollouts, scores, signal)
        experience = self.judge(rollouts, scores, records)
        warn_without_signal(self, signal)
        learning = time.perf_counter()
        self.learn(experience)
        self._phase("")
        now = time.perf_counter()
        tokens = int(self.ranks.sum(rollouts.lengths.sum()))
        timing = {
            "time/train_s": now - learning,
            "time/step_s": now - started,
            "tokens/per_s": tokens / (now - started),
        }
        self.log_dict(seconds | timing)
        self.rollout_step += 1

    def rollout(self, records: list[Record]) -> tuple[Rollouts, Scores, dict[str, float]]:
        """Sample G completions of each prompt and score them; draw again, if asked to, groups without signal.

        What is drawn again is chosen by its rewards, so it says little of the policy: the curriculum and
        `reward/mean_first_draw` are of the first draw, all else that is logged is of what is learned from.
        """
        rollouts, scores, seconds = self._sample_and_score(records, round_=0)
        self.log_dict(tell_curriculum(self, records, scores))
        if self.handling.resample_rounds:
            total, count = self.ranks.sum(torch.stack([scores.total.sum(), torch.tensor(len(scores.total))])).tolist()
            self.log("reward/mean_first_draw", total / max(count, 1))
        for round_ in range(1, self.handling.resample_rounds + 1):
            dull = (~self.with_signal(rollouts, scores)).nonzero()[:, 0].tolist()
            if not self.ranks.any(bool(dull)):
                break
            again, rescored, more = self._sample_and_score([records[p] for p in dull], round_)
            scores = scores.with_replaced(rollouts.rows(dull), rescored)
            rollouts = rollouts.with_replaced(dull, again)
            seconds = {name: value + more[name] for name, value in seconds.items()}
        return rollouts, scores, seconds

    def with_signal(self, rollouts: Rollouts, scores: Scores) -> Tensor:
        """Bool [P]: groups with something to learn from, which need not be drawn again."""
        return has_signal(self.earned(rollouts, scores), self.group_size)

    def earned(self, rollouts: Rollouts, scores: Scores) -> Tensor:
        """Rewards, float32 [R], less the penalty of cut completions if there is one (`handling.truncated`)."""
        rewards = scores.total.to(rollouts.truncated.device)
        return rewards - rollouts.truncated.float() if self.handling.truncated == "penalize" else rewards

    def _sample_and_score(self, records: list[Record], round_: int) -> tuple[Rollouts, Scores, dict[str, float]]:
        self._phase("rollout")
        started = time.perf_counter()
        prompts = [r["prompt_ids"] for r in records]
        seeds = [derive_seed(self.seed, self.rollout_step, r["index"], round_) for r in records]
        if self.ahead is None:
            rollouts = self.engine.generate(prompts, self.group_size, self.sampling, seeds)
        else:
            rollouts = self.ahead.take()
        self._phase("reward")
        sampled = time.perf_counter()
        scores = self.layout.tensor.first(self.scorer(rollouts, records, self.failures_file))
        failed, scored = self.ranks.sum(torch.tensor([scores.failed, len(scores.total)])).tolist()
        if failed > self.handling.max_failed_frac * scored:
            raise ValueError(
                f"rewards failed on {failed} of {scored} completions, more than "
                f"handling.max_failed_frac={self.handling.max_failed_frac}; see {self.failures_file}"
            )
        return rollouts, scores, {"time/rollout_s": sampled - started, "time/reward_s": time.perf_counter() - sampled}

    def judge(self, rollouts: Rollouts, scores: Scores, records: list[Record]) -> Experience:
        """Advantages, the mask of tokens that count, and the reference's log-probs."""
        rewards, mask = self.earned(rollouts, scores), rollouts.completion_mask
        if self.handling.truncated == "mask":
            mask = mask & ~rollouts.truncated[:, None]
        ref_logprobs = None
        if self.reference is not None:
            self._phase("reference")
            ref_logprobs = self._without_grad(self.reference.logprobs, rollouts)
        nothing = torch.zeros_like(rewards)
        own = self._own_logprobs(rollouts)
        found = Experience(
            rollouts=rollouts, advantages=nothing, mask=mask, ref_logprobs=ref_logprobs, old_logprobs=own
        )
        experience = self.credit(found, rewards, scores)
        samples = self.scorer.samples(rollouts, records)
        told = describe(samples, scores, of_completions(experience.advantages, mask), self.rollout_step)
        if self.ahead is not None:
            told = [sample | {"staleness": lag} for sample, lag in zip(told, self.ahead.lags, strict=True)]
        self.last_samples = told if self.layout.tensor.rank == 0 else []  # the others have the same
        return experience if self._corrects_later else replace(experience, old_logprobs=None)

    @property
    def _corrects_later(self) -> bool:
        """Whether a correction will find a policy that has moved since the rollouts; the first update does not."""
        return self.objective.correction != "none" and self.batching.minibatches * self.batching.passes > 1

    def _own_logprobs(self, rollouts: Rollouts) -> Tensor | None:
        """The policy's own, float32 [R, T], of now; None where nothing asks for them, or the sampler's are the same."""
        same = self.objective.correction == "none" and self.sampling.top_p == 1 and self.sampling.top_k == 0
        penalized = self.objective.kl_coef > 0 and not self.objective.kl_in_loss
        if not self._corrects_later and (same or not penalized):
            return None
        return self._without_grad(lambda some, temperature: self.policy(some, temperature).logprobs, rollouts)

    def credit(self, found: Experience, rewards: Tensor, scores: Scores) -> Experience:
        """The experience with its advantages: here of whole completions, against their groups.

        Args:
            found: all but the advantages.
            rewards: float32 [R], what was earned, truncation taken into account.
            scores: what that is made of.
        """
        if (penalty := self.kl_penalty(found)) is not None:
            rewards = rewards - penalty.sum(1)
        return replace(found, advantages=group_advantages(rewards, self.group_size, self.advantage))

    def kl_penalty(self, found: Experience) -> Tensor | None:
        """What a KL term in the reward takes off each token, float32 [R, T]; None if there is no such term.

        A sampler that cuts tails off (`top_p`, `top_k`) has higher log-probs than the policy, which would be a tax on
        length: then they are the policy's own.
        """
        if self.objective.kl_coef == 0 or self.objective.kl_in_loss:
            return None
        own = found.rollouts.rollout_logprobs if found.old_logprobs is None else found.old_logprobs
        gap = own - cast(Tensor, found.ref_logprobs)
        return (self.objective.kl_coef * gap).masked_fill(~found.mask, 0.0)

    def _without_grad(self, logprobs: Callable[[Rollouts, float], Tensor], rollouts: Rollouts) -> Tensor:
        """[R, T] log-probs in micro-batches of whole prompts."""
        prompts = max(1, self.batching.micro_batch // self.group_size)
        total = len(rollouts.prompt_ids)  # the same on all ranks, and so the number of forward passes
        parts = [list(range(start, min(start + prompts, total))) for start in range(0, total, prompts)]
        with torch.no_grad():
            return torch.cat([logprobs(rollouts.select(part), self.sampling.temperature) for part in parts])

    def learn(self, experience: Experience) -> None:
        """All optimizer steps of one batch of rollouts."""
        made = []
        for pass_ in range(self.batching.passes):
            shuffle = derive_seed(self.seed, self.rollout_step, "minibatches", pass_)
            for minibatch in experience.minibatches(self.batching.minibatches, shuffle, self.ranks):
                made.append(self.update(minibatch))
                if self.nonfinite_in_row == self.handling.max_nonfinite_steps > 0:
                    raise ValueError(self._keep_batch(experience))
        log_updates(self, made)
        self.log_dict(self.tell(summed(made)))

    def _keep_batch(self, experience: Experience) -> str:
        """Write the batch down for `replay`; returns why the run stops."""
        folder = self.run_folder / "not_finite" / f"step_{self.global_step}"
        if self.layout.tensor.rank == 0:
            save_batch(folder, self.ranks.rank, experience, about_batch(self))
        self.ranks.any(False)  # all have written
        return (
            f"loss or gradient were not finite in {self.nonfinite_in_row} optimizer steps in a row, the limit of "
            f"handling.max_nonfinite_steps; to see why: python -m rlvr_lightning replay {folder}"
        )

    def update(self, minibatch: Experience) -> dict[str, float]:
        """One optimizer step on a minibatch. Returns sums over this rank's tokens that went through the model."""
        counts = self._global_counts(minibatch.mask)
        live = teaches(minibatch.advantages, minibatch.mask, self.group_size)
        if self.needs_all:
            live = minibatch.mask.any(1).view(-1, self.group_size).any(1)
        chosen = minibatch.select(live.nonzero()[:, 0].tolist()) if live.any() else None
        micros = list(chosen.micro_batches(self.batching.micro_batch)) if chosen else []
        sums = self.take_step(micros, lambda micro: self.loss_of(micro, counts))
        return {"tokens": 0.0, "skipped": float((~live).sum())} | sums

    @property
    def needs_all(self) -> bool:
        """Whether also tokens without an advantage teach something."""
        return self.objective.kl_in_loss or self.objective.entropy_coef > 0

    def loss_of(self, micro: Experience, counts: Counts) -> LossOutput:
        """Of some completions, with the numbers of tokens and completions of the whole optimizer step."""
        out = self.loss_of_tokens(self.policy(micro.rollouts, self.sampling.temperature), micro, counts)
        return replace(out, metrics=out.metrics | {"tokens": micro.mask.sum()})

    def loss_of_tokens(self, now: TokenLogprobs, micro: Experience, counts: Counts) -> LossOutput:
        """The same, of what the policy says of the tokens."""
        return policy_loss(
            now.logprobs,
            micro.rollouts.rollout_logprobs,
            micro.advantages,
            micro.mask,
            self.objective,
            counts,
            entropy=now.entropy,
            ref_logprobs=micro.ref_logprobs,
            old_logprobs=micro.old_logprobs,
        )

    def tell(self, made: Mapping[str, float]) -> dict[str, float]:
        """More to log of all updates of a batch, from this rank's sums; called by all ranks together."""
        return {}

    def _global_counts(self, mask: Tensor) -> Counts:
        tokens, completions = self.ranks.sum(torch.stack([mask.sum(), mask.any(1).sum()])).tolist()
        return Counts(tokens=tokens, completions=completions, max_tokens=self.sampling.max_tokens)
