"""Sampling one batch while another trains: rollouts one step off the policy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch import LightningModule

from rlvr_lightning.rollout.vllm.engine import Batch, VLLMEngine
from rlvr_lightning.schema import Rollouts
from rlvr_lightning.seeds import derive_seed

log = logging.getLogger(__name__)
Record = dict[str, Any]


class Ahead:
    """What is sampled for the next training step.

    A checkpoint keeps the places of the prompts under way, not what was sampled: a resumed run samples them again, with
    the weights that it resumes with.

    Args:
        engine: samples in the background.
    """

    def __init__(self, engine: VLLMEngine) -> None:
        self.engine = engine
        self.indices: list[int] = []
        """Places in the data of the batch under way, of all ranks."""
        self.lags: list[int] = []
        """Of the completions of the batch that trains now: times that the weights were trained since."""
        self.restored: list[int] = []
        """The same of a checkpoint that was loaded."""
        self._records: Sequence[Record] = ()
        self._batch: Batch | None = None
        self._learned = self._begun_at = 0
        self._ready: Rollouts | None = None

    def exchange(self, module: Any, batch: Sequence[Record]) -> list[Record]:
        """Start to sample a batch, and hand over the one that was under way; empty if there was none.

        Args:
            module: a GRPO.
            batch: of all ranks.
        """
        if self.restored:
            places, self.restored = set(self.restored), []
            loader = module.trainer.datamodule.train_dataloader()
            self._begin(module, [r for r in loader.records if r["index"] in places], module.rollout_step - 1)
        before, records = self._batch, self._records
        if before is not None:
            self._ready, again = self.engine.finish(before)
            self.lags = [0 if fresh else self._learned - self._begun_at for fresh in again]
            self.engine.metrics["rollout/staleness_mean"] = sum(self.lags) / max(1, len(self.lags))
        told = dict(self.engine.metrics)
        self._begin(module, batch, module.rollout_step)
        self.engine.metrics |= {name: value for name, value in told.items() if "staleness" in name}
        self._learned += before is not None
        return list(records) if before is not None else []

    def _begin(self, module: Any, batch: Sequence[Record], step: int) -> None:
        records = batch[module.ranks.rank :: module.ranks.size]
        seeds = [derive_seed(module.seed, step, r["index"], 0) for r in records]
        prompts = [r["prompt_ids"] for r in records]
        self._batch = self.engine.begin(prompts, module.group_size, module.sampling, seeds, background=True)
        self.indices, self._records, self._begun_at = [r["index"] for r in batch], records, self._learned

    def take(self) -> Rollouts:
        """The rollouts that were handed over."""
        assert self._ready is not None
        ready, self._ready = self._ready, None
        return ready

    def close(self) -> None:
        """Say what is given up."""
        if self._batch is not None:
            log.info("rollout: %d prompts sampled ahead are not trained on: the run ends", len(self.indices))
            self._batch = None


class FollowedByVLLM(LightningModule):
    """A module whose `engine` may be vLLM: starts and ends it with a fit, keeps what is under way in checkpoints."""

    engine: Any
    ahead: Ahead | None = None

    def configure_optimizers(self) -> Any:
        """VLLM hears of what the optimizer changes."""
        made = super().configure_optimizers()
        if isinstance(self.engine, VLLMEngine):
            optimizers, _ = cast(Any, made)
            self.engine.follow(optimizers[0])
        return made

    def on_fit_start(self) -> None:
        """Start vLLM: what it lacks is known now rather than later."""
        super().on_fit_start()
        if isinstance(self.engine, VLLMEngine):
            self.engine.start()

    def teardown(self, stage: str) -> None:
        """End it."""
        super().teardown(stage)
        if self.ahead is not None:
            self.ahead.close()
        if isinstance(self.engine, VLLMEngine):
            self.engine.close()

    def on_save_checkpoint(self, checkpoint: Record) -> None:
        """Also the places of prompts that are being sampled."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["under_way"] = [] if self.ahead is None else self.ahead.indices

    def on_load_checkpoint(self, checkpoint: Record) -> None:
        """These are sampled again."""
        super().on_load_checkpoint(checkpoint)
        if self.ahead is not None:
            self.ahead.restored = checkpoint.get("under_way", [])
