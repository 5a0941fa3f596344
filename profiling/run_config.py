"""A run's YAML as the settings that decide its memory; reads YAML and nothing else, so that it answers at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlvr_lightning.profiling.optimizer_bytes import OURS, RULES
from rlvr_lightning.profiling.settings import Run

PROMPT_TOKENS = 256
"""Assumed where nothing limits prompts."""
REFERENCE = re.compile(r"\$\{([\w.]+)\}$")


class Loader(yaml.SafeLoader):
    """YAML 1.1 with numbers such as 1e-4, as the command line reads them."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_config(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A config with what the command line sets on top, such as `--model.batching.micro_batch 4`.

    Raises:
        ValueError: it is no YAML, or an override is not a pair of a name and a value.
    """
    try:
        config = yaml.load(path.read_text(), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ValueError(f"--config: {path} holds no settings")
    words = [part for word in overrides for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(words) % 2:
        raise ValueError(f"{words[-1]} has no value; give it as {words[-1]} VALUE")
    for name, value in zip(words[::2], words[1::2], strict=True):
        if not name.startswith("--") or "." not in name:
            raise ValueError(f"unknown option {name}; see --help")
        _set(config, name.removeprefix("--").split("."), yaml.load(value, Loader))
    return config


def _set(config: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a value at the place that the short form of a name means."""
    at = config
    for name in path[:-1]:
        at = at.get("init_args", at) if "class_path" in at and name not in ("class_path", "init_args") else at
        if not isinstance(at.get(name), dict):
            at[name] = {"class_path": at[name]} if isinstance(at.get(name), str) else {}
        at = at[name]
    if "class_path" in at and path[-1] not in ("class_path", "init_args"):
        at = at.setdefault("init_args", {})
    at[path[-1]] = value


def _arguments(block: Any) -> Mapping[str, Any]:
    if not isinstance(block, Mapping):
        return {}
    return block.get("init_args") or {} if "class_path" in block else block


def _class(block: Any) -> str:
    return str(block.get("class_path", "") if isinstance(block, Mapping) else block or "")


def _number(where: Mapping[str, Any], name: str, default: Any, place: str) -> Any:
    value = where.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{place}{name} must be a number, got {value!r}")
    return value


def model_of(config: Mapping[str, Any]) -> str:
    """The name of the model that a config trains."""
    name = _arguments(config.get("model")).get("model")
    if match := REFERENCE.match(str(name)):
        at: Any = config
        for part in match[1].split("."):
            at = at.get(part) if isinstance(at, Mapping) else None
        name = at
    if not isinstance(name, str):
        raise ValueError("--config: its model.init_args.model names no model")
    return name


def optimizer_of(block: Any) -> str:
    """The name here of a config's optimizer.

    >>> optimizer_of({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}})
    'momentum'
    >>> optimizer_of({"class_path": "rlvr_lightning.optim.SGD", "init_args": {"lr": 0.1}})
    'sgd_split'
    """
    path, settings = _class(block), _arguments(block)
    if path in (OURS, "rlvr_lightning.optim.sgd.SGD"):
        kind = settings.get("master", "split")
        kinds = {"split": "sgd_split", "fp32": "sgd_fp32", "none": "sgd_bf16"}
        name = "sgd_stochastic" if settings.get("rounding") == "stochastic" else kinds.get(str(kind), "")
        if not name:
            raise ValueError(f"optimizer: master must be split, fp32 or none, got {kind!r}")
        return name
    if path == "torch.optim.SGD":
        return "momentum" if settings.get("momentum") else "sgd"
    known = {rule.class_path: name for name, rule in RULES.items()} | {"torch.optim.Adam": "adamw"}
    if path not in known or (path == "torch.optim.RMSprop" and (settings.get("momentum") or settings.get("centered"))):
        raise ValueError(f"optimizer: the state of {path or 'nothing'} with these settings is not known; use --dry_run")
    return known[path]


LIKE_GRPO = ("GRPO", "RLOO", "ReinforcePP", "DrGRPO", "DAPO", "GSPO", "CISPO", "PPO")
"""Algorithms that hold what GRPO holds: they differ in numbers for each token, and in PPO's value head of H + 1."""


