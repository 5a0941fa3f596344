"""Supervised fine-tuning on demonstrations, or training from nothing on them.

The loss of a batch is the mean over all its completion tokens, the closing end-of-sequence included, of

    -log p(token | prompt, earlier tokens of the demonstration)

so long demonstrations weigh more than short ones, and the split into ranks does not change the gradient. Prompts are
read but not learned. `python -m rlvr_lightning fit --config tiny_sft.yaml` makes the packaged tiny model this way.
"""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlvr_lightning.checkpoint.start import first_names
from rlvr_lightning.delta.tensor import whole
from rlvr_lightning.policy import load_model, resolve_model
from rlvr_lightning.policy_module import PolicyModule
from rlvr_lightning.schema import LossOutput, Rollouts, one_token
from rlvr_lightning.telling import of_steps
from rlvr_lightning.trainer_checks import sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Record = Mapping[str, Any]
Pair = tuple[list[int], list[int]]
"""Tokens of a prompt and of a completion."""

ROWS = 16  # demonstrations in a forward pass: of similar length, so that little of it is padding


class SFT(PolicyModule):
    """Fits a causal LM to demonstrations: records with a `demonstration` (str) beside the prompt.

    Logs `sft/nll` (nats per token of the training batch) and `val/<benchmark>/nll` (likewise, over the benchmark).

    Args:
        model: "tiny", "smollm2", a folder or a hub name.
        optimizer: any torch optimizer; called with the trainable parameters.
        scheduler: of the learning rate, stepped after every optimizer step; constant when null.
        from_scratch: start from random weights, drawn with the seed, instead of the model's own.
        export_to: folder that receives the model and its tokenizer at the end of the fit; not written when null.
        export_dtype: of the exported weights.
        micro_batch: demonstrations in one backward pass; all of a step when null. Costs memory, changes no gradient.
        kwargs: of every algorithm; see `PolicyModule`.

    Raises:
        ValueError: the model cannot be found, or `export_to` is its own folder.
    """

    def __init__(
        self,
        model: str,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        from_scratch: bool = False,
        export_to: str | None = None,
        export_dtype: Literal["float32", "bfloat16"] = "bfloat16",
        micro_batch: int | None = None,
        **kwargs: Any,
    ) -> None:
        source = resolve_model(model)
        if export_to is not None and Path(export_to).resolve() == Path(source).resolve():
            raise ValueError(f"model.export_to must differ from the folder the model is read from, {source}")
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"model.micro_batch must be at least 1, got {micro_batch}")
        super().__init__(model=model, optimizer=optimizer, scheduler=scheduler, reference="none", **kwargs)
        self.from_scratch, self.micro_batch = from_scratch, micro_batch
        self.export_to, self.export_dtype = export_to, export_dtype
        self._val_sums: dict[str, Tensor] = {}

    def load_model(self, empty: bool = False) -> PreTrainedModel:
        """The model's own weights, or random ones."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return load_model(self.model_name, self.weights_dtype, from_scratch=self.from_scratch, empty=empty)

    def check(self, trainer: Trainer, data: Any) -> None:
        """Also that a released step is one micro-batch."""
        super().check(trainer, data)
        if self.gradient_release and self.micro_batch and (prompts := getattr(data, "prompts_per_step", None)):
            mine = -(-prompts // sharing(trainer))
            self.gradient_release.check(mine, self.micro_batch, "model.micro_batch")

    def training_step(self, batch: list[Record], batch_idx: int) -> None:
        """One optimizer step on the mean loss over the global batch."""
        mine, tokens = self._share(batch)
        size = self.micro_batch or max(1, len(mine))
        ends = range(0, self.layout.data.most(len(mine)), size) if self.micro_batch else [0]
        parts = [mine[at : at + size] for at in ends]  # on each rank as many, the last may be empty
        sums = self.take_step(parts, lambda part: LossOutput(loss=self._nll(part) / tokens))
        loss = torch.tensor(sums.pop("loss", 0.0), device=self.device)
        self.log("sft/nll", self.layout.data.sum(loss), prog_bar=True)
        self.log_dict(of_steps(self, sums))

    def validation_step(self, batch: list[Record], batch_idx: int) -> None:
        """Add the batch to the sums of its benchmarks."""
        for name in dict.fromkeys(record["benchmark"] for record in batch):
            mine, tokens = self._share([record for record in batch if record["benchmark"] == name])
            total = self._nll(mine)
            everywhere = self.layout.data.sum(total.detach())
            self._val_sums[name] += torch.stack([everywhere, torch.full_like(everywhere, tokens)])

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of the last validation."""
        self._val_sums = defaultdict(lambda: torch.zeros(2, device=self.trainer.strategy.root_device))

    def on_validation_epoch_end(self) -> None:
        """Log nats per token of each benchmark."""
        for name, (total, tokens) in self._val_sums.items():
            self.log(f"val/{name}/nll", total / tokens, prog_bar=True)

    def _share(self, batch: list[Record]) -> tuple[list[Pair], int]:
        """This rank's demonstrations, by length; tokens of all ranks' ones."""
        ranks = self.layout.data
        pairs = [(record["prompt_ids"], demonstration_ids(record, self.tokenizer)) for record in batch]
        mine = sorted(pairs[ranks.rank :: ranks.size], key=lambda pair: len(pair[0]) + len(pair[1]))
        return mine, sum(len(completion) for _, completion in pairs)

    def _nll(self, mine: list[Pair]) -> Tensor:
        """Negative log-likelihood of some of this rank's demonstrations, float32 scalar; called by all ranks."""
        rows = [mine[at : at + ROWS] for at in range(0, len(mine), ROWS)]
        idle = self.layout.data.most(len(rows)) - len(rows)
        logprobs = [self.policy(as_rollouts(row, self.device)).logprobs.sum() for row in rows]
        for _ in range(idle):  # for the ranks that have more: layers are gathered by all
            logprobs.append(0.0 * self.policy(one_token(0, self.device)).logprobs.sum())
        return -torch.stack(logprobs).sum()

    def on_fit_end(self) -> None:
        """Export."""
        if self.export_to is not None:
            folder, dtype = Path(self.export_to), getattr(torch, self.export_dtype)
            export(self.policy.model, self.tokenizer, folder, dtype, writes=self.trainer.is_global_zero)


