"""The engine in process: sampling from the live policy through its own transformers forward."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlvr_lightning.rollout.attention import PromptPass, rollout_mode
from rlvr_lightning.rollout.cache import LayerKV, SharedCache
from rlvr_lightning.rollout.sampling import sample, stream_keys, uniforms
from rlvr_lightning.schema import Rollouts, Sampling

PROMPT_TOKENS = 4096  # read in one forward pass; bounds its activations
REFILL = 0.75  # sequences join when no more than this share of the batch is in use


class Runner(Protocol):
    """Who runs the model's forward passes; a model that is spread over processes has one of its own."""

    @property
    def device(self) -> torch.device:
        """Where passes run; weights may lie elsewhere until then."""
        ...

    def session(self) -> AbstractContextManager[None]:
        """Around one call of `generate`."""
        ...

    def logits(self, **inputs: Any) -> Tensor:
        """The model's own forward: logits [B, kept, V]."""
        ...

    def pace(self, busy: bool) -> bool:
        """Whether a forward pass must be made now; called before each, and at the end until it says no."""
        ...

    def agreed(self, tokens: Tensor) -> Tensor:
        """The tokens [n] to go on with, of those that this process drew."""
        ...


class Alone:
    """Runs a model that is whole in this process."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def session(self) -> AbstractContextManager[None]:
        """Nothing to prepare."""
        return nullcontext()

    def logits(self, **inputs: Any) -> Tensor:
        """The model's own forward."""
        return self.model(**inputs).logits

    def pace(self, busy: bool) -> bool:
        """As this process needs it."""
        return busy

    def agreed(self, tokens: Tensor) -> Tensor:
        """There is nobody to ask."""
        return tokens


