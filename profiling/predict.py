"""What a process of a GRPO run holds, in closed form: a model's config and a few settings to a `Ledger`.

Standard library only. Weights, gradients, master and optimizer state are exact (`shares`); activations are counted for
layers like Llama's (`activations`). Of the buffers of sharding the most of a phase is taken at each of its instants, so
that the peak of several processes is an upper bound. Completions fewer or shorter than the settings allow take less:
every figure is of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Any

from rlvr_lightning.profiling.activations import (
    PROMPT_TOKENS,
    Pass,
    Widths,
    kv_cache,
    per_row,
    reading,
    sampling,
    widths,
)
from rlvr_lightning.profiling.ledger import Held, Instant, Ledger
from rlvr_lightning.profiling.optimizer_bytes import RELEASING
from rlvr_lightning.profiling.parameters import parameters
from rlvr_lightning.profiling.settings import WIDTH, Run
from rlvr_lightning.profiling.shares import Sizes, gathered_bytes, reducing_bytes, sizes

CUDA_OVERHEAD = 640 << 20
"""Of a process's CUDA context and libraries: assumed, of the order seen on data-centre GPUs; nccl takes more."""


def passes(config: Mapping[str, Any], run: Run) -> Pass:
    """One micro-batch of the longest completions."""
    w = widths(config, run.tensor)
    layers = sum(p.numel for p in parameters(config) if p.unit != "rest") / w.layers
    group = min(run.group_size, run.micro_batch)
    plain = config.get("sliding_window") and config.get("use_sliding_window", True)
    together = 1 if plain else per_row(run.prompt_tokens, run.max_tokens, group, layers, w.hidden)
    return Pass(
        widths=w,
        rows=run.micro_batch // together,
        length=run.prompt_tokens + together * run.max_tokens,
        packed=together > 1,
        targets=run.micro_batch * run.max_tokens,
        compute=WIDTH[run.compute_dtype],
        rank=run.lora_rank,
    )


def predict(config: Mapping[str, Any], run: Run) -> Ledger:
    """The instants of a step when a process may hold most.

    Args:
        config: what the model's `config.json` holds.
        run: settings.

    Raises:
        ValueError: a model or settings of which nothing can be said.
    """
    fixed, one, w = sizes(config, run), passes(config, run), widths(config, run.tensor)
    always = Held(
        weights=fixed.weights,
        optimizer_state=0 if run.low_on_host else sum(fixed.state.values()),
        reference=fixed.reference,
        subnetwork=fixed.subnetwork,
        overhead=CUDA_OVERHEAD if run.device == "cuda" else 0,
    )
    if run.device == "cpu" and run.optimizer in RELEASING:  # kept from step to step
        always = replace(always, optimizer_workspace=fixed.workspace)
    if run.cpu_offload:  # shards, their gradients and the optimizer's state are in host memory
        always = replace(always, weights=0, optimizer_state=0, reference=0, subnetwork=0)
        fixed = replace(fixed, gradients=0, workspace=0)
    before = [*_rollout(always, fixed, w, run), *_reference(always, fixed, config, run)]
    return Ledger([*before, *_training(always, fixed, one, run)])


def _rollout(always: Held, fixed: Sizes, w: Widths, run: Run) -> list[Instant]:
    compute = WIDTH[run.compute_dtype]
    rows = min(run.rollout_batch, run.completions)
    prompts = min(ceil(rows / run.group_size) + 1, ceil(run.completions / run.group_size))
    gathered = gathered_bytes(fixed, run, "rollout")
    held = replace(always, gathered=gathered, compute_copy=fixed.cast + (fixed.copies if run.autocast else 0))
    cache = kv_cache(w, rows, prompts, run.prompt_tokens, run.max_tokens, compute)
    tokens = min(PROMPT_TOKENS, prompts * run.prompt_tokens)
    prompt_cache = kv_cache(w, 0, prompts, run.prompt_tokens, 0, compute)
    read = replace(held, kv_cache=prompt_cache, rollout_workspace=reading(w, tokens, compute))
    scores = rows * (run.prompt_tokens + run.max_tokens) * w.heads * (4 + compute)
    last = replace(
        held,
        kv_cache=cache,
        logits=sampling(w, rows, compute, run.temperature != 1),
        rollout_workspace=reading(w, rows, compute),
    )
    attending = replace(held, kv_cache=cache, rollout_workspace=reading(w, rows, compute) + scores)
    return [
        Instant(name="prompts are read", phase="rollout", held=read),
        Instant(name="attention over the longest completions", phase="rollout", held=attending),
        Instant(name="sampling the last tokens", phase="rollout", held=last),
    ]


def _training(always: Held, fixed: Sizes, one: Pass, run: Run) -> list[Instant]:
    sharded = run.shard > 1 or run.replicate > 1
    held = replace(always, compute_copy=fixed.copies + fixed.cast, gathered=gathered_bytes(fixed, run, "training"))
    layers = one.widths.layers
    kept = layers * (one.input() if run.activation_checkpointing else one.layer())
    kept -= 0 if run.activation_checkpointing else one.unlearned()
    before = fixed.gradients if run.micro_batches > 1 else 0  # of the micro-batches before
    head = 0 if sharded else fixed.head
    one_layer = one.layer() if run.activation_checkpointing else 0
    lowest = one.input() + one.layer() + one.slope() + one.rotations()
    after_loss = kept + (one.rest() if run.gradient_release and run.two_pass else one.rotations())
    made = (
        max(before, fixed.gradients - fixed.layer_gradients - fixed.embedding) + fixed.inner
    )  # when the first layer's turn has come
    released = fixed.largest if run.gradient_release else 0
    kept += one.rest()
    instants = {
        "loss, forward": replace(held, gradients=before, activations=kept + one.mask(), logits=one.logits(False)),
        "loss, backward": replace(held, gradients=before + head, activations=kept, logits=one.logits(True)),
        "backward pass of the last layer": replace(
            held,
            gradients=max(before + head, released),
            activations=after_loss + one_layer + one.slope(),
            reducing=fixed.rest[0] * one.compute if sharded and not run.lora_rank else 0,
        ),
        "backward pass of the first layer": replace(
            held,
            gradients=released or made,
            activations=lowest,
            reducing=reducing_bytes(fixed, run),
        ),
        "end of the backward pass": replace(
            held,
            gradients=released or fixed.gradients,
            activations=2 * one.input(),
            reducing=reducing_bytes(fixed, run),
        ),
        "optimizer step": replace(
            held,
            gradients=0 if run.gradient_release else fixed.gradients,
            compute_copy=fixed.cast,
            gathered=0,
            optimizer_workspace=fixed.workspace,
        ),
    }
    return [Instant(name=name, phase="training", held=held) for name, held in instants.items()]


def _reference(always: Held, fixed: Sizes, config: Mapping[str, Any], run: Run) -> list[Instant]:
    """A forward pass of whole groups."""
    if run.reference == "none":
        return []
    whole = passes(config, replace(run, gradient_release=False, micro_batch=max(run.micro_batch, run.group_size)))
    held = replace(
        always,
        compute_copy=fixed.copies + fixed.cast,
        gathered=gathered_bytes(fixed, run, "training"),
        activations=whole.input() + whole.mask() + whole.targets * whole.widths.hidden * whole.compute,
        logits=whole.logits(False),
    )
    return [Instant(name="log-probs of the reference", phase="training", held=held)]