def demonstration_ids(record: Record, tokenizer: Any) -> list[int]:
    """Tokens of a record's demonstration and the end-of-sequence token."""
    text = record.get("demonstration")
    if not isinstance(text, str):
        raise ValueError(f"data: record {record.get('index')} has no text under 'demonstration', which SFT learns from")
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def as_rollouts(pairs: Sequence[tuple[list[int], list[int]]], device: Any) -> Rollouts:
    """Pairs of prompt and completion in the form a `Policy` takes; the sampler's log-probabilities are set to 0."""
    completions = [completion for _, completion in pairs]
    lengths = torch.tensor([len(completion) for completion in completions])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    flat = torch.tensor([token for completion in completions for token in completion])
    ids = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, flat)
    return Rollouts(
        prompt_ids=[prompt for prompt, _ in pairs],
        completion_ids=ids.to(device),
        completion_mask=mask.to(device),
        rollout_logprobs=torch.zeros(mask.shape, device=device),
        truncated=torch.zeros(len(completions), dtype=torch.bool, device=device),
    )


def export(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype, writes: bool = True) -> str | None:
    """Write a model as a transformers folder and say its digest, which is returned.

    Args:
        model: of transformers; sharded or not.
        tokenizer: that goes with it.
        folder: made if it is not there.
        dtype: of the written weights.
        writes: False on all ranks but one; they take part in gathering the weights.
    """
    weights = {}
    for name, tensor in untied(model.state_dict()).items():
        everything = whole(tensor).detach()
        if writes:
            weights[name] = everything.to("cpu", dtype)
    if not writes:
        return None
    digest = weights_digest(weights)
    model.save_pretrained(folder, state_dict=weights)
    config = copy.deepcopy(model.config)
    config.dtype = dtype  # save_pretrained noted that of the live model
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"exported to {folder}, sha256 of the weights {digest}")
    return digest


def untied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without second names of the same tensor, such as an output layer tied to the embedding."""
    return {name: weights[name] for name in first_names(weights)[0]}


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Sha256 (hex) over names, dtypes, shapes and bits of tensors, in the order of names.

    Example:
        >>> one = {"a": torch.zeros(2), "b": torch.ones(1)}
        >>> weights_digest(one) == weights_digest({"b": torch.ones(1), "a": torch.zeros(2)})
        True
        >>> weights_digest(one) == weights_digest({"a": torch.zeros(2), "c": torch.ones(1)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
