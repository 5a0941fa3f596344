"""Rollouts from vLLM, with the policy's weights of that moment, in the shape that every engine gives them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlvr_lightning.ranks import ALONE, Ranks
from rlvr_lightning.rollout.sampling import stream_keys
from rlvr_lightning.rollout.vllm.http import Lost
from rlvr_lightning.rollout.vllm.requests import Answer, Request, sampling_options
from rlvr_lightning.rollout.vllm.settings import VLLM
from rlvr_lightning.rollout.vllm.sync import Part, WeightSync
from rlvr_lightning.schema import Rollouts, Sampling

log = logging.getLogger(__name__)
ATTEMPTS = 4
SEEDS = (1 << 62) - 1  # vLLM's are signed


class Client(Protocol):
    """A vLLM, wherever it runs."""

    def sample(self, requests: Sequence[Request], options: dict[str, Any]) -> dict[int, list[Answer]]:
        """Completions by the place of their request; without those that were left unfinished."""
        ...

    def recover(self) -> None:
        """Be ready again, with any weights; RuntimeError if that cannot be."""
        ...

    def update(self, parts: Iterator[Part]) -> int:
        """Take in weights; returns the bytes that were sent."""
        ...

    def load_adapter(self, save: Callable[[Path], None]) -> int:
        """Sample with adapters from now on, which `save` writes into a folder; returns their bytes."""
        ...

    def digests(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
        """SHA-256 of each tensor that it holds."""
        ...

    def sleep(self) -> None:
        """Give memory back until it is needed again."""
        ...

    def wake(self) -> None:
        """Take it again."""
        ...

    def close(self) -> None:
        """End it."""
        ...


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts that are being sampled."""

    prompts: Sequence[Sequence[int]]
    copies: int
    """Of each answer."""
    requests: list[Request]
    options: dict[str, Any]
    answers: dict[int, list[Answer]] | Future[dict[int, list[Answer]]]

    def wait(self) -> dict[int, list[Answer]]:
        """The answers by the place of their request, without those that a lost server left unfinished."""
        return self.answers.result() if isinstance(self.answers, Future) else self.answers


