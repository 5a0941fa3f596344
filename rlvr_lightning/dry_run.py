"""`fit --dry_run`: what a run would hold in each process and do first, without weights, processes or GPUs.

The model is built from its config alone, on the meta device, and sharded by the strategy's own code over a group of
processes that does not exist, of which this one takes the part of the first, whose shards are largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from rlvr_lightning.data.prompts import PromptData
from rlvr_lightning.delta.tensor import local
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.policy import Policy, compute_dtype_of
from rlvr_lightning.strategy import Sharded, decoder_layers, fully_shard_layers
from rlvr_lightning.trainer_checks import sharing

SHOWN = 3  # prompts
ENTRY_BYTES = 6
"""Of a delta reference: a position and a bfloat16 value."""


def dry_run(module: Any, data: Any, trainer: Trainer, device: torch.device) -> str:
    """Describe a run.

    Args:
        module: of GRPO, before `configure_model`.
        data: its data module.
        trainer: for as many processes as the run will have, on the CPU.
        device: of the kind that the run will use.

    Raises:
        ValueError: settings that the run would refuse, as soon as it would.
    """
    if not isinstance(module, GRPO) or not isinstance(data, PromptData):
        raise ValueError(f"--dry_run describes GRPO and its kin on PromptData, got {type(module).__name__}")
    module.check(trainer, data)
    with processes(trainer):
        policy = module._new_policy(empty=True)
        compute = compute_dtype_of(policy, module.compute_dtype, device)
        shares = count(module, policy, trainer, compute)
    data.setup("fit")
    parts = [about_model(policy, module, trainer, compute, device), table(shares, module, trainer)]
    ranks = sharing(trainer)
    return "\n\n".join([*parts, about_batches(module, data, ranks), about_prompts(data, ranks)])


@contextmanager
def processes(trainer: Trainer) -> Iterator[None]:
    """This process as the first of the trainer's, where they share a model; the strategy arranges them."""
    if not isinstance(trainer.strategy, Sharded):
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=trainer.world_size)
    try:
        trainer.strategy.setup_environment()
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Bytes in the first process."""

    weights: int
    gradients: int
    """While all are kept."""
    optimizer: int
    reference: int
    """At the start."""
    subnetwork: int
    """Of a mask."""
    beside: int
    """Of models that are trained beside the policy, and of their optimizer state."""
    layers: tuple[int, ...]
    """Of each decoder layer, gathered, in the dtype of the arithmetic; empty where nothing is sharded."""
    rest: int
    """Of embeddings, last norm and output layer, likewise."""
    largest_gradients: int
    """Of the unit with most, before they are averaged onto shards."""
    autocast: int
    """Of 16-bit copies of the matrices, where the trainer makes them."""


def count(module: GRPO, policy: Policy, trainer: Trainer, compute: torch.dtype) -> Shares:
    """Shard a policy that has no weights, and count what the first process has of everything."""
    strategy = trainer.strategy
    layers: tuple[int, ...] = ()
    rest = gradients = 0
    if isinstance(strategy, Sharded):
        fully_shard_layers(policy, strategy.device_mesh, compute, strategy)
        blocks = [list(layer.parameters()) for layer in decoder_layers(policy.causal_lm)]
        inside = {id(p) for block in blocks for p in block}
        others = [p for p in policy.parameters() if id(p) not in inside]
        layers, rest = tuple(gathered(block, compute) for block in blocks), gathered(others, compute)
        units = [[p for p in unit if p.requires_grad] for unit in (*blocks, others)]
        gradients = max(gathered(unit, compute) + gathered(unit, strategy.reduce_dtype) for unit in units)
    trained = [p for p in policy.parameters() if p.requires_grad]
    weights, optimizer = held(policy.parameters()), optimizer_bytes(module, trained)
    matrices = sum(2 * p.numel() for p in policy.parameters() if p.dim() > 1)
    return Shares(
        weights=weights,
        gradients=held(trained),
        optimizer=optimizer,
        reference=reference_bytes(module, [p for p in policy.model.parameters() if p.requires_grad]),
        beside=(module.models - 1) * (weights + optimizer),
        subnetwork=sum(-(-local(p).numel() // 8) for p in trained) if module.subnetwork else 0,
        layers=layers,
        rest=rest,
        largest_gradients=gradients,
        autocast=matrices if trainer.precision == "bf16-mixed" else 0,
    )


def gathered(parameters: Iterable[Tensor], dtype: torch.dtype) -> int:
    """Bytes of parameters in a dtype, gathered; a layer split by tensor parallelism is gathered in its parts."""
    return sum(p.numel() // split(p) * dtype.itemsize for p in parameters)


def split(parameter: Tensor) -> int:
    """In how many parts tensor parallelism holds a parameter."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    parts = zip(mesh.mesh_dim_names or (), mesh.shape, parameter.placements, strict=False)
    return math.prod(size for name, size, placement in parts if name == "tensor" and placement.is_shard())


def held(parameters: Iterable[Tensor]) -> int:
    """Bytes of what this process holds of parameters."""
    return sum(local(p).nbytes for p in parameters)


def optimizer_bytes(module: GRPO, trained: Sequence[Tensor]) -> int:
    """Bytes of the optimizer's state after a real step on shards without numbers."""
    shapes = [(local(p).shape, p.dtype) for p in trained]
    with FakeTensorMode():
        shards = [torch.nn.Parameter(torch.empty(shape, dtype=dtype)) for shape, dtype in shapes]
        optimizer = module.make_optimizer(shards)
        for shard in shards:
            shard.grad = torch.empty_like(shard)
        optimizer.step()
        values = [value for state in optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in values if isinstance(value, Tensor))