def run_of(
    config: Mapping[str, Any], gpus: int | None = None, prompt_tokens: int | None = None
) -> tuple[Run, list[str]]:
    """The settings of a config of GRPO or its kin, and what had to be assumed.

    Args:
        config: as `read_config` returns it.
        gpus: processes, instead of those of the trainer.
        prompt_tokens: of the longest prompt, instead of `data.max_prompt_tokens`.

    Raises:
        ValueError: it trains by another algorithm, or settings cannot be.
    """
    algorithm = _class(config.get("model"))
    if algorithm.rpartition(".")[2] not in LIKE_GRPO:
        hint = "; fit --dry_run counts its two models" if algorithm.endswith(".PRIME") else ""
        raise ValueError(f"--config: profile describes {', '.join(LIKE_GRPO)}; this is {algorithm or 'nothing'}{hint}")
    model, data = _arguments(config.get("model")), _arguments(config.get("data"))
    trainer = config.get("trainer") or {}
    processes, strategy, remarks = _processes(trainer, gpus)
    batching, sampling = model.get("batching") or {}, model.get("sampling") or {}
    group = _number(model, "group_size", 8, "model.")
    minibatches = _number(batching, "minibatches", 1, "model.batching.")
    tensor = _number(strategy, "tensor", 1, "trainer.strategy.")
    ranks = processes // tensor
    prompts = _number(data, "prompts_per_step", ranks, "data.")
    if prompts % (ranks * minibatches):
        raise ValueError(f"data.prompts_per_step ({prompts}) must be a multiple of minibatches x processes ({ranks})")
    limit = prompt_tokens or _number(data, "max_prompt_tokens", None, "data.")
    if not limit:
        remarks.append(f"nothing limits prompts: {PROMPT_TOKENS} tokens assumed (--prompt-tokens)")
    step = prompts // ranks // minibatches * group
    device = "cpu" if trainer.get("accelerator") == "cpu" else "cuda"
    lora = model.get("lora") or {}
    run = Run(
        optimizer=optimizer_of(model.get("optimizer")),
        **_precision(model, trainer, device),
        **_releasing(model),
        lora_rank=_number(lora, "rank", 1, "model.lora.") if model.get("lora") is not None else 0,
        subnetwork=model.get("subnetwork") is not None,
        activation_checkpointing=bool(model.get("activation_checkpointing")),
        micro_batch=min(_number(batching, "micro_batch", 32, "model.batching."), step),
        rollout_batch=_number(batching, "rollout_batch", 256, "model.batching."),
        step_completions=step,
        minibatches=minibatches,
        group_size=group,
        prompt_tokens=limit or PROMPT_TOKENS,
        max_tokens=_number(sampling, "max_tokens", 64, "model.sampling."),
        temperature=_number(sampling, "temperature", 1.0, "model.sampling."),
        shard=ranks // _number(strategy, "replicate", 1, "trainer.strategy."),
        replicate=_number(strategy, "replicate", 1, "trainer.strategy."),
        tensor=tensor,
        reduce_dtype=strategy.get("reduce_dtype", "float32"),
        rollout=strategy.get("rollout", "once"),
        cpu_offload=bool(strategy.get("cpu_offload")),
        low_on_host=bool(_arguments(model.get("optimizer")).get("low_on_host")),
        device=device,
    )
    return run, remarks


def _processes(trainer: Mapping[str, Any], gpus: int | None) -> tuple[int, Mapping[str, Any], list[str]]:
    """How many there are, the settings of what spreads the model over them, and remarks."""
    block, remarks = trainer.get("strategy"), []
    devices, nodes = trainer.get("devices", 1), _number(trainer, "num_nodes", 1, "trainer.")
    if devices in ("auto", -1) and not gpus:
        remarks.append("trainer.devices: auto is taken as 1 (--gpus)")
    each = devices if type(devices) is int and devices > 0 else 1
    processes = gpus or each * nodes
    if processes > 1 and not _class(block).endswith("Sharded"):
        remarks.append("shared by --trainer.strategy rlvr_lightning.strategy.Sharded, which the config does not set")
    strategy = _arguments(block)
    others = _number(strategy, "replicate", 1, "trainer.strategy.") * _number(
        strategy, "tensor", 1, "trainer.strategy."
    )
    shard = strategy.get("shard", "auto")
    if processes % others or (not gpus and shard != "auto" and shard * others != processes):
        raise ValueError(f"trainer.strategy: shard x replicate x tensor must be the number of processes, {processes}")
    return processes, strategy, remarks


def _precision(model: Mapping[str, Any], trainer: Mapping[str, Any], device: str) -> dict[str, Any]:
    dtype, wanted = model.get("dtype", "float32"), model.get("compute_dtype", "auto")
    autocast = trainer.get("precision") == "bf16-mixed"
    slow_here = device == "cpu" and dtype == "bfloat16"
    computed = wanted if wanted != "auto" else "float32" if slow_here else dtype
    return {"dtype": dtype, "compute_dtype": "bfloat16" if autocast else computed, "autocast": autocast}


def _releasing(model: Mapping[str, Any]) -> dict[str, Any]:
    """Gradient release and the reference."""
    release, kl_coef = model.get("gradient_release"), (model.get("objective") or {}).get("kl_coef", 0.0)
    return {
        "gradient_release": release is not None,
        "two_pass": _arguments(release).get("clip", "two_pass") == "two_pass",
        "reference": model.get("reference", "delta") if kl_coef else "none",
    }
