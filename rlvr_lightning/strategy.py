"""The one place that knows how a model is spread over processes: FSDP2 through Lightning.

    trainer:
      devices: 8
      strategy: {class_path: rlvr_lightning.strategy.Sharded}

Every decoder layer is a unit of its own, gathered just before it runs and freed after it; embeddings, final norm and
output layer are one more. Weights are gathered in the dtype of the arithmetic. Gradients are averaged onto the shards
in `reduce_dtype`, and rounded to the weights' dtype after that. The optimizer sees only shards.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _destroy_dist_connection, _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from rlvr_lightning import watch
from rlvr_lightning.checkpoint.sharded import ShardedCheckpoints
from rlvr_lightning.policy import Policy, compute_dtype_of
from rlvr_lightning.ranks import ALONE, Ranks
from rlvr_lightning.rollout.hf import Runner

AXES = ("replicate", "shard", "tensor")
DATA = ("replicate", "shard")


class Sharded(ShardedCheckpoints):
    """FSDP2: each process holds a share of weights, gradients and optimizer state.

    Args:
        shard: processes that hold one copy of the model between them; `auto` is all there are, divided by `replicate`.
        replicate: such copies (HSDP): one for each node keeps the gathering of layers inside the nodes.
        tensor: processes that compute each layer together (tensor parallelism), each a share of its heads and columns;
            keep them inside a node. For models of which transformers knows how to split the layers.
        reduce_dtype: in which gradients are averaged; bfloat16 halves the traffic and rounds them.
        rollout: while completions are sampled, gather the whole model `once` (as much memory as an unsharded model), or
            each of its `layers` whenever it runs (two layers' memory, and traffic for every token).
        cpu_offload: keep shards, gradients and optimizer state in host memory.
        checkpoints: each process writes its part (`sharded`), or the first writes all in one file (`consolidated`).
        timeout_s: how long a process waits for the others, at the start and in every collective call, before it gives
            up with an error.
    """

    def __init__(
        self,
        shard: int | Literal["auto"] = "auto",
        replicate: int = 1,
        tensor: int = 1,
        reduce_dtype: Literal["float32", "bfloat16"] = "float32",
        rollout: Literal["once", "layers"] = "once",
        cpu_offload: bool = False,
        checkpoints: Literal["sharded", "consolidated"] = "sharded",
        timeout_s: float = 600.0,
    ) -> None:
        for name, count in (("shard", 1 if shard == "auto" else shard), ("replicate", replicate), ("tensor", tensor)):
            if count < 1:
                raise ValueError(f"trainer.strategy.{name} must be at least 1, got {count}")
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=checkpoints == "sharded",
            timeout=timedelta(seconds=timeout_s),
        )
        self.shard, self.replicate, self.tensor = shard, replicate, tensor
        self.reduce_dtype: torch.dtype = getattr(torch, reduce_dtype)
        self.rollout, self.cpu_offload = rollout, cpu_offload
        self.begins = ""
        """How this process means to begin, afresh or from a checkpoint; all must mean the same."""

    def setup_environment(self) -> None:
        """Start the processes' group and arrange them in a mesh of replicas and shards."""
        ParallelStrategy.setup_environment(self)
        try:
            self._setup_distributed()
        except dist.DistError as error:
            raise ValueError(self._not_met(error)) from error
        if "nccl" in (self._process_group_backend or ""):
            atexit.register(_destroy_dist_connection)  # Lightning does where the backend is NCCL alone
        watch.start({child.pid: child for child in getattr(self.launcher, "procs", ())})
        others = self.replicate * self.tensor
        shard = max(1, self.world_size // others) if self.shard == "auto" else self.shard
        if shard * others != self.world_size:
            raise ValueError(
                f"trainer.strategy: shard ({self.shard}) times replicate ({self.replicate}) times tensor "
                f"({self.tensor}) must be the number of processes, {self.world_size} (devices times num_nodes)"
            )
        sizes = (self.replicate, shard, self.tensor)
        self._device_mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=AXES)
        if dist.get_backend() != "fake":  # a dry run's
            limit = cast(timedelta, self._timeout)  # torch gives such groups half an hour
            for sub in (*(self._device_mesh[axis] for axis in AXES), *flattened(self._device_mesh)):
                dist.distributed_c10d._set_pg_timeout(limit, sub.get_group())
        if len(set(Ranks(size=self.world_size).gather(self.begins))) > 1:
            raise ValueError(
                "--ckpt_path last: some processes see checkpoints and others none; put the run folder on a file system "
                "that all machines share"
            )
        if self.lightning_module is not None:
            self.lightning_module._device_mesh = self._device_mesh

    def _get_process_group_backend(self) -> str:
        """Objects and what lies in host memory travel over gloo, also between GPUs."""
        on_gpu = self._process_group_backend is None and self.root_device.type == "cuda"
        return "cpu:gloo,cuda:nccl" if on_gpu else super()._get_process_group_backend()

    def model_to_device(self) -> None:
        """Shards in host memory stay there; all others are where they belong already."""
        if not self.cpu_offload:
            super().model_to_device()

    def _not_met(self, error: BaseException) -> str:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        within = f" within trainer.strategy.timeout_s ({self._timeout})"
        return (
            f"trainer: {self.world_size} processes (devices times num_nodes) did not meet at {where}{within}; start "
            f"the same command on every node, where that address can be reached: {str(error).splitlines()[0]}"
        )

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other processes, which may wait for this one."""
        if (watching := watch.current()) is not None:
            watching.failed(exception)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


class Launcher(_SubprocessScriptLauncher):
    """Lightning's, of a node's processes as children of the first, watched by `rlvr_lightning.watch`.

    Lightning's own observer kills all of them, this one too, when one ends with any status but 0.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Start the others, then call the function, in which they meet."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            watch.watch_children(self.procs)
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Who shares what."""

    data: Ranks = ALONE
    """Processes that share a batch of prompts."""
    shards: Ranks = ALONE
    """Processes that hold one copy of the model between them."""
    tensor: Ranks = ALONE
    """Processes that compute each layer together, on the same prompts: they must go on with the same."""
    rollout: Literal["once", "layers"] = "once"

    def runner(self, policy: Policy) -> Runner | None:
        """Who runs the policy's forward passes while completions are sampled; None if it is whole in this process."""
        return Gathered(policy, self, self.rollout) if isinstance(policy, FSDPModule) else None


def build_policy(
    make: Callable[[bool], Policy],
    trainer: Trainer | None,
    compute_dtype: str = "auto",
    activation_checkpointing: bool = False,
) -> tuple[Policy, Layout]:
    """A policy ready to run where the trainer runs: activation checkpointing, arithmetic, sharding.

    Under `Sharded` the first process alone loads the weights, in host memory, and hands them out tensor by tensor.

    Args:
        make: makes the policy; given True, on the meta device, without weights.
        trainer: None, and any strategy but `Sharded`, means that the whole model is in this process.
        compute_dtype: `float32`, `bfloat16`, or `auto`; see `GRPO`.
        activation_checkpointing: recompute layers in the backward pass.
    """
    strategy = trainer.strategy if trainer is not None else None
    loads = not isinstance(strategy, Sharded) or strategy.global_rank == 0
    whole = make(False) if loads else None  # first, so that adapters are drawn as in one process
    policy = make(True) if isinstance(strategy, Sharded) else cast(Policy, whole)
    if activation_checkpointing:
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    device = strategy.root_device if strategy is not None else torch.device("cpu")
    compute = compute_dtype_of(policy, compute_dtype, device)
    if not isinstance(strategy, Sharded):
        policy.compute_in(compute)
        return policy, Layout()
    fully_shard_layers(policy, strategy.device_mesh, compute, strategy)
    policy.to_empty(device=torch.device("cpu") if strategy.cpu_offload else device)
    for module in policy.modules():
        module._buffers.update({name: b.to(device) for name, b in module._buffers.items() if b is not None})
    fill(policy, whole)
    return policy, layout_of(strategy.device_mesh, strategy.root_device, strategy.rollout)


@torch.no_grad()
def fill(policy: Policy, whole: Policy | None) -> None:
    """Give a sharded policy its weights and buffers.

    Args:
        policy: on its devices, with anything in it.
        whole: the same with the values, on the first rank; None on the others.
    """
    weights = {} if whole is None else whole.state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy, weights, options=options)
    values = {} if whole is None else dict(whole.named_buffers())  # those that no state dict holds, too
    for name, buffer in policy.named_buffers():
        if name in values:
            buffer.copy_(values[name])
        dist.broadcast(buffer, src=0)


