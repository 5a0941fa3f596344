"""Validation and testing of a policy: greedy and sampled pass@1 of every benchmark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from rlvr_lightning.metrics import pass_rates
from rlvr_lightning.ranks import Ranks
from rlvr_lightning.schema import RolloutEngine, Sampling
from rlvr_lightning.scoring import Scorer
from rlvr_lightning.seeds import derive_seed
from rlvr_lightning.strategy import Layout

Record = dict[str, Any]


class Evaluated(LightningModule):
    """What a module with an engine and a verifier logs of its data module's problems; the first reward verifies.

    The draws are the same at every validation. Where there are several benchmarks, `all` is of their problems together.
    """

    engine: RolloutEngine
    scorer: Scorer
    sampling: Sampling
    layout: Layout
    val_samples: int
    """Sampled completions per problem, beside the greedy one."""
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[tuple[str, str, str], list[float]] = {}

    @property
    def ranks(self) -> Ranks:
        """Processes that share a batch."""
        return self.layout.data

    @property
    def run_folder(self) -> Path:
        """Of the first rank's loggers; all ranks must ask together."""
        return Path(self.trainer.log_dir or self.trainer.default_root_dir)

    @property
    def failures_file(self) -> Path:
        """Where completions go that made a reward fail."""
        return self.run_folder / "reward_failures.jsonl"

    def validation_step(self, batch: list[Record], batch_idx: int) -> None:
        """Answer the problems of the batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: list[Record], batch_idx: int) -> None:
        """As `validation_step`, on the test problems."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: list[Record], split: str) -> None:
        records = batch[self.ranks.rank :: self.ranks.size]
        prompts = [r["prompt_ids"] for r in records]
        seeds = [derive_seed(self.seed, -1, r["index"], 0) for r in records]
        modes = {"greedy_pass@1": (replace(self.sampling, temperature=0.0), 1)}
        if self.val_samples:
            modes["pass@1"] = (replace(self.sampling, temperature=1.0), self.val_samples)
        verifier = next(iter(self.scorer.rewards))
        for mode, (sampling, group) in modes.items():
            rollouts = self.engine.generate(prompts, group, sampling, seeds)
            scores = self.layout.tensor.first(self.scorer(rollouts, records, self.failures_file))
            parts = scores.parts[verifier]
            passed = (parts >= 1.0).float().view(-1, group).mean(1).tolist()
            for record, share in zip(records, passed, strict=True):
                self._passed.setdefault((split, record["benchmark"], mode), []).append(share)

    def on_validation_epoch_end(self) -> None:
        """Log `val/<benchmark>/greedy_pass@1` and `val/<benchmark>/pass@1`."""
        rates = pass_rates(self.ranks.gather(self._passed))
        self._passed = {}
        for name, rate in rates.items():
            self.log(name, rate, prog_bar=name.endswith("/pass@1") and name == next(reversed(rates)))

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self.on_validation_epoch_end()
