"""The engine that a module's `rollout` setting means."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Trainer

from rlvr_lightning.losses import Objective
from rlvr_lightning.policy import Policy, compute_dtype_of
from rlvr_lightning.rollout.hf import HFEngine
from rlvr_lightning.rollout.vllm.engine import Client, VLLMEngine
from rlvr_lightning.rollout.vllm.requests import engine_options
from rlvr_lightning.rollout.vllm.settings import VLLM, require_vllm
from rlvr_lightning.rollout.vllm.sync import WeightSync
from rlvr_lightning.strategy import Layout

Rollout = Literal["hf", "vllm"] | VLLM
Engine = HFEngine | VLLMEngine


def settings_of(rollout: Rollout, resample_rounds: int = 0) -> VLLM | None:
    """How vLLM is to run; None for the embedded engine.

    Args:
        rollout: the setting.
        resample_rounds: times that groups without signal are drawn again.

    Raises:
        ValueError: it is not there, or cannot do what is asked.
    """
    if rollout == "hf":
        return None
    settings = VLLM() if rollout == "vllm" else rollout
    assert isinstance(settings, VLLM)
    require_vllm(settings)
    if settings.max_staleness and resample_rounds:
        raise ValueError("handling.resample_rounds draws groups again at once: set it to 0, or rollout.max_staleness")
    return settings


def corrected(objective: Objective, settings: VLLM | None) -> Objective:
    """The objective with `correction: auto` decided."""
    if objective.correction != "auto":
        return objective
    return replace(objective, correction="none" if settings is None else "truncate")


def longest(policy: Policy, prompt_tokens: int, max_tokens: int) -> int:
    """Tokens of a prompt and its completion that vLLM must have room for; 0 for a prompt means that it is not known.

    Raises:
        ValueError: the model has fewer positions.
    """
    limit = getattr(policy.causal_lm.config.get_text_config(), "max_position_embeddings", None)
    if not prompt_tokens and limit is not None:
        return int(limit)
    wanted = prompt_tokens + max_tokens
    if limit is not None and wanted > limit:
        raise ValueError(
            f"sampling.max_tokens: {max_tokens} and the longest prompt, {prompt_tokens}, make {wanted}, over the "
            f"model's max_position_embeddings = {limit}; lower it, or data.max_prompt_tokens, which drops long prompts"
        )
    return wanted


def vllm_engine(
    policy: Policy,
    layout: Layout,
    settings: VLLM,
    folder: str,
    stops: tuple[list[int], int],
    max_len: int,
    compute_dtype: str,
    trainer: Trainer | None,
) -> VLLMEngine:
    """An engine that starts vLLM when it is first needed.

    Args:
        policy: what it follows.
        layout: of the processes.
        settings: how vLLM runs.
        folder: of the model's config, or its name on the hub.
        stops: ids of the tokens that end a completion, and of the one that fills up behind.
        max_len: of prompt and completion.
        compute_dtype: of the policy, or auto.
        trainer: whose precision may override that, and whose folder gets a server's log.

    Raises:
        ValueError: the policy is split between tensor-parallel ranks.
    """
    if layout.tensor.size > 1:
        raise ValueError("rollout: vllm cannot follow a policy split by trainer.strategy.tensor; set it to 1")
    lora_rank = max((each.r for each in getattr(policy.model, "peft_config", {}).values()), default=0)
    if lora_rank and layout.data.size > 1:
        raise ValueError("rollout: vllm follows adapters of one process only; leave out lora, or set rollout: hf")
    if lora_rank and settings.max_staleness:
        raise ValueError("rollout.max_staleness: 1 is for weights without adapters; set it to 0")
    device = layout.data.device if trainer is None else trainer.strategy.root_device
    mixed = trainer is not None and str(trainer.precision).startswith("bf16")
    dtype = torch.bfloat16 if mixed else compute_dtype_of(policy, compute_dtype, device)

    def start() -> Client:
        options = engine_options(settings, folder, dtype, max_len, device, lora_rank)
        if settings.mode == "colocated":
            from rlvr_lightning.rollout.vllm.colocated import Colocated

            return Colocated(options, sleeps=device.type == "cuda")
        from rlvr_lightning.rollout.vllm.server import Servers, Started

        own = None
        if settings.urls is None:
            log_file = Path((trainer and (trainer.log_dir or trainer.default_root_dir)) or ".") / "vllm_server.log"
            own = partial(Started, options, log_file, settings.gpu, settings.timeout_s)
        shared = Path(settings.shared_folder) if settings.shared_folder else None
        return Servers(settings.urls or [], own, shared, settings.timeout_s, layout.data)

    sync = WeightSync(policy, dtype)
    return VLLMEngine(start, sync, *stops, settings, max_len, device, layout.data)