def flattened(mesh: DeviceMesh) -> tuple[DeviceMesh, DeviceMesh]:
    """The processes that share a batch, and those that hold one copy of the model, each along one axis."""
    return mesh[DATA]._flatten("data"), mesh["shard", "tensor"]._flatten("shards")


def layout_of(mesh: DeviceMesh, device: torch.device, rollout: Literal["once", "layers"]) -> Layout:
    """The groups of processes in a mesh of replicas and shards."""

    def ranks(sub: DeviceMesh) -> Ranks:
        return Ranks(rank=sub.get_local_rank(), size=sub.size(), group=sub.get_group(), device=device)

    data, shards = (ranks(sub) for sub in flattened(mesh))
    tensor = ranks(mesh["tensor"])
    return Layout(data=data, shards=replace(shards, copies=tensor.size), tensor=tensor, rollout=rollout)


def fully_shard_layers(policy: Policy, mesh: DeviceMesh, compute: torch.dtype, strategy: Sharded) -> None:
    """Shard every decoder layer, then what is left, over a mesh.

    Args:
        policy: on any device, whole.
        mesh: of replicas and shards.
        compute: dtype of arithmetic.
        strategy: the rest of the settings.
    """
    cast_to = compute if compute != next(policy.parameters()).dtype else None  # None leaves adapters in their own
    settings: dict[str, Any] = {
        "mesh": mesh[DATA] if mesh["replicate"].size() > 1 else mesh["shard"],
        "mp_policy": MixedPrecisionPolicy(param_dtype=cast_to, reduce_dtype=strategy.reduce_dtype),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
        if strategy.cpu_offload
        else OffloadPolicy(),
    }
    if strategy.tensor > 1:
        split_layers(policy, mesh["tensor"])
    for layer in decoder_layers(policy.causal_lm):
        fully_shard(layer, **settings)
    if policy.value_head is not None:  # in float32, whatever the model is in
        fully_shard(policy.value_head, **settings | {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)})
    fully_shard(policy, **settings)
    register_fsdp_forward_method(policy, "logits")
    policy.register_forward_hook(_free_without_grad, always_call=True)