class HFEngine:
    """Draws completions from a transformers model, with the weights it has at that moment.

    A group's prompt is computed once and its keys and values are shared; sequences leave when they end and others that
    wait take their places. Nothing is held between calls. Sampling does not depend on the batching, up to the rounding
    of matrix products of different shape.

    Args:
        model: a causal LM, or a peft model around one. No weights are copied.
        stop_token_ids: tokens that end a completion; see `rlvr_lightning.rollout.stop_token_ids`.
        pad_token_id: fills completions behind their end.
        max_batch: sequences decoded at once; bounds the memory of their keys and values.
        runner: of the model's forward passes, if it is not whole in this process.
    """

    def __init__(
        self,
        model: nn.Module,
        stop_token_ids: Sequence[int],
        pad_token_id: int,
        max_batch: int = 128,
        runner: Runner | None = None,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        causal_lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        if not getattr(causal_lm, "_supports_attention_backend", False):
            name = type(causal_lm).__name__
            raise ValueError(
                f"model: the attention of {name} cannot be replaced, as HFEngine needs; use another engine"
            )
        self.model = model
        self.runner = runner or Alone(model)
        self.config = causal_lm.config.get_text_config()
        strange = set(getattr(self.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if strange:
            raise ValueError(f"model: HFEngine cannot compute its layers of type {min(strange)!r}; use another engine")
        bad = [i for i in (*stop_token_ids, pad_token_id) if not 0 <= i < self.config.vocab_size]
        if bad:
            raise ValueError(f"stop_token_ids and pad_token_id must lie below {self.config.vocab_size}, got {bad[0]}")
        self.stop_token_ids = list(stop_token_ids)
        self.pad_token_id = pad_token_id
        self.max_batch = max_batch

    def generate(
        self, prompts: Sequence[Sequence[int]], group: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Rollouts:
        """Sample `group` completions of each prompt: see `RolloutEngine`; of no prompts, if other ranks have some.

        Raises:
            ValueError: an argument is out of range; nothing has been computed then.
            FloatingPointError: the policy's logits are not numbers.
        """
        self._check(prompts, group, sampling, seeds)
        run = _Run(self, prompts, group, sampling, seeds)
        with torch.no_grad(), rollout_mode(self.model), self.runner.session():
            while run.queue or run.rows.numel():
                if run.queue and len(run.rows) <= REFILL * self.max_batch:
                    run.admit()
                else:
                    run.step()
            while self.runner.pace(False):
                run.idle()
        return run.rollouts()

    def stopped(self, rows: Tensor, counts: Tensor, tokens: Tensor) -> Tensor:
        """Whether a token ends its completion.

        Args:
            rows: int64 [n], number of the rollout.
            counts: int64 [n], tokens sampled for it before this one.
            tokens: int64 [n].

        Returns:
            bool [n]
        """
        return torch.isin(tokens, torch.tensor(self.stop_token_ids, device=tokens.device))

    def _check(self, prompts: Sequence[Sequence[int]], group: int, sampling: Sampling, seeds: Sequence[int]) -> None:
        if group < 1:
            raise ValueError(f"group must be at least 1, got {group}")
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds: one for each prompt, got {len(seeds)} for {len(prompts)}")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompts[{i}] is empty; give at least one token, such as the tokenizer's bos")
            if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
                raise ValueError(f"prompts[{i}] has a token outside the model's vocabulary of {self.config.vocab_size}")
        longest = max(map(len, prompts), default=0) + sampling.max_tokens
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise ValueError(
                f"sampling.max_tokens: {sampling.max_tokens} plus the longest prompt make {longest} tokens, "
                f"over the model's max_position_embeddings = {limit}; lower it or drop long prompts"
            )


class _Run:
    """The sequences of one call of `generate`: waiting, in flight, done."""

    def __init__(
        self, engine: HFEngine, prompts: Sequence[Sequence[int]], group: int, sampling: Sampling, seeds: Sequence[int]
    ) -> None:
        self.engine, self.prompts, self.group, self.sampling = engine, prompts, group, sampling
        self.device = device = engine.runner.device
        total = len(prompts) * group
        self.keys = stream_keys(seeds, group).to(device)
        self.prompt_lengths = torch.tensor([len(p) for p in prompts], device=device)
        self.completion_ids = torch.full((total, sampling.max_tokens), engine.pad_token_id, device=device)
        self.logprobs = torch.zeros(total, sampling.max_tokens, device=device)
        self.lengths = torch.zeros(total, dtype=torch.long, device=device)
        self.truncated = torch.zeros(total, dtype=torch.bool, device=device)
        # Prompts of similar length come together; the longest first, so that memory runs out at once or never.
        by_length = sorted(range(len(prompts)), key=lambda p: -len(prompts[p]))
        self.queue = deque(p * group + g for p in by_length for g in range(group))
        self.cache = SharedCache()
        self.first_logits: dict[int, Tensor] = {}  # of prompts read, while completions of them wait
        self.rows = torch.empty(0, dtype=torch.long, device=device)
        self.tokens = self.rows  # last token of each row
        self.counts = self.rows  # tokens sampled so far

    def admit(self) -> None:
        """Let waiting sequences join, up to the size of the batch, and sample their first token."""
        free = self.engine.max_batch - len(self.rows)
        joining = [self.queue.popleft() for _ in range(min(free, len(self.queue)))]
        numbers = [r // self.group for r in joining]
        fresh = self._read([p for p in dict.fromkeys(numbers) if p not in self.first_logits])
        logits = torch.stack([self.first_logits[p] for p in numbers])
        rows = torch.tensor(joining, device=self.device)
        counts = torch.zeros_like(rows)
        tokens, done = self._settle(logits, rows, counts)
        waiting = self._waiting()
        self.first_logits = {p: x for p, x in self.first_logits.items() if p in waiting}
        on = ~done
        alive = on.tolist()
        self.cache.add(fresh, [p for p, a in zip(numbers, alive, strict=True) if a], waiting)
        self.rows = torch.cat([self.rows, rows[on]])
        self.tokens = torch.cat([self.tokens, tokens[on]])
        self.counts = torch.cat([self.counts, counts[on] + 1])

    def step(self) -> None:
        """One more token for every sequence in flight."""
        self.cache.open_column()
        positions = self.prompt_lengths[self.rows // self.group] + self.counts - 1
        logits = self._forward(self.tokens[:, None], positions[:, None], self.cache, 1)[:, 0]
        self.tokens, done = self._settle(logits, self.rows, self.counts)
        self.counts = self.counts + 1
        ended = done.tolist()
        if any(ended):
            kept = self.cache.keep([not e for e in ended], self._waiting())
            order = torch.tensor(kept, dtype=torch.long, device=self.device)
            self.rows, self.tokens, self.counts = self.rows[order], self.tokens[order], self.counts[order]

    def idle(self) -> None:
        """A forward pass for nothing but the other ranks."""
        nothing = torch.tensor([[self.engine.pad_token_id]], device=self.device)
        self._logits(nothing, torch.zeros_like(nothing), PromptPass([1]), 1)

    def rollouts(self) -> Rollouts:
        """What was sampled, cut to the longest completion."""
        longest = int(self.lengths.max()) if self.prompts else 0
        mask = torch.arange(longest, device=self.device) < self.lengths[:, None]
        logprobs = self.logprobs[:, :longest].contiguous()
        if not logprobs.isfinite().all():
            raise FloatingPointError("policy: its logits are not finite; a smaller learning rate or clip may help")
        return Rollouts(
            prompt_ids=[list(p) for p in self.prompts],
            completion_ids=self.completion_ids[:, :longest].contiguous(),
            completion_mask=mask,
            rollout_logprobs=logprobs,
            truncated=self.truncated,
        )

    def _waiting(self) -> set[int]:
        """Prompts already read of which completions still wait: at most one, for groups are admitted in order."""
        return {self.queue[0] // self.group} & self.first_logits.keys() if self.queue else set()

    def _settle(self, logits: Tensor, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Sample and note a token of each row; int64 [n] tokens and bool [n], True where it was the last."""
        tokens, logprobs = sample(logits, uniforms(self.keys[rows], counts), self.sampling)
        tokens = self.engine.runner.agreed(tokens)
        self.completion_ids[rows, counts] = tokens
        self.logprobs[rows, counts] = logprobs
        self.lengths[rows] = counts + 1
        stopped = self.engine.stopped(rows, counts, tokens)
        full = counts + 1 == self.sampling.max_tokens
        self.truncated[rows] = full & ~stopped
        return tokens, stopped | full

    def _read(self, numbers: list[int]) -> dict[int, LayerKV]:
        """Forward some prompts: their keys and values; the logits of their first tokens go to `first_logits`."""
        read: dict[int, LayerKV] = {}
        while numbers:
            part = [numbers.pop(0)]
            tokens = len(self.prompts[part[0]])
            while numbers and tokens + len(self.prompts[numbers[0]]) <= PROMPT_TOKENS:
                tokens += len(self.prompts[numbers[0]])
                part.append(numbers.pop(0))
            lengths = [len(self.prompts[p]) for p in part]
            ids = torch.tensor([t for p in part for t in self.prompts[p]], device=self.device)
            positions = torch.cat([torch.arange(n, device=self.device) for n in lengths])
            ends = torch.tensor(lengths, device=self.device).cumsum(0) - 1
            state = PromptPass(lengths)
            logits = self._forward(ids[None], positions[None], state, ends)[0]
            for i, p in enumerate(part):
                read[p] = state.keys_values(i)
                self.first_logits[p] = logits[i]
        return read

    def _forward(self, ids: Tensor, positions: Tensor, state: Any, logits_to_keep: int | Tensor) -> Tensor:
        """Logits [B, kept, V] of the model's own forward, with attention as `state` computes it."""
        self.engine.runner.pace(True)
        return self._logits(ids, positions, state, logits_to_keep)

    def _logits(self, ids: Tensor, positions: Tensor, state: Any, logits_to_keep: int | Tensor) -> Tensor:
        return self.engine.runner.logits(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=logits_to_keep,
            rollout_state=state,
        )
