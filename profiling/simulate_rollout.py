"""The first and the last tokens of the longest rollout there can be, by the engine in process."""

from __future__ import annotations

import torch
from torch import Tensor

from rlvr_lightning.profiling.settings import Run
from rlvr_lightning.rollout import HFEngine, hf
from rlvr_lightning.rollout.attention import rollout_mode
from rlvr_lightning.rollout.cache import COLUMNS
from rlvr_lightning.schema import Rollouts, Sampling


class Longest(hf._Run):
    """Sequences that end at their limit, and of which tokens can be passed over."""

    def _settle(self, logits: Tensor, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        super()._settle(logits, rows, counts)
        return torch.zeros_like(rows), counts + 1 == self.sampling.max_tokens

    def pass_over(self, tokens: int) -> None:
        """Go on as if each sequence had so many own tokens in the cache."""
        self.cache.column = tokens
        self.counts = torch.full_like(self.counts, tokens + 1)


def longest_rollout(engine: HFEngine, run: Run, sampling: Sampling) -> None:
    """Read the prompts of as many sequences as go at once, draw their last tokens, and let others join."""
    prompts = [[0] * run.prompt_tokens] * (run.completions // run.group_size)
    walk = Longest(engine, prompts, run.group_size, sampling, range(len(prompts)))
    with torch.no_grad(), rollout_mode(engine.model), engine.runner.session():
        walk.admit()
        before = run.max_tokens - 2  # own tokens in the cache when the last is drawn, but the one that is fed for it
        if before < 0:
            return
        room = before - before % COLUMNS
        if room > 0:
            walk.cache.column = room - COLUMNS
            walk.cache._resize(0)  # nothing is there yet to be moved
            walk.pass_over(room - 1)
            walk.step()  # fills the room that was made
        if 0 < room < before:
            walk.step()  # makes more, and moves what is there
        walk.pass_over(before)
        walk.step()
        if walk.queue:
            walk.admit()  # while the room of those before is still there


def longest_rollouts(prompts: int, run: Run) -> Rollouts:
    """Completions of the first token of a vocabulary, none of which ended."""
    total = prompts * run.group_size
    ids = torch.zeros(total, run.max_tokens, dtype=torch.long)
    return Rollouts(
        prompt_ids=[[0] * run.prompt_tokens] * prompts,
        completion_ids=ids,
        completion_mask=torch.ones_like(ids, dtype=torch.bool),
        rollout_logprobs=torch.zeros_like(ids, dtype=torch.float32),
        truncated=torch.zeros(total, dtype=torch.bool),
    )
