"""Causal LMs: finding, loading, adapting, and the log-probabilities of completions under them."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rlvr_lightning.compute import compute_in
from rlvr_lightning.logprobs import Head, token_logprobs
from rlvr_lightning.packing import completions_per_row, pack
from rlvr_lightning.schema import Rollouts
from rlvr_lightning.value_head import ValueHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

TINY = Path(__file__).parent / "assets" / "tiny"


def resolve_model(name: str) -> str:
    """The folder or hub name behind a model's name.

    `tiny` is the packaged model, `smollm2` the converted SmolLM2-135M-Instruct (made on first use), a path is a folder
    with a `config.json`, and anything like `owner/name` is left to the model hub.

    Raises:
        ValueError: there is no such folder, or it holds no causal LM.
    """
    if name == "tiny":
        return str(TINY)
    if name == "smollm2":
        from rlvr_lightning.data.smollm2 import smollm2_folder

        return str(smollm2_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_causal_lm(folder)
        return str(folder)
    looks_like_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not looks_like_hub:
        raise ValueError(f"model: no folder {name!r}; give a model's folder, a hub name, 'tiny' or 'smollm2'")
    return name


def check_causal_lm(folder: Path) -> None:
    """Raise ValueError unless the folder's config.json names an architecture that is a causal LM."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model: {folder} has no config.json; give a folder written by save_pretrained")
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"model: {path} is not a JSON object: {error}") from None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"model: {folder} holds a {model_type!r} model, which is not a causal LM")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with an end-of-sequence and a padding token.

    Raises:
        ValueError: it is not to be had, or has no end-of-sequence token, so that no completion could ever end.
    """
    from transformers import AutoTokenizer

    source = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"model: {name!r} is not at hand, and cannot be had from the model hub: {why}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: the tokenizer of {name!r} has no eos_token; set it in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:  # harmless: padding is never attended to nor trained on
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str, dtype: torch.dtype = torch.float32, from_scratch: bool = False, empty: bool = False
) -> PreTrainedModel:
    """A causal LM in training mode; only safetensors are read and no code of the repository is run.

    Args:
        name: see `resolve_model`.
        dtype: of the stored weights.
        from_scratch: random weights from the config alone, drawn with torch's global generator.
        empty: no weights at all, only their shapes: on the meta device, from the config alone.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    source = resolve_model(name)
    if sum(file.stat().st_size for file in Path(source).glob("*.safetensors")) < 1 << 30:
        transformers_logging.disable_progress_bar()  # it would be gone before it is read
    if from_scratch or empty:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta") if empty else nullcontext():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    disable_dropout(model)
    return model.train()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: with it the trainer's distribution would not be the sampler's."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Train low-rank adapters instead of the weights themselves (package `peft`)."""

    rank: int = 1
    """Rank of the update of each matrix."""
    alpha: int = 32
    """The update is scaled by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers adapted; all linear ones but the output layer by default."""

    def adapt(self, model: PreTrainedModel) -> nn.Module:
        """Wrap a model: its own weights are frozen, adapters are trainable and start as no change."""
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise ValueError("lora needs the package peft: pip install 'rlvr-lightning[lora]'") from None
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=self.target_modules, task_type="CAUSAL_LM"
        )
        return get_peft_model(model, config)


class TokenLogprobs(NamedTuple):
    """Of completion tokens, under a model; a tuple, in which FSDP finds the tensors."""

    logprobs: Tensor
    """float32 [R, T], 0 where masked."""
    entropy: Tensor
    """float32 [R, T] in nats, 0 where masked."""
    values: Tensor | None = None
    """float32 [R, T], of what came before each token, 0 where masked; None without a value head."""


def compute_dtype_of(policy: Policy, wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of arithmetic: `float32`, `bfloat16`, or `auto` (see `GRPO`)."""
    stored = next(policy.parameters()).dtype
    slow_here = stored.itemsize == 2 and device.type == "cpu"
    return getattr(torch, wanted) if wanted != "auto" else torch.float32 if slow_here else stored


class Policy(nn.Module):
    """A causal LM that returns log-probabilities of completions.

    Args:
        model: a transformers causal LM, or a peft model around one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.value_head: ValueHead | None = None

    def add_value_head(self) -> None:
        """Have values, too, from now on; on the device of the weights."""
        config = self.causal_lm.config.get_text_config()
        with next(self.parameters()).device:
            self.value_head = ValueHead(config.hidden_size)

    @property
    def causal_lm(self) -> Any:
        """The transformers model, without peft's wrapper; adapters sit inside its layers."""
        unwrap = getattr(self.model, "get_base_model", None)
        return unwrap() if callable(unwrap) else self.model

    def compute_in(self, dtype: torch.dtype) -> None:
        """Compute in a dtype of its own, whatever the weights are stored in."""
        for name in compute_in(self.model, dtype):
            log.warning("%s is kept in %s between the forward and the backward pass", name, dtype)

    def logits(self, **inputs: Any) -> Tensor:
        """The model's own forward: logits [B, kept, V]."""
        return self.model(**inputs).logits

    def head(self) -> Head:
        """The output layer, with the scalings some architectures apply to logits."""
        layer = self.causal_lm.get_output_embeddings()
        config = self.causal_lm.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return Head(
            weight=layer.weight,
            bias=getattr(layer, "bias", None),
            scale=float(scale),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def forward(self, rollouts: Rollouts, temperature: float = 1.0, per_row: int | None = None) -> TokenLogprobs:
        """Log-probabilities and entropies of the completion tokens, and values where there is a value head.

        Args:
            rollouts: prompts and completions; rows of the completion mask must be left-aligned.
            temperature: divides the logits, as the sampler did; 0 (greedy) reads as 1.
            per_row: completions that share one computation of their prompt; chosen by cost when None.
        """
        per_row = per_row or self._completions_per_row(rollouts)
        packed = pack(rollouts, per_row)
        hidden = self.causal_lm.base_model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            attention_mask=packed.mask,
            use_cache=False,
        ).last_hidden_state
        picked = hidden.flatten(0, 1)[packed.predictors]
        logprob, entropy = token_logprobs(picked, self.head(), packed.targets, temperature or 1.0)
        mask = rollouts.completion_mask
        empty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        values = None
        if self.value_head is not None:
            values = empty.masked_scatter(mask, self.value_head(picked.detach()))
        return TokenLogprobs(empty.masked_scatter(mask, logprob), empty.masked_scatter(mask, entropy), values)

    def _completions_per_row(self, rollouts: Rollouts) -> int:
        config = self.causal_lm.config.get_text_config()
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            return 1  # a packed row would stretch distances beyond the window
        if config._attn_implementation != "sdpa":
            return 1  # it reads a mask of who may see whom otherwise, or not at all; a row's own order needs none
        layers = [p.numel() for n, p in self.causal_lm.named_parameters() if ".layers." in n or ".h." in n]
        per_token = sum(layers) / config.num_hidden_layers  # multiply-adds of one layer's matrices
        return completions_per_row(rollouts, per_token / (2 * config.hidden_size))