def reference_bytes(module: GRPO, trained: Sequence[Tensor]) -> int:
    """Bytes of the reference at the start: of copies, for a delta is empty then."""
    if module.keep_reference == "none" or module.lora:
        return 0
    return held(p for p in trained if module.keep_reference == "copy" or p.element_size() != 2)


# ---- the text ----


def about_model(policy: Policy, module: GRPO, trainer: Trainer, compute: torch.dtype, device: torch.device) -> str:
    """Parameters, dtypes and the layout of processes."""
    number = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    only = f", of which {trained:,} are trained" if trained < number else ""
    dtypes = f"stored in {name_of(module.weights_dtype)}, computed in {name_of(compute)}"
    lines = [f"{module.model_name}: {number:,} parameters{only}, {dtypes}, on {device.type}"]
    strategy = trainer.strategy
    if not isinstance(strategy, Sharded):
        return "\n".join([*lines, "one process, nothing is sharded"])
    replicate, shard, tensor = strategy.device_mesh.shape
    copies = (
        f"{replicate} copies of the model, each shared by {shard * tensor}" if replicate > 1 else "sharing one model"
    )
    copies += f", {tensor} of them computing each layer together" if tensor > 1 else ""
    nodes = f"{trainer.num_nodes} node{'s' * (trainer.num_nodes > 1)} x {trainer.world_size // trainer.num_nodes}"
    lines.append(
        f"{trainer.world_size} processes ({nodes}), {copies}; gradients averaged in {name_of(strategy.reduce_dtype)}"
    )
    lines.append(
        f"{len(decoder_layers(policy.causal_lm))} layers are gathered one by one, and the rest together; while "
        f"sampling {'all of it at once' if strategy.rollout == 'once' else 'likewise, for every token'}"
    )
    return "\n".join(lines)


def table(shares: Shares, module: GRPO, trainer: Trainer) -> str:
    """Bytes by owner in the first process, which has most."""
    release = module.gradient_release is not None
    rows = [
        ("weights", shares.weights, ""),
        ("gradients", 0 if release else shares.gradients, "released as they are made" if release else ""),
        ("optimizer state", shares.optimizer, ""),
        ("reference", shares.reference, reference_note(shares, module)),
        *([("reward model", shares.beside, "weights and optimizer state")] if shares.beside else []),
    ]
    rows += [("subnetwork", shares.subnetwork, "a mask, one bit an entry")] if shares.subnetwork else []
    always = sum(size for _, size, _ in rows)
    training, sampling = shares.autocast, 0
    if shares.layers:
        largest = sorted(shares.layers)[-2:]
        training = shares.rest + sum(largest) + shares.largest_gradients
        once = getattr(trainer.strategy, "rollout", "") == "once"
        sampling = shares.rest + sum(shares.layers if once else largest)
        rows.append(("gathered, training", training, "at most: two layers, the rest, one unit's gradients"))
        rows.append(("gathered, sampling", sampling, "the whole model" if once else "at most: two layers and the rest"))
    elif training:
        rows.append(("16-bit copies", training, "at most, by trainer.precision: bf16-mixed"))
    where = "GPU and host together" if getattr(trainer.strategy, "cpu_offload", False) else "process"
    most = always + max(training, sampling)
    unit, per = ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20)
    lines = [f"{'per ' + where:<22}{unit:>12}"]
    lines += [f"  {name:<20}{size / per:>12.2f}  {note}".rstrip() for name, size, note in rows]
    lines += [f"  {'together, at most':<20}{most / per:>12.2f}"]
    return "\n".join([*lines, "Without activations, logits and the cache of keys and values, which come on top."])


def reference_note(shares: Shares, module: GRPO) -> str:
    """Where a reference grows."""
    if module.keep_reference == "none":
        return "none: objective.kl_coef is 0"
    if module.lora:
        return "the policy without its adapters"
    if shares.reference:
        return "a copy"
    share = ENTRY_BYTES / module.weights_dtype.itemsize
    return f"at the start; {share:.0f} % of the weights' bytes for each percent of entries that has changed"


def about_batches(module: GRPO, data: PromptData, ranks: int) -> str:
    """How a batch of prompts is cut up among the processes that share it."""
    group, batching = module.group_size, module.batching
    prompts = data.prompts_per_step // ranks
    completions = prompts * group
    rounds = math.ceil(completions / batching.rollout_batch)
    steps = batching.minibatches * batching.passes
    step = (
        min(prompts, data.prompts_per_step // batching.minibatches) * group
    )  # at most: minibatches are drawn from all
    micros = math.ceil(step / batching.micro_batch)
    return "\n".join(
        [
            f"{data.prompts_per_step} prompts a batch, {prompts} in each process, {group} completions of up to "
            f"{module.sampling.max_tokens} tokens for each: {completions}, drawn in {rounds} round{'s' * (rounds > 1)}",
            f"{steps} optimizer step{'s' * (steps > 1)} a batch, in each process of up to {step} completions in "
            f"{micros} micro-batch{'es' * (micros > 1)} of up to {min(batching.micro_batch, step)}",
        ]
    )


def about_prompts(data: PromptData, ranks: int) -> str:
    """The first prompts of the first process, as they will be sampled."""
    loader = data.train_dataloader()
    batch = [loader.records[row] for row in loader.order(0)[: data.prompts_per_step]]
    lines = [f"{len(loader.records):,} prompts, {len(loader)} batches an epoch; the first process begins with"]
    for record in batch[::ranks][:SHOWN]:
        lines.append(f"  [{record['index']}, {len(record['prompt_ids'])} tokens] {record['prompt']!r}")
    return "\n".join(lines)


def name_of(dtype: torch.dtype) -> str:
    """Without the module."""
    return str(dtype).removeprefix("torch.")
