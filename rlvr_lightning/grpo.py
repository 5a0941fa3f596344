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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rlvr_lightning.advantage import Baseline, group_advantages, has_signal
from rlvr_lightning.checkpoint import DeltaCheckpoints
from rlvr_lightning.experience import Batching, Experience, Handling, check_settings
from rlvr_lightning.learning_rate import with_warmup
from rlvr_lightning.losses import Counts, Objective, policy_loss
from rlvr_lightning.optim.release import GradientRelease
from rlvr_lightning.optim.updates import Updates
from rlvr_lightning.policy import LoRA, Policy, load_model, load_tokenizer, resolve_model
from rlvr_lightning.reference import Reference
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.score import Scores
from rlvr_lightning.rollout import HFEngine, stop_token_ids
from rlvr_lightning.schema import Rollouts, Sampling
from rlvr_lightning.scoring import Scorer, describe
from rlvr_lightning.seeds import derive_seed
from rlvr_lightning.trainer_checks import check_batches, check_optimizer, check_reference, check_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Record = dict[str, Any]


class GRPO(DeltaCheckpoints):
    """Train a causal LM on verifiable rewards.

    Args:
        model: the policy: `tiny`, `smollm2`, a folder, or a hub name. The reference is its state at the start.
        rewards: parts of the reward by name; the first is the verifier that `validate` counts.
        optimizer: any torch optimizer; called with the trainable parameters.
        reward_weights: weight of each part; 1 where not given.
        scheduler: learning-rate schedule, stepped after each optimizer step; None keeps the rate.
        warmup_steps: optimizer steps over which the rate rises linearly to its value.
        group_size: completions per prompt, G.
        advantage: how a reward is compared with its group (see `group_advantages`).
        objective: the loss.
        sampling: how completions are drawn in training.
        stop: strings that end a completion, such as a newline; matched against single tokens.
        batching: sizes.
        handling: truncated completions, groups without signal, failing rewards.
        max_grad_norm: clip the gradient's global norm to this; 0 turns it off (unclipped SGD can destroy a model).
        val_samples: sampled completions per problem in validation, beside the greedy one.
        lora: train adapters of this shape instead of the weights.
        dtype: of the stored weights.
        compute_dtype: of activations and arithmetic; `auto` is that of the weights, but float32 for 16-bit weights on a
            CPU, which is several times faster there. Layers cast their weights as they run, never the whole model.
        reference: how the KL term's reference is kept: as the entries that changed since the start, or as a copy; both
            give the same numbers. Without a KL term (`objective.kl_coef`) there is none.
        gradient_release: update weights during the backward pass, so that gradients never exist all at once.
        activation_checkpointing: recompute layers in the backward pass: less memory, about a third more time.
        seed: of sampling; use the run's seed.

    Raises:
        ValueError: settings that cannot work together, before any weights are loaded.
    """

    counts = ("rollout_step",)  # seeds sampling, so a resumed run goes on with it

    def __init__(  # noqa: PLR0913 (the YAML's `model:` block, flat on purpose)
        self,
        model: str,
        rewards: dict[str, Reward],
        optimizer: OptimizerCallable,
        reward_weights: dict[str, float] | None = None,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        group_size: int = 8,
        advantage: Baseline = "mean_std",
        objective: Objective = Objective(),  # noqa: B008 (frozen)
        sampling: Sampling = Sampling(),  # noqa: B008
        stop: list[str] | None = None,
        batching: Batching = Batching(),  # noqa: B008
        handling: Handling = Handling(),  # noqa: B008
        max_grad_norm: float = 1.0,
        val_samples: int = 4,
        lora: LoRA | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        reference: Literal["delta", "copy", "none"] = "delta",
        gradient_release: GradientRelease | None = None,
        activation_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        check_settings(group_size, batching, sampling, rewards, reward_weights)
        check_reference(reference, objective.kl_coef)
        follows = reference == "delta" and objective.kl_coef > 0 and not lora and dtype == "bfloat16"
        check_optimizer(optimizer, gradient_release, follows)
        self.model_name = resolve_model(model)
        self.tokenizer = load_tokenizer(self.model_name)
        self.scorer = Scorer(tokenizer=self.tokenizer, rewards=rewards, weights=reward_weights or {}, stop=stop or [])
        self.make_optimizer, self.make_scheduler, self.warmup_steps = optimizer, scheduler, warmup_steps
        self.group_size, self.advantage, self.objective = group_size, advantage, objective
        self.sampling, self.batching, self.handling = sampling, batching, handling
        self.max_grad_norm, self.val_samples = max_grad_norm, val_samples
        self.lora, self.weights_dtype, self.compute_dtype = lora, getattr(torch, dtype), compute_dtype
        self.keep_reference, self.gradient_release = reference, gradient_release
        self.activation_checkpointing, self.seed = activation_checkpointing, seed
        self.policy: Policy = cast(Policy, None)  # built, like the next two, by configure_model
        self.reference: Reference | None = None
        self.engine: HFEngine = cast(HFEngine, None)
        self.updates: Updates = cast(Updates, None)  # made with the optimizer
        self.rollout_step = 0  # batches of rollouts so far; `global_step` counts optimizer steps
        self.phase_listeners: list[Callable[[str], None]] = []
        self.last_samples: list[Record] = []

    # ---- building ----

    def configure_model(self) -> None:
        """Load the policy, the reference if a KL term needs one, and the engine around the policy's own weights."""
        if self.policy is not None:
            return
        model = self.load_model()
        if self.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.policy = Policy(self.lora.adapt(model) if self.lora else model)
        self.policy.compute_in(self.compute_dtype, self._trainer.strategy.root_device if self._trainer else self.device)
        if self.objective.kl_coef > 0:
            self.reference = Reference(self.policy, "copy" if self.keep_reference == "copy" else "delta")
        self.remember_start(self.reference)
        stops = stop_token_ids(self.tokenizer, self.scorer.stop)
        pad = self.tokenizer.pad_token_id
        self.engine = HFEngine(self.policy.model, stops, pad, max_batch=self.batching.rollout_batch)

    def load_model(self) -> PreTrainedModel:
        """The causal LM to train; a subclass may make one of its own."""
        return load_model(self.model_name, self.weights_dtype)

    def configure_optimizers(self) -> Any:
        """The optimizer over trainable parameters, with its schedule."""
        optimizer = self.make_optimizer([p for p in self.policy.parameters() if p.requires_grad])
        if self.updates is not None:  # of an earlier fit
            self.updates.close()
        self.updates = Updates(optimizer, self.manual_backward, self.max_grad_norm, self.gradient_release)
        if self.reference is not None:
            self.reference.listen(optimizer)
        scheduler = with_warmup(optimizer, self.make_scheduler, self.warmup_steps)
        return [optimizer], [] if scheduler is None else [scheduler]

    def setup(self, stage: str) -> None:
        """Check what the trainer and the data module bring."""
        if stage != "fit":
            return
        check_trainer(self.trainer, self.weights_dtype)
        if prompts := getattr(getattr(self.trainer, "datamodule", None), "prompts_per_step", None):
            ranks = self.trainer.world_size
            check_batches(prompts, self.group_size, self.batching, self.gradient_release, ranks)

    # ---- one training step ----

    def training_step(self, batch: list[Record], batch_idx: int) -> None:
        """Sample, score, learn."""
        started = time.perf_counter()
        records = batch[self.global_rank :: self.trainer.world_size]
        rollouts, scores, seconds = self.rollout(records)
        self._log_scores(rollouts, scores)
        experience = self.judge(rollouts, scores, records)
        learning = time.perf_counter()
        self.learn(experience)
        self._phase("")
        now = time.perf_counter()
        tokens = int(rollouts.lengths.sum())
        timing = {
            "time/train_s": now - learning,
            "time/step_s": now - started,
            "tokens/per_s": tokens / (now - started),
        }
        self.log_dict(seconds | timing)
        self.rollout_step += 1

    def rollout(self, records: list[Record]) -> tuple[Rollouts, Scores, dict[str, float]]:
        """Sample G completions of each prompt and score them; draw again, if asked to, groups without signal."""
        rollouts, scores, seconds = self._sample_and_score(records, round_=0)
        for round_ in range(1, self.handling.resample_rounds + 1):
            dull = (~has_signal(scores.total, self.group_size)).nonzero()[:, 0].tolist()
            if not dull:
                break
            again, rescored, more = self._sample_and_score([records[p] for p in dull], round_)
            scores = scores.with_replaced(rollouts.rows(dull), rescored)
            rollouts = rollouts.with_replaced(dull, again)
            seconds = {name: value + more[name] for name, value in seconds.items()}
        return rollouts, scores, seconds

    def _sample_and_score(self, records: list[Record], round_: int) -> tuple[Rollouts, Scores, dict[str, float]]:
        self._phase("rollout")
        started = time.perf_counter()
        prompts = [r["prompt_ids"] for r in records]
        seeds = [derive_seed(self.seed, self.rollout_step, r["index"], round_) for r in records]
        rollouts = self.engine.generate(prompts, self.group_size, self.sampling, seeds)
        self._phase("reward")
        sampled = time.perf_counter()
        scores = self.scorer(rollouts, records, self._failures_file())
        if scores.failed > self.handling.max_failed_frac * len(scores.total):
            raise ValueError(
                f"rewards failed on {scores.failed} of {len(scores.total)} completions, more than "
                f"handling.max_failed_frac={self.handling.max_failed_frac}; see {self._failures_file()}"
            )
        return rollouts, scores, {"time/rollout_s": sampled - started, "time/reward_s": time.perf_counter() - sampled}

    def judge(self, rollouts: Rollouts, scores: Scores, records: list[Record]) -> Experience:
        """Advantages, the mask of tokens that count, and the reference's log-probs."""
        rewards = scores.total.to(rollouts.completion_ids.device)
        mask = rollouts.completion_mask
        if self.handling.truncated == "penalize":
            rewards = rewards - rollouts.truncated.float()
        elif self.handling.truncated == "mask":
            mask = mask & ~rollouts.truncated[:, None]
        advantages = group_advantages(rewards, self.group_size, self.advantage)
        samples = self.scorer.samples(rollouts, records)
        self.last_samples = describe(samples, scores, advantages, self.rollout_step)
        ref_logprobs = None
        if self.reference is not None:
            self._phase("reference")
            ref_logprobs = self._without_grad(self.reference.logprobs, rollouts)
        return Experience(rollouts=rollouts, advantages=advantages, mask=mask, ref_logprobs=ref_logprobs)

    def _without_grad(self, logprobs: Callable[[Rollouts, float], Tensor], rollouts: Rollouts) -> Tensor:
        """[R, T] log-probs in micro-batches of whole prompts."""
        prompts = max(1, self.batching.micro_batch // self.group_size)
        total = len(rollouts.prompt_ids)
        parts = [list(range(start, min(start + prompts, total))) for start in range(0, total, prompts)]
        with torch.no_grad():
            return torch.cat([logprobs(rollouts.select(part), self.sampling.temperature) for part in parts])

    def learn(self, experience: Experience) -> None:
        """All optimizer steps of one batch of rollouts."""
        totals: dict[str, float] = {}
        for pass_ in range(self.batching.passes):
            shuffle = derive_seed(self.seed, self.rollout_step, "minibatches", pass_)
            for minibatch in experience.minibatches(self.batching.minibatches, shuffle):
                metrics = self.update(minibatch)
                if not totals:
                    self._check_fresh(metrics)
                for name, value in metrics.items():
                    totals[name] = totals.get(name, 0.0) + value
        self._log_updates(totals)

    def update(self, minibatch: Experience) -> dict[str, float]:
        """One optimizer step on a minibatch. Returns sums over the tokens that went through the model."""
        counts = self._global_counts(minibatch.mask)
        needs_all = self.objective.kl_coef > 0 or self.objective.entropy_coef > 0
        live = has_signal(minibatch.advantages, self.group_size) | needs_all
        live &= minibatch.mask.view(len(live), -1).any(1)
        metrics = {"tokens": 0.0, "skipped": float((~live).sum()), "steps": 1.0}
        chosen = minibatch.select(live.nonzero()[:, 0].tolist()) if live.any() else None
        micros = list(chosen.micro_batches(self.batching.micro_batch)) if chosen else []
        self.updates.begin(len(micros))
        for micro in micros:
            for name, value in self._forward_backward(micro, counts).items():
                metrics[name] = metrics.get(name, 0.0) + value
        self._phase("optimizer")
        metrics |= self.updates.finish(cast(LightningOptimizer, self.optimizers()).step)
        if (scheduler := self.lr_schedulers()) is not None:
            scheduler.step()  # type: ignore[union-attr]
        return metrics

    def _forward_backward(self, micro: Experience, counts: Counts) -> dict[str, float]:
        self._phase("forward")
        now = self.policy(micro.rollouts, self.sampling.temperature)
        out = policy_loss(
            now.logprobs,
            micro.rollouts.rollout_logprobs,
            micro.advantages,
            micro.mask,
            self.objective,
            counts,
            entropy=now.entropy,
            ref_logprobs=micro.ref_logprobs,
        )
        self._phase("backward")
        self.updates.backward(out.loss * self.trainer.world_size)  # ranks are averaged, the weights are global
        metrics = {name: float(value) for name, value in out.metrics.items()}
        return metrics | {"tokens": float(micro.mask.sum()), "loss": float(out.loss.detach())}

    def _global_counts(self, mask: Tensor) -> Counts:
        local = torch.stack([mask.sum(), mask.any(1).sum()])
        tokens, completions = self.trainer.strategy.reduce(local.float(), reduce_op="sum").long().tolist()
        return Counts(tokens=tokens, completions=completions, max_tokens=self.sampling.max_tokens)

    # ---- validation ----

    def validation_step(self, batch: list[Record], batch_idx: int) -> None:
        """Greedy and sampled pass@1 of each benchmark in the batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: list[Record], batch_idx: int) -> None:
        """As `validation_step`, on the test problems."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: list[Record], split: str) -> None:
        records = batch[self.global_rank :: self.trainer.world_size]
        prompts = [r["prompt_ids"] for r in records]
        seeds = [derive_seed(self.seed, -1, r["index"], 0) for r in records]  # the same draws at every validation
        modes = {"greedy_pass@1": (replace(self.sampling, temperature=0.0), 1)}
        if self.val_samples:
            modes["pass@1"] = (replace(self.sampling, temperature=1.0), self.val_samples)
        verifier = next(iter(self.scorer.rewards))
        # pass@1 of every benchmark, and of all problems together where there are several
        benchmarks = list(
            getattr(getattr(self.trainer, "datamodule", None), split, None) or {r["benchmark"] for r in records}
        )
        for mode, (sampling, group) in modes.items():
            rollouts = self.engine.generate(prompts, group, sampling, seeds)
            parts = self.scorer(rollouts, records, self._failures_file()).parts[verifier]
            passed = (parts >= 1.0).float().view(len(records), group).mean(1)
            rows_of = {name: [i for i, r in enumerate(records) if r["benchmark"] == name] for name in benchmarks}
            if len(benchmarks) > 1:
                rows_of["all"] = list(range(len(records)))
            for benchmark, rows in rows_of.items():
                if rows:
                    name, mean = f"{split}/{benchmark}/{mode}", passed[rows].mean()
                    show = mode == "pass@1" and benchmark == next(reversed(rows_of))
                    self.log(name, mean, batch_size=len(rows), on_epoch=True, sync_dist=True, prog_bar=show)

    # ---- telling ----

    def _phase(self, name: str) -> None:
        for listener in self.phase_listeners:
            listener(name)

    def _failures_file(self) -> Path:
        return Path(self.trainer.log_dir or self.trainer.default_root_dir) / "reward_failures.jsonl"

    def _check_fresh(self, metrics: dict[str, float]) -> None:
        """Before the first update the policy *is* the sampler: say so loudly when it is not."""
        if not metrics["tokens"]:
            return
        ratio = metrics["ratio"] / metrics["tokens"]
        self.log("policy/fresh_ratio_mean", ratio)
        truncated_sampling = self.sampling.top_p < 1 or self.sampling.top_k > 0
        if abs(ratio - 1) > 0.01 and not truncated_sampling:
            rank_zero_warn(f"policy/fresh_ratio_mean is {ratio:.4f}, not 1: the sampler's weights are not the policy's")

    def _log_scores(self, rollouts: Rollouts, scores: Scores) -> None:
        lengths = rollouts.lengths.float()
        self.log("reward/mean", scores.total.mean(), prog_bar=True, sync_dist=True)
        self.log("response/length_mean", lengths.mean(), prog_bar=True, sync_dist=True)
        values = {f"reward/{name}": part.mean() for name, part in scores.parts.items()}
        values |= {
            "reward/std": scores.total.std(),
            "reward/no_signal_frac": (~has_signal(scores.total, self.group_size)).float().mean(),
            "reward/failed": torch.tensor(float(scores.failed)),
            "response/truncated_frac": rollouts.truncated.float().mean(),
        }
        self.log_dict(values, sync_dist=True)

    def _log_updates(self, totals: dict[str, float]) -> None:
        steps = totals["steps"]
        values = {
            "train/loss": totals.get("loss", 0.0) / steps,
            "train/skipped_groups": totals["skipped"],
            "train/nonfinite_steps": totals.get("nonfinite", 0.0),
            "update/grad_norm": totals.get("grad_norm", 0.0) / steps,
            "update/lr": cast(LightningOptimizer, self.optimizers()).param_groups[0]["lr"],
        }
        values |= {"update/changed_entries": totals["changed"]} if "changed" in totals else {}
        values |= {"memory/reference_bytes": float(self.reference.nbytes)} if self.reference else {}
        names = {"ratio_mean": "ratio", "clip_frac": "clipped", "entropy": "entropy", "rollout_kl": "rollout_kl"}
        if totals["tokens"]:
            values |= {f"policy/{name}": totals[key] / totals["tokens"] for name, key in names.items()}
            if "kl" in totals:
                self.log("policy/kl", totals["kl"] / totals["tokens"], prog_bar=True, sync_dist=True)
        self.log_dict(values, sync_dist=True)
