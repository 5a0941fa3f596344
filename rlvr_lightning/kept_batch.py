"""A batch of rollouts on disk, with all that its loss is made of: kept when it cannot be learned from.

A folder has two files for each rank: `rankN.safetensors` with the tensors, `rankN.json` with settings and texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlvr_lightning.experience import Experience
from rlvr_lightning.schema import Rollouts

TENSORS = ("completion_ids", "completion_mask", "rollout_logprobs", "truncated")
OPTIONAL = ("ref_logprobs", "old_logprobs", "old_values", "returns")


def about_batch(module: Any) -> dict[str, Any]:
    """What a GRPO module has to say of its batch: settings that the loss depends on, and one record a completion."""
    return {
        "model": module.model_name,
        "lora": asdict(module.lora) if module.lora else None,
        "dtype": str(module.weights_dtype).removeprefix("torch."),
        "compute_dtype": module.compute_dtype,
        "objective": asdict(module.objective),
        "temperature": module.sampling.temperature,
        "max_tokens": module.sampling.max_tokens,
        "rollout_step": module.rollout_step,
        "samples": module.last_samples,
    }


def save_batch(folder: Path, rank: int, experience: Experience, about: Mapping[str, Any]) -> None:
    """Write one rank's part.

    Args:
        folder: made if it is not there.
        rank: names the files.
        experience: of R completions.
        about: JSON, numbers that are not finite as texts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts = experience.rollouts.prompt_ids
    tensors = {name: getattr(experience.rollouts, name) for name in TENSORS}
    tensors |= {"advantages": experience.advantages, "mask": experience.mask}
    tensors |= {name: value for name in OPTIONAL if (value := getattr(experience, name)) is not None}
    tensors["prompt_lengths"] = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long)
    tensors["prompt_ids"] = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.long)
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, _tensors(folder, rank))
    text = json.dumps(json.loads(json.dumps(dict(about)), parse_constant=str), indent=1, allow_nan=False)
    (folder / f"rank{rank}.json").write_text(text + "\n", encoding="utf-8")


def load_batch(folder: Path) -> list[tuple[Experience, dict[str, Any]]]:
    """What `save_batch` wrote, rank by rank.

    Raises:
        ValueError: there is nothing of the kind, or it is damaged.
    """
    count = len(list(folder.glob("rank*.json")))
    if not count:
        raise ValueError(f"{folder} has no rank0.json; give the folder that a stopped run named")
    return [_load(folder, rank) for rank in range(count)]


def _load(folder: Path, rank: int) -> tuple[Experience, dict[str, Any]]:
    try:
        tensors = load_file(_tensors(folder, rank))
        about = json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8"))
        prompts = tensors["prompt_ids"].split(tensors["prompt_lengths"].tolist())
        rollouts = Rollouts(prompt_ids=[p.tolist() for p in prompts], **{name: tensors[name] for name in TENSORS})
        experience = Experience(
            rollouts=rollouts,
            advantages=tensors["advantages"],
            mask=tensors["mask"],
            **{name: tensors.get(name) for name in OPTIONAL},
        )
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: the part of rank {rank} cannot be read: {error}") from error
    return experience, about


def _tensors(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.safetensors"
