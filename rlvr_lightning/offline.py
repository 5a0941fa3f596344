"""What the algorithms that learn from given texts share: cutting a batch up, log-probabilities, what is logged.

A batch is one optimizer step. Its texts are cut into micro-batches, of which each is one backward pass; counts that a
loss is divided by are of the whole batch, over all ranks. A record with the field that the algorithm learns from is a
text; any other record of validation is a problem, which is answered and verified as under GRPO.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from rlvr_lightning.evaluation import Evaluated
from rlvr_lightning.evaluation_plan import Evaluation
from rlvr_lightning.metrics import summed
from rlvr_lightning.policy_module import PolicyModule
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rollout import stop_token_ids
from rlvr_lightning.schema import LossOutput, Rollouts, Sampling, one_token
from rlvr_lightning.scoring import Scorer
from rlvr_lightning.telling import of_steps
from rlvr_lightning.trainer_checks import sharing

Record = dict[str, Any]
Logprobs = Callable[[Rollouts], Tensor]
ROWS = 16
"""Texts in a forward pass: of similar length, so that little of it is padding."""
MAX_NONFINITE_STEPS = 5
"""In a row, before the run stops; none of them changes a weight."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is learned from a record."""

    prompt_ids: list[int]
    completions: list[list[int]]
    """G of them, the same number in all texts; the chosen side of a pair is the first."""
    good: bool = True
    """What is said of a completion that stands alone."""

    @property
    def tokens(self) -> int:
        """In a packed row."""
        return len(self.prompt_ids) + sum(map(len, self.completions))


