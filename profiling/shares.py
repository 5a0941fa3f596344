"""What a process has of a model, its gradients and its optimizer's state, from shapes alone. Standard library only.

FSDP2 deals out the rows of each tensor; the first process, which this is, has most. Weights, gradients, state and
copies are exact, and so are the buffers of sharding where all layers are alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from rlvr_lightning.profiling.activations import CAST_ENTRIES
from rlvr_lightning.profiling.optimizer_bytes import RULES, state_bytes
from rlvr_lightning.profiling.parameters import Parameter, parameters
from rlvr_lightning.profiling.settings import WIDTH, Run

ENTRY_BYTES = 6
"""Of a delta: a position and a bfloat16 value."""
COLUMN_WISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_WISE = ("o_proj.weight", "down_proj.weight")
SPLIT = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Families of which the split by tensor parallelism is known here."""


@dataclass(frozen=True)
class Share:
    """What one process has of some like tensors."""

    whole: Parameter
    shape: tuple[int, ...]
    """Of its shard, the rows that fill up included."""
    unsharded: tuple[int, ...]
    """Of its part of the layer (all of it without tensor parallelism)."""
    padded: int
    """Entries of one gathered, filled up to a multiple of the processes."""

    @property
    def entries(self) -> int:
        """Of all copies, in this process."""
        return prod(self.shape) * self.whole.copies