def split_layers(policy: Policy, mesh: DeviceMesh) -> None:
    """Tensor parallelism inside the decoder layers, by transformers' plan for the model.

    Embeddings and output layer stay whole: log-probabilities are computed from slices of their own (`logprobs.py`).
    Stochastic rounding throws other dice for split weights than in one process.

    Raises:
        ValueError: there is no plan, or the heads cannot be shared out.
    """
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    model, size = policy.causal_lm, mesh.size()
    plan = {name: style for name, style in (getattr(model, "tp_plan", None) or {}).items() if ".layers." in name}
    if not plan:
        raise ValueError(
            f"trainer.strategy.tensor: transformers has no plan to split {type(model).__name__}; set it to 1"
        )
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % size or config.num_attention_heads % size:
        raise ValueError(
            f"trainer.strategy.tensor: {size} processes cannot share {config.num_attention_heads} attention heads with "
            f"{heads} of keys; set it to a divisor of both"
        )
    apply_tensor_parallelism(model, mesh, plan)


def _free_without_grad(policy: nn.Module, *_: Any) -> None:
    """The root stays gathered for the backward pass; without one, later changes of the shards must not be missed."""
    if not torch.is_grad_enabled():
        policy.reshard()  # type: ignore[operator]


def decoder_layers(causal_lm: Any) -> list[nn.Module]:
    """The repeated blocks of any transformers causal LM.

    Raises:
        ValueError: none are found.
    """
    names = set(getattr(causal_lm, "_no_split_modules", None) or ())
    found = [module for module in causal_lm.modules() if type(module).__name__ in names]
    if not found:
        count = causal_lm.config.get_text_config().num_hidden_layers
        lists = [m for m in causal_lm.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        found = list(lists[0]) if lists else []
    if not found:
        raise ValueError(f"model: found no decoder layers in {type(causal_lm).__name__} to shard; use one process")
    return found


class Gathered:
    """How the engine in process runs a sharded policy: see `rlvr_lightning.rollout.hf.Runner`.

    Args:
        policy: sharded.
        layout: who gathers and computes together.
        how: `once` or `layers`; see `Sharded`.
    """

    def __init__(self, policy: Policy, layout: Layout, how: Literal["once", "layers"]) -> None:
        self.policy, self.layout, self.how = policy, layout, how
        self.device = layout.data.device
        self.units = [m for m in policy.modules() if isinstance(m, FSDPModule)]

    def session(self) -> AbstractContextManager[None]:
        """Around one call of `generate`."""
        return self._whole()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        try:
            if self.how == "once":
                for unit in self.units:
                    unit.set_reshard_after_forward(False, recurse=False)
                    unit.unshard()
            yield
        finally:
            for unit in self.units:
                unit.set_reshard_after_forward(unit is not self.policy, recurse=False)
                unit.reshard()

    def logits(self, **inputs: Any) -> Tensor:
        """The model's own forward."""
        return self.policy.logits(**inputs)

    def pace(self, busy: bool) -> bool:
        """Whether another forward pass must be made, for some rank needs it: layers are gathered by all or by none."""
        return self.layout.data.any(busy) if self.how == "layers" else busy

    def agreed(self, tokens: Tensor) -> Tensor:
        """Those of the first of the processes that compute layers together: a last bit may differ, and tip a draw."""
        return self.layout.tensor.same_(tokens)
