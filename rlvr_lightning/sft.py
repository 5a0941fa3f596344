"""Supervised fine-tuning on demonstrations, or training from nothing on them.

The loss of a batch is the mean over all its completion tokens, the one that ends it included, of

    -log p(token | prompt, earlier tokens of the demonstration)

so long demonstrations weigh more than short ones, and the split into ranks does not change the gradient. Prompts are
read but not learned. `python -m rlvr_lightning fit --config tiny_sft.yaml` makes the packaged tiny model this way.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlvr_lightning.checkpoint.start import first_names
from rlvr_lightning.delta.tensor import whole
from rlvr_lightning.offline import Offline, Record, Text, ids_of
from rlvr_lightning.policy import load_model, resolve_model
from rlvr_lightning.schema import LossOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SFT(Offline):
    """Fits a causal LM to demonstrations: records with a `demonstration` (str) beside the prompt.

    Logs `sft/nll` (nats per token of the training batch) and `val/<benchmark>/nll` (likewise, over the benchmark); of
    problems without demonstrations what GRPO logs of them.

    Args:
        model: "tiny", "smollm2", a folder or a hub name.
        optimizer: any torch optimizer; called with the trainable parameters.
        scheduler: of the learning rate, stepped after every optimizer step; constant when null.
        from_scratch: start from random weights, drawn with the seed, instead of the model's own.
        export_to: folder that receives the model and its tokenizer at the end of the fit; not written when null. Of
            checkpoints with `lora`, `python -m rlvr_lightning export` writes one.
        export_dtype: of the exported weights.
        kwargs: see `Offline` and `PolicyModule`.

    Raises:
        ValueError: the model cannot be found; `export_to` is its own folder, or goes with `lora`.
    """

    field = "demonstration"
    means: ClassVar[dict[str, str]] = {"nll": "nll/tokens"}
    prefix = "sft/"
    shown = ("nll",)

    def __init__(
        self,
        model: str,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        from_scratch: bool = False,
        export_to: str | None = None,
        export_dtype: Literal["float32", "bfloat16"] = "bfloat16",
        **kwargs: Any,
    ) -> None:
        source = resolve_model(model)
        if export_to is not None and Path(export_to).resolve() == Path(source).resolve():
            raise ValueError(f"model.export_to must differ from the folder the model is read from, {source}")
        if export_to is not None and kwargs.get("lora"):
            raise ValueError(
                "model.export_to does not merge adapters; leave it out with lora, and write the model of a checkpoint "
                "with: python -m rlvr_lightning export"
            )
        super().__init__(model=model, optimizer=optimizer, scheduler=scheduler, reference="none", **kwargs)
        self.from_scratch = from_scratch
        self.export_to, self.export_dtype = export_to, export_dtype

    def load_model(self, empty: bool = False) -> PreTrainedModel:
        """The model's own weights, or random ones."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return load_model(self.model_name, self.weights_dtype, from_scratch=self.from_scratch, empty=empty)

    def text_of(self, record: Record) -> Text:
        """The demonstration."""
        ids = ids_of(record, self.field, self.tokenizer, self.ends)
        return Text(prompt_ids=record["prompt_ids"], completions=[ids])

    def loss_of(
        self, texts: Sequence[Text], logprobs: Tensor, ref_logprobs: Tensor | None, totals: Mapping[str, Any]
    ) -> LossOutput:
        """The mean over all tokens of the batch."""
        nll, tokens = -logprobs.sum(), sum(len(text.completions[0]) for text in texts)
        return LossOutput(
            loss=nll / totals["first_tokens"], metrics={"nll": nll.detach(), "tokens": torch.tensor(tokens)}
        )

    def on_fit_end(self) -> None:
        """Export."""
        if self.export_to is not None:
            folder, dtype = Path(self.export_to), getattr(torch, self.export_dtype)
            export(self.policy.model, self.tokenizer, folder, dtype, writes=self.trainer.is_global_zero)


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