def share(parameter: Parameter, run: Run) -> Share:
    """What the process with most has of a parameter: FSDP2 deals out rows, the first processes get most.

    >>> weight = Parameter("q_proj.weight", (10, 3), "layers", 2)
    >>> share(weight, Run(shard=4)).shape  # 10 rows among 4: 3, 3, 3, 1
    (3, 3)
    """
    shape = parameter.shape
    if run.tensor > 1 and parameter.unit != "rest":
        name = parameter.name.removeprefix("mlp.")
        if name.startswith(COLUMN_WISE):
            shape = (shape[0] // run.tensor, *shape[1:])
        elif name in ROW_WISE:
            shape = (shape[0], shape[1] // run.tensor)
    rows = ceil(shape[0] / run.shard)
    local = (rows, *shape[1:])
    return Share(parameter, local, shape, prod(local) * run.shard)


def adapters(found: list[Parameter], rank: int) -> list[Parameter]:
    """The tensors of LoRA on every linear layer but the output."""
    made = []
    for p in found:
        if p.name.endswith(".weight") and len(p.shape) == 2 and p.unit != "rest":
            made.append(Parameter(f"{p.name}.lora_A", (rank, p.shape[1]), p.unit, p.copies))
            made.append(Parameter(f"{p.name}.lora_B", (p.shape[0], rank), p.unit, p.copies))
    return made


@dataclass(frozen=True)
class Sizes:
    """Bytes that do not depend on the batch."""

    weights: int
    gradients: int
    """While all are kept."""
    largest: int
    """The gradient of the largest tensor, and of the next that is made while it is still there."""
    inner: int
    """The gradient of the largest tensor in a layer."""
    head: int
    """The gradient of the output layer."""
    embedding: int
    """The gradient of an embedding that is not the output layer: made last of all."""
    layer_gradients: int
    """Of one layer."""
    state: Mapping[str, int]
    workspace: int
    reference: int
    subnetwork: int
    copies: int
    """Of weights in the dtype of the arithmetic: whole ones in training."""
    cast: int
    """Of a block of a weight, cast as a layer runs."""
    rest: tuple[int, int]
    """Entries of what is around the layers, and filled up."""
    layer: tuple[int, int]
    """Of the largest layer, likewise."""
    whole: tuple[int, int]
    """Of all."""


def sizes(config: Mapping[str, Any], run: Run) -> Sizes:
    """What can be said from shapes alone.

    Raises:
        ValueError: the model cannot be split like that, or its config is not known.
    """
    found = parameters(config)
    _check_tensor(config.get("text_config") or config, run)
    width = WIDTH[run.dtype]
    frozen = [share(p, run) for p in found]
    trained = [share(p, run) for p in adapters(found, run.lora_rank)] if run.lora_rank else frozen
    own = 4 if run.lora_rank else width  # adapters are float32
    tensors = [(s.shape, own, s.whole.unit != "rest" and len(s.shape) == 2, s.whole.copies) for s in trained]
    weights = sum(s.entries for s in frozen) * width + (sum(s.entries for s in trained) * own if run.lora_rank else 0)
    gradients = sum(s.entries for s in trained) * own
    each = sorted((prod(s.shape) * own for s in trained), reverse=True)
    in_layers = max((prod(s.shape) * own for s in trained if s.whole.unit != "rest"), default=0)
    head = max((prod(s.shape) * own for s in trained if s.whole.name in ("embed_tokens", "lm_head")), default=0)
    foreach = run.device == "cuda"
    state = state_bytes(run.optimizer, tensors)
    return Sizes(
        weights=weights,
        gradients=gradients,
        largest=each[0] + (in_layers if in_layers < each[0] else 0),
        inner=in_layers,
        head=head,
        embedding=head if any(s.whole.name == "lm_head" for s in trained) else 0,
        layer_gradients=max(_units(trained).values(), default=(0, 0))[0] * own,
        state=state,
        workspace=RULES[run.optimizer].workspace(gradients // own, each[0] // own, own, foreach),
        reference=_reference(run, gradients),
        subnetwork=sum(-(-s.entries // 8) for s in frozen) if run.subnetwork else 0,
        copies=_compute_copies(found, run),
        cast=_cast_block(found, run),
        rest=_rest(frozen),
        layer=max(_units(frozen).values()),
        whole=(sum(prod(s.unsharded) * s.whole.copies for s in frozen), sum(s.padded * s.whole.copies for s in frozen)),
    )


def _check_tensor(config: Mapping[str, Any], run: Run) -> None:
    if run.tensor == 1:
        return
    if config["model_type"] not in SPLIT:
        raise ValueError(f"tensor: how {config['model_type']} layers are split is not known here; set it to 1")
    heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if any(count % run.tensor for count in heads):
        raise ValueError(
            f"tensor: {run.tensor} processes cannot share {heads[0]} attention heads with {heads[1]} of keys; "
            "set it to a divisor of both"
        )


def _units(shares: list[Share]) -> dict[str, tuple[int, int]]:
    """Entries of one layer of each kind, as they are and filled up."""
    found: dict[str, tuple[int, int]] = {}
    for s in shares:
        if s.whole.unit != "rest":
            had = found.get(s.whole.unit, (0, 0))
            found[s.whole.unit] = (had[0] + prod(s.unsharded), had[1] + s.padded)
    return found


def _rest(shares: list[Share]) -> tuple[int, int]:
    around = [s for s in shares if s.whole.unit == "rest"]
    return sum(prod(s.unsharded) for s in around), sum(s.padded for s in around)


def _reference(run: Run, weights: int) -> int:
    """Bytes of a reference, of weights in their dtype; an adapter's is the model without it."""
    if run.reference == "none" or run.lora_rank:
        return 0
    if run.reference == "copy" or run.dtype != "bfloat16" or run.changed_frac > 0.2:
        return weights
    return int(weights / 2 * run.changed_frac) * ENTRY_BYTES


def _compute_copies(found: list[Parameter], run: Run) -> int:
    """Bytes of weights cast whole in one process: all matrices under autocast, else fused experts."""
    if run.autocast:
        return sum(2 * p.numel for p in found if len(p.shape) > 1)
    if run.shard > 1 or run.dtype == run.compute_dtype:
        return 0
    experts = [p for p in found if p.name.startswith("experts.")]
    alive = [prod(p.shape) if run.activation_checkpointing else p.numel for p in experts]
    return sum(alive) * WIDTH[run.compute_dtype]


def _cast_block(found: list[Parameter], run: Run) -> int:
    if run.shard > 1 or run.replicate > 1 or run.autocast or run.dtype == run.compute_dtype:
        return 0
    return min(CAST_ENTRIES, max(prod(p.shape) for p in found)) * WIDTH[run.compute_dtype]


def gathered_bytes(fixed: Sizes, run: Run, when: str) -> int:
    """The most of whole weights, and of the buffers that they arrive in, in a phase; 0 if nothing is sharded.

    In training, and where layers are gathered as they run: the weights around the layers, with the buffer that they
    came in while the first layers are on their way, else two layers and the buffer of the second. In a rollout `once`:
    the whole model and the last buffer. All of them filled up to the same number of rows from each process.
    """
    if run.shard == 1 and run.replicate == 1:
        return 0
    compute = WIDTH[run.compute_dtype]
    if when == "rollout" and run.rollout == "once":
        return (fixed.whole[1] + fixed.layer[1]) * compute
    rest, layer = fixed.rest[1], fixed.layer[1]
    return max(2 * rest + 2 * layer, rest + 3 * layer) * compute


def reducing_bytes(fixed: Sizes, run: Run) -> int:
    """The most of whole gradients of a unit and the buffer that they are averaged in; 0 if nothing is sharded."""
    if (run.shard == 1 and run.replicate == 1) or run.lora_rank:
        return 0
    own, reduced = WIDTH[run.compute_dtype], WIDTH[run.reduce_dtype]
    return max(whole * own + padded * reduced for whole, padded in (fixed.rest, fixed.layer))
