"""The settings of a GRPO run that decide how much memory it takes. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from rlvr_lightning.profiling.optimizer_bytes import RELEASING, RULES

WIDTH = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Run:
    """The settings that decide how much memory a run takes; named and defaulting as those of `GRPO` where both have."""

    optimizer: str = "sgd"
    """One of `optimizer_bytes.RULES`."""
    dtype: str = "float32"
    """Of stored weights."""
    compute_dtype: str = "bfloat16"
    autocast: bool = False
    """`trainer.precision: bf16-mixed`: a 16-bit copy of every matrix."""
    gradient_release: bool = False
    two_pass: bool = True
    """Released gradients are clipped exactly (`clip: two_pass`), for which a first backward pass frees nothing."""
    reference: str = "none"
    """`none` (also where there is no KL term), `copy` or `delta`."""
    changed_frac: float = 0.01
    """Share of entries in which a delta reference differs from the start; above 0.2, or in fp32, it is a copy."""
    lora_rank: int = 0
    """Of adapters of all linear layers; 0 trains the weights themselves."""
    subnetwork: bool = False
    """Only the entries of a mask are trained, which takes a bit for each of all."""
    activation_checkpointing: bool = False
    micro_batch: int = 32
    step_completions: int | None = None
    """Completions of an optimizer step in this process; None is one micro-batch."""
    minibatches: int = 1
    """Optimizer steps that the completions of a rollout are split into."""
    group_size: int = 8
    prompt_tokens: int = 256
    max_tokens: int = 64
    rollout_batch: int = 256
    temperature: float = 1.0
    shard: int = 1
    replicate: int = 1
    tensor: int = 1
    reduce_dtype: str = "float32"
    rollout: str = "once"
    cpu_offload: bool = False
    low_on_host: bool = False
    """The low halves of `sgd_split` are in host memory."""
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in (
            "micro_batch",
            "group_size",
            "prompt_tokens",
            "max_tokens",
            "rollout_batch",
            "shard",
            "replicate",
            "tensor",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        choices = {"optimizer": tuple(RULES), "reference": ("none", "copy", "delta"), "rollout": ("once", "layers")}
        choices |= dict.fromkeys(("dtype", "compute_dtype", "reduce_dtype"), tuple(WIDTH))
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not known here; one of {', '.join(known)}")
        micro, group = self.micro_batch, self.group_size
        if group % micro and micro % group:
            raise ValueError(f"micro_batch ({micro}) must divide group_size ({group}) or be a multiple of it")
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.gradient_release and self.optimizer not in RELEASING:
            raise ValueError(
                f"gradient_release: {self.optimizer} cannot update during the backward pass; use sgd_split, sgd_bf16"
            )
        if self.gradient_release and self.micro_batches > 1:
            raise ValueError(
                f"gradient_release takes one micro-batch per optimizer step; set micro_batch to {self.step_completions}"
            )
        if self.autocast and self.dtype != "float32":
            raise ValueError("autocast (bf16-mixed) is for float32 weights; set dtype: float32, or leave it out")
        if not 0 <= self.changed_frac <= 1 or self.lora_rank < 0:
            raise ValueError("changed_frac must lie in [0, 1], and lora_rank be 0 (off) or more")

    @property
    def micro_batches(self) -> int:
        """Of an optimizer step."""
        return max(1, ceil((self.step_completions or self.micro_batch) / self.micro_batch))

    @property
    def completions(self) -> int:
        """Of a rollout in this process."""
        return (self.step_completions or self.micro_batch) * self.minibatches

    @property
    def processes(self) -> int:
        """That share the model or hold copies of it."""
        return self.shard * self.replicate * self.tensor