class VLLMEngine:
    """Draws completions of the current policy through vLLM; a `RolloutEngine`.

    Before each call of `generate` the weights that moved since the last are brought over. Completion g of a prompt
    depends on the weights, the prompt, its seed and g, and not on the batch; the random numbers are vLLM's, so that
    its samples are others than `HFEngine`'s. Log-probs are of the distribution that was drawn from.

    Args:
        start: starts vLLM, whose weights are of no worth yet.
        sync: of the policy's weights.
        stop_token_ids: tokens that end a completion.
        pad_token_id: fills completions behind their end.
        settings: how often digests are compared, and what is sent.
        max_len: of prompt and completion together.
        device: of the rollouts that it returns.
        ranks: that call `generate` together, each with prompts of its own.
    """

    def __init__(
        self,
        start: Callable[[], Client],
        sync: WeightSync,
        stop_token_ids: Sequence[int],
        pad_token_id: int,
        settings: VLLM,
        max_len: int,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self._start, self.sync, self.settings, self.ranks = start, sync, settings, ranks
        self._client: Client | None = None
        self.stop_token_ids, self.pad_token_id = list(stop_token_ids), pad_token_id
        self.max_len, self.device = max_len, device
        self.metrics: dict[str, float] = {}
        """Of the last sync: `rollout/sync_bytes`, `rollout/sync_dense_bytes` (what all weights take), `time/sync_s`."""
        self._syncs = 0
        self._told = False
        self._threads = ThreadPoolExecutor(1, "vllm-ahead")
        self._under_way: Batch | None = None

    def start(self) -> None:
        """Start vLLM now, if it is not there."""
        if self._client is None:
            self._client = self._start()

    @property
    def client(self) -> Client:
        """Started when first asked for."""
        self.start()
        assert self._client is not None
        return self._client

    def follow(self, optimizer: Optimizer) -> None:
        """Learn from an optimizer what changes, if that is to be sent."""
        whole = self.settings.sync == "dense" or (self.settings.sync == "auto" and self.settings.mode == "colocated")
        if whole and self.sync.adapter is None:
            return
        if not self.sync.follow(optimizer) and self.settings.sync == "sparse":
            raise ValueError(
                "rollout.sync: sparse needs whole weights stored in 16 bits (dtype: bfloat16); set sync: auto"
            )

    def generate(
        self, prompts: Sequence[Sequence[int]], group: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Rollouts:
        """Sample `group` completions of each prompt: see `RolloutEngine`.

        Raises:
            ValueError: a prompt and its completion would not fit `max_len`.
        """
        return self.finish(self.begin(prompts, group, sampling, seeds))[0]

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        group: int,
        sampling: Sampling,
        seeds: Sequence[int],
        background: bool = False,
    ) -> Batch:
        """Bring the weights over and start to sample; `finish` gives what came of it.

        Args:
            prompts: as for `generate`, like the next three.
            group: completions of each.
            sampling: limits and temperature.
            seeds: one for each prompt.
            background: return at once, so that this process can train meanwhile; the weights stay as they were now.
        """
        longest = max(map(len, prompts), default=0) + sampling.max_tokens
        if longest > self.max_len:
            raise ValueError(f"sampling.max_tokens: with the longest prompt {longest} tokens, over {self.max_len}")
        if self._under_way is not None:
            self._under_way.wait()  # its weights must not change
        self.client.wake()
        keys = stream_keys(seeds, 1).tolist() if prompts else []
        drawn = group if sampling.temperature else 1  # greedy completions are all alike
        requests = [Request(prompt, drawn, key & SEEDS) for prompt, key in zip(prompts, keys, strict=True)]
        options = sampling_options(sampling, self.stop_token_ids)
        try:
            self.catch_up()
            job: Callable[[], dict[int, list[Answer]]] = partial(self.client.sample, requests, options)
        except Lost as error:
            log.warning("rollout: a vLLM server was lost in an update: %s", error)
            job = dict
        batch = Batch(prompts, group // drawn, requests, options, self._threads.submit(job) if background else job())
        self._under_way = batch if background else self._under_way
        return batch

    def finish(self, batch: Batch) -> tuple[Rollouts, list[bool]]:
        """Wait for what was begun; what a lost server left unfinished is sampled again, with the weights of now.

        Returns:
            The rollouts, and of each whether it was sampled again.
        """
        found = dict(batch.wait())
        self._under_way = None if self._under_way is batch else self._under_way
        again = self._again(batch, found)
        self.client.sleep()
        answers = [answer for k in range(len(batch.requests)) for answer in found[k] for _ in range(batch.copies)]
        group = len(answers) // max(1, len(batch.requests))
        rollouts = rollouts_of(batch.prompts, answers, self.pad_token_id, self.device)
        return rollouts, [k in again for k in range(len(batch.requests)) for _ in range(group)]

    def _again(self, batch: Batch, found: dict[int, list[Answer]]) -> set[int]:
        """Sample what is not found yet, each prompt to its end by one set of weights; returns which these were."""
        missing = [k for k in range(len(batch.requests)) if k not in found]
        for _ in range(ATTEMPTS):
            left = [k for k in missing if k not in found]
            if not self.ranks.any(bool(left)):
                return set(missing)
            log.warning("rollout: sampling %d of %d prompts again", len(left), len(batch.requests))
            self.client.recover()
            self.sync.forget()
            try:
                self.catch_up()
                answers = self.client.sample([batch.requests[k] for k in left], batch.options)
            except Lost as error:
                log.warning("rollout: a vLLM server was lost in an update: %s", error)
                answers = {}
            found |= {left[k]: those for k, those in answers.items()}
        if not self.ranks.any(any(k not in found for k in missing)):
            return set(missing)
        raise RuntimeError(f"rollout: vLLM left prompts unfinished, {ATTEMPTS} times")

    def catch_up(self) -> None:
        """Bring the policy's weights over."""
        started, sparse = time.perf_counter(), self.sync.sparse
        try:
            sent = self.client.update(self.sync.parts())
            if self.sync.adapter is not None:
                sent += self.client.load_adapter(self.sync.save_adapter)
        except BaseException:
            self.sync.forget()  # it may have taken some of them
            raise
        self.sync.arrived()
        self._syncs += 1
        if self.settings.check_every and self._syncs % self.settings.check_every == 0:
            self.check()
        self.metrics = {
            "rollout/sync_bytes": float(sent),
            "rollout/sync_dense_bytes": float(self.sync.dense_bytes),
            "rollout/sync_sparse": float(sparse),
            "time/sync_s": time.perf_counter() - started,
        }
        if self.settings.mode == "server" and not self._told and not sparse and self._syncs == 2:
            self._told = True
            log.warning("rollout: weights are sent whole; for entries alone, train bfloat16 weights in one process")

    def check(self) -> None:
        """Compare what the engine holds with the policy, tensor by tensor.

        Raises:
            RuntimeError: they differ.
        """
        held = self.client.digests(self.sync.shapes())
        wrong = [name for name, digest in self.sync.digests() if held.get(name) != digest]
        if wrong:
            raise RuntimeError(
                f"rollout: vLLM's weights are not the policy's: {len(wrong)} of {len(held)} tensors, first {wrong[0]}"
            )

    def close(self) -> None:
        """End vLLM; it is started again when it is needed."""
        if self._client is not None:
            self._client.close()
            if self._under_way is not None:  # what it still waited for is lost now
                self._under_way.wait()
                self._under_way = None
            self._client = None
            self.sync.forget()


def rollouts_of(
    prompts: Sequence[Sequence[int]], answers: Sequence[Answer], pad: int, device: torch.device
) -> Rollouts:
    """Answers, group after group, as tensors padded to the longest."""
    longest = max((len(answer.tokens) for answer in answers), default=0)

    def padded(rows: list[list[Any]], fill: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], dtype=dtype, device=device).view(
            len(rows), longest
        )

    lengths = torch.tensor([len(answer.tokens) for answer in answers], device=device, dtype=torch.long)
    return Rollouts(
        prompt_ids=[list(prompt) for prompt in prompts],
        completion_ids=padded([answer.tokens for answer in answers], pad, torch.long),
        completion_mask=torch.arange(longest, device=device) < lengths[:, None],
        rollout_logprobs=padded([answer.logprobs for answer in answers], 0.0, torch.float32),
        truncated=torch.tensor([not answer.stopped for answer in answers], dtype=torch.bool, device=device),
    )