class Offline(Evaluated, PolicyModule):
    """Learns from texts; a subclass says which (`text_of`) and how (`loss_of`).

    Args:
        model: the policy: `tiny`, `smollm2`, a folder, or a hub name. The reference is its state at the start.
        optimizer: any torch optimizer; called with the trainable parameters.
        micro_batch: texts in one backward pass. Costs memory, changes no gradient.
        rewards: as of GRPO; the first verifies answers to the problems of validation. Needed only where there are some.
        sampling: how these are answered.
        stop: strings that end an answer, matched against single tokens; a text with one of them ends itself, any other
            gets the end-of-sequence token.
        evaluation: what validation measures of each problem.
        kwargs: of every algorithm; see `PolicyModule`.

    Raises:
        ValueError: settings that cannot work together, before any weights are loaded.
    """

    field: ClassVar[str]
    """Of a record that is a text."""
    group: ClassVar[int] = 1
    """Completions of a text."""
    means: ClassVar[dict[str, str]]
    """What is logged: name -> which of the loss's metrics it is the mean of, and over what, as `sum/count`."""
    prefix: ClassVar[str] = ""
    """In front of these names in training."""
    shown: ClassVar[tuple[str, ...]] = ()
    """Of these names, those in the progress bar."""

    def __init__(
        self,
        model: str,
        optimizer: OptimizerCallable,
        micro_batch: int = 16,
        rewards: dict[str, Reward] | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop: list[str] | None = None,
        evaluation: Evaluation = Evaluation(),  # noqa: B008
        **kwargs: Any,
    ) -> None:
        if micro_batch < 1:
            raise ValueError(f"model.micro_batch must be at least 1, got {micro_batch}")
        super().__init__(model=model, optimizer=optimizer, **kwargs)
        self.scorer = Scorer(tokenizer=self.tokenizer, rewards=rewards or {}, weights={}, stop=stop or [])
        self.micro_batch, self.sampling, self.evaluation = micro_batch, sampling, evaluation
        self._held_out: dict[str, dict[str, float]] = {}  # sums over this rank's texts, by benchmark
        self._found_of_texts: dict[str, float] = {}

    # ---- what a subclass says ----

    @abstractmethod
    def text_of(self, record: Record) -> Text:
        """The tokens to learn from; ValueError for a record that has none."""

    def totals(self, texts: Sequence[Text]) -> dict[str, int]:
        """Counts of a whole batch that a loss is divided by."""
        return {"texts": len(texts), "first_tokens": sum(len(text.completions[0]) for text in texts)}

    @abstractmethod
    def loss_of(
        self, texts: Sequence[Text], logprobs: Tensor, ref_logprobs: Tensor | None, totals: Mapping[str, Any]
    ) -> LossOutput:
        """Of some texts.

        Args:
            texts: n of them, whose completions are G each.
            logprobs: float32 [n, G], summed over the tokens of each completion, with gradient.
            ref_logprobs: the same under the reference, if there is one.
            totals: of the whole batch.
        """

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end a completion."""
        return frozenset(stop_token_ids(self.tokenizer, self.scorer.stop))

    # ---- building ----

    def configure_model(self) -> None:
        """Load the policy, and an engine around its weights."""
        if self.policy is None:
            super().configure_model()
            self.engine = self.embedded_engine(self.scorer.stop, max_batch=256)

    def check(self, trainer: Trainer, data: Any) -> None:
        """Also that a released step is one micro-batch."""
        super().check(trainer, data)
        if self.gradient_release and (texts := getattr(data, "prompts_per_step", None)):
            self.gradient_release.check(-(-texts // sharing(trainer)), self.micro_batch, "model.micro_batch", "texts")

    # ---- training ----

    def training_step(self, batch: list[Record], batch_idx: int) -> None:
        """One optimizer step on the batch."""
        texts = [self.text_of(record) for record in batch]
        mine = self._share(texts)
        totals = self.totals(texts) | self.before(texts)
        parts = [range(at, at + self.micro_batch) for at in range(0, self.ranks.most(len(mine)), self.micro_batch)]
        sums = self.take_step([mine[part.start : part.stop] for part in parts], lambda part: self._loss(part, totals))
        sums |= dict(zip(self._sums, self._over_ranks(sums), strict=True))
        for name, value in self._means(sums).items():
            self.log(self.prefix + name, value, prog_bar=name in self.shown)
        self.log_dict({"train/loss": sums["loss"]} | of_steps(self, sums))
        if self.nonfinite_in_row == MAX_NONFINITE_STEPS:
            raise ValueError(
                f"loss or gradient were not finite in {MAX_NONFINITE_STEPS} optimizer steps in a row; "
                "lower the learning rate, or look at the data"
            )

    def before(self, texts: Sequence[Text]) -> dict[str, Any]:
        """What a loss needs to know of the whole batch, measured before it is learned from; called by all ranks."""
        return {}

    def _share(self, texts: list[Text]) -> list[Text]:
        """This rank's, by length."""
        return sorted(texts[self.ranks.rank :: self.ranks.size], key=lambda text: text.tokens)

    def _loss(self, part: list[Text], totals: Mapping[str, Any]) -> LossOutput:
        """Of a micro-batch, which may be empty where other ranks have more."""
        ref_logprobs = None
        if self.reference is not None:
            self._phase("reference")
            ref_logprobs, _ = self.logprobs(part, self.reference.logprobs)
            self._phase("forward")
        logprobs, idle = self.logprobs(part, lambda rollouts: self.policy(rollouts).logprobs)
        out = self.loss_of(part, logprobs, ref_logprobs, totals)
        return replace(out, loss=out.loss + idle)

    def logprobs(self, texts: Sequence[Text], run: Logprobs) -> tuple[Tensor, Tensor]:
        """Log-probabilities of completions, summed over tokens; called by all ranks with as many parts of a batch.

        Args:
            texts: of this rank, maybe none.
            run: log-probabilities [R, T] of rollouts.

        Returns:
            float32 [n, G], and a 0 with the graph of passes for nothing but the ranks that have more.
        """
        rows = [texts[at : at + ROWS] for at in range(0, len(texts), ROWS)]
        found = [run(rollouts_of(row, self.device)).sum(1).view(-1, self.group) for row in rows]
        idle = torch.zeros((), device=self.device)
        for _ in range(self.ranks.most(len(rows)) - len(rows)):  # layers are gathered by all
            idle = idle + 0.0 * run(one_token(0, self.device)).sum()
        return torch.cat(found) if found else torch.zeros(0, self.group, device=self.device), idle

    # ---- telling ----

    @property
    def _sums(self) -> list[str]:
        """Names of what is summed over ranks."""
        return ["loss", *dict.fromkeys(part for mean in self.means.values() for part in mean.split("/"))]

    def _over_ranks(self, sums: Mapping[str, float]) -> list[float]:
        own = torch.tensor([sums.get(name, 0.0) for name in self._sums], dtype=torch.float64)
        return self.ranks.sum(own).tolist()

    def _means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What there is to tell of; nothing that would be a mean over none."""
        parts = {name: mean.split("/") for name, mean in self.means.items()}
        return {name: sums[of] / sums[over] for name, (of, over) in parts.items() if sums[over]}

    # ---- validation ----

    def _check(self, records: Sequence[Record]) -> int:
        problems = [record for record in records if self.field not in record]
        if problems and not self.scorer.rewards:
            raise ValueError(
                f"data.{self._split}.{problems[0]['benchmark']}: its records have no {self.field!r}, and to be "
                "answered as problems they need model.rewards"
            )
        return super()._check(problems)

    def _begin(self, split: str, loader: Any) -> None:
        self._held_out = {}
        super()._begin(split, loader)

    def _evaluate(self, batch: list[Record]) -> None:
        problems = [record for record in batch if self.field not in record]
        texts = [record for record in batch if self.field in record]
        for name in dict.fromkeys(record["benchmark"] for record in texts):
            self._measure(name, [self.text_of(record) for record in texts if record["benchmark"] == name])
        if problems:
            super()._evaluate(problems)

    @torch.no_grad()
    def _measure(self, name: str, texts: list[Text]) -> None:
        out = self._loss(self._share(texts), self.totals(texts) | self.before(texts))
        sums = {key: float(value) for key, value in out.metrics.items()}
        self._held_out[name] = summed([self._held_out.get(name, {}), sums])

    def on_validation_epoch_end(self) -> None:
        """Log `val/<benchmark>/...` of held-out texts, and of problems as GRPO does."""
        super().on_validation_epoch_end()
        self._found_of_texts = {}
        for name, sums in self._held_out.items():
            for what, value in self._means(dict(zip(self._sums, self._over_ranks(sums), strict=True))).items():
                self._found_of_texts[f"{self._split}/{name}/{what}"] = value
                self.log(f"{self._split}/{name}/{what}", value, prog_bar=what in self.shown)

    def report(self) -> str:
        """What was found, for people; on the first rank."""
        width = max(map(len, self._found_of_texts), default=0)
        lines = [f"{name:<{width}}  {value:.3f}" for name, value in self._found_of_texts.items()]
        return "\n".join([*lines, super().report()] if self.results else lines)


def ids_of(record: Mapping[str, Any], field: str, tokenizer: Any, ends: Collection[int]) -> list[int]:
    """Tokens of a text of a record, and the end-of-sequence token unless one of them is among `ends`."""
    text = record.get(field)
    if not isinstance(text, str):
        raise ValueError(
            f"data: record {record.get('index')} has no text under {field!r}; its fields are {keys(record)}"
        )
    if not text:
        raise ValueError(f"data: record {record.get('index')} has an empty text under {field!r}; leave it out")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if any(token in ends for token in ids) else [*ids, tokenizer.eos_token_id]


def keys(record: Mapping[str, Any]) -> str:
    """The names a user gave."""
    return ", ".join(sorted(set(record) - {"prompt_ids", "index", "benchmark"}))


def rollouts_of(texts: Sequence[Text], device: Any) -> Rollouts:
    """Texts in the form a `Policy` takes, G completions of each prompt; the sampler's log-probabilities are 0."""
    completions = [completion for text in texts for completion in text.completions]
    lengths = torch.tensor([len(completion) for completion in completions])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    flat = torch.tensor([token for completion in completions for token in completion])
    ids = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, flat)
    return Rollouts(
        prompt_ids=[text.prompt_ids for text in texts],
        completion_ids=ids.to(device),
        completion_mask=mask.to(device),
        rollout_logprobs=torch.zeros(mask.shape, device=device),
        truncated=torch.zeros(len(completions), dtype=torch.bool, device=device),
    )


def lengths_of(texts: Sequence[Text], like: Tensor) -> Tensor:
    """Tokens of completions, float32 [n, G], as `Offline.logprobs` has them."""
    lengths = [[len(ids) for ids in text.completions] for text in texts]
    return torch.tensor(lengths, dtype=torch.float32, device=like.device).view(like.shape)
