"""What a resumed run has in common with the run that it goes on with: settings, and every process's random numbers."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from rlvr_lightning.learning_rate import with_warmup

Settings = dict[str, Any]
FIXED = {
    "model_name": "model.model",
    "weights_dtype": "model.dtype",
    "lora": "model.lora",
    "group_size": "model.group_size",
    "seed": "model.seed",
    "value_lr": "model.value_lr",
    "prm_lr": "model.prm_lr",
}
"""Attribute of a module: field of the YAML. A checkpoint's state means nothing under other values."""
FREE = {
    "advantage": "model.advantage",
    "objective": "model.objective",
    "sampling": "model.sampling",
    "handling": "model.handling",
    "max_grad_norm": "model.max_grad_norm",
    "gradient_release": "model.gradient_release",
    "beta": "model.beta",
    "loss": "model.loss",
    "label_smoothing": "model.label_smoothing",
    "margin": "model.margin",
    "weight": "model.weight",
    "good_weight": "model.good_weight",
    "bad_weight": "model.bad_weight",
    "gamma": "model.gamma",
    "lam": "model.lam",
    "value_clip": "model.value_clip",
    "baseline": "model.baseline",
    "overlong_tokens": "model.overlong_tokens",
}
"""The same, of what a run can go on with in another way: that is said, and done."""
SCORING = ("model.rewards", "model.reward_weights", "model.stop")
"""Fields of a module's scorer, likewise free."""
LEARNED = ("prompt_ids", "chosen", "rejected", "completion", "label", "demonstration")
"""Fields of a record that a step depends on."""
NO_MATTER = {"steps", "foreach", "fused", "capturable", "differentiable"}
"""Arguments of optimizers that change no result."""


def settings_of(module: Any) -> Settings:
    """The settings that decide what a module's run computes, by field of the YAML, made of JSON's types."""
    kind = type(module)
    found: Settings = {"model.class_path": f"{kind.__module__}.{kind.__qualname__}"}
    for name, field in (FIXED | FREE).items():
        value = plain(getattr(module, name, None))
        found |= {f"{field}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {field: value}
    if found["model.model"]:
        found["model.model"] = Path(found["model.model"]).name  # the folder may have moved
    if (scorer := getattr(module, "scorer", None)) is not None:
        found |= dict(zip(SCORING, plain([scorer.settings(), scorer.weights, scorer.stop]), strict=True))
    if make := getattr(module, "make_optimizer", None):
        found |= optimizer_settings(make, getattr(module, "make_scheduler", None), getattr(module, "warmup_steps", 0))
    if batching := getattr(module, "batching", None):
        found |= {f"model.batching.{name}": getattr(batching, name) for name in ("minibatches", "passes")}
    return found | data_settings(getattr(module.trainer, "datamodule", None))


def optimizer_settings(make: Callable[..., Any], make_scheduler: Any, warmup_steps: int) -> Settings:
    """Class and arguments of the optimizer and its schedule; they are made once, for a single number."""
    optimizer = make([torch.nn.Parameter(torch.zeros(1))])
    own = {name: getattr(optimizer, name) for name in ("master", "rounding", "seed") if hasattr(optimizer, name)}
    kind = type(optimizer)
    found: Settings = {"model.optimizer": f"{kind.__module__}.{kind.__qualname__}"}
    for name, value in (optimizer.defaults | own).items():
        if name not in NO_MATTER:
            found[f"model.optimizer.{name}"] = plain(value)
    scheduler = with_warmup(optimizer, make_scheduler, warmup_steps)
    found["model.scheduler"] = scheduler and [type(scheduler).__qualname__, plain(scheduler.state_dict())]
    return found


def data_settings(data: Any) -> Settings:
    """What a data module serves; nothing of one that is not ours."""
    loader: Any = data.train_dataloader() if hasattr(data, "prompts_per_step") else None
    if not hasattr(loader, "records"):
        return {}
    learned = json.dumps([[record.get(name) for name in LEARNED] for record in loader.records], default=str).encode()
    return {
        "data.prompts_per_step": data.prompts_per_step,
        "data.seed": data.seed,
        "data.curriculum": plain(data.curriculum),
        "data.train": f"{len(loader.records)} prompts, sha256 {hashlib.sha256(learned).hexdigest()[:12]}",
    }


def plain(value: Any) -> Any:
    """As JSON would have it: dataclasses as dicts, what has no such form left out or as text.

    >>> plain({"a": (1, None), "b": torch.float32, "c": print})
    {'a': [1, None], 'b': 'float32'}
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items() if not callable(part)}
    if isinstance(value, list | tuple | set):
        return [plain(part) for part in value]
    return value if isinstance(value, str | int | float | None) else str(value).removeprefix("torch.")


def check_settings(then: Settings, now: Settings, path: Any) -> None:
    """Compare the settings of a checkpoint with those of the run that is to go on from it.

    Raises:
        ValueError: one differs that cannot; names it.
    """
    free = tuple(f"{field}." for field in (*FREE.values(), *SCORING, "model.batching"))
    changed = [field for field in {**then, **now} if then.get(field) != now.get(field)]
    for field in changed:
        if not f"{field}.".startswith(free):
            raise ValueError(
                f"{field}: {path} was made with {_said(then, field)}, now it is {_said(now, field)}: cannot resume; "
                "set it as then, or start a new run from the checkpoint (see python -m rlvr_lightning export)"
            )
    for field in changed:
        rank_zero_warn(f"{field}: from here on {_said(now, field)}, up to this checkpoint {_said(then, field)}")


def _said(settings: Settings, field: str) -> str:
    return json.dumps(settings[field]) if field in settings else "not there"


def random_state() -> dict[str, Any]:
    """Of all global generators that a reward or a callback may draw from, in types that load without pickled code."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators back to where `random_state` found them."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def between_steps(checkpoint: Mapping[str, Any]) -> bool:
    """Whether it was saved as soon as a batch had ended: before its metrics were logged and what was due validated."""
    counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    return bool(counts["completed"] < counts["processed"])


def row_of(trainer: Trainer) -> dict[str, float]:
    """The metrics of the batch that has just ended, which Lightning logs after callbacks have saved a checkpoint."""
    return {name: float(value) for name, value in trainer._logger_connector.metrics["log"].items()}


def catch_up(trainer: Trainer, row: Mapping[str, float], epoch: Mapping[str, Any]) -> None:
    """Do what the run that saved a checkpoint as soon as a batch had ended would have done next.

    Lightning leaves it out: a killed process may have logged no metrics of that batch, and no validation would follow.

    Args:
        trainer: at the start of training.
        row: metrics of the batch.
        epoch: the trainer's progress in epochs as it was saved; Lightning has closed an epoch that was at its end.
    """
    loop, progress = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress
    closed = progress.state_dict()
    progress.load_state_dict(dict(epoch))
    for logger in trainer.loggers:
        logger.log_metrics({**row, "epoch": trainer.current_epoch}, step=loop._batches_that_stepped)
    if _validates(trainer):
        loop.val_loop.restarting = False
        trainer.validating = True
        loop.val_loop.run()
        trainer.training = True
    progress.load_state_dict(closed)
    if (
        closed["current"]["processed"] == closed["current"]["ready"]
    ):  # Lightning closed the epoch, but does not open the next
        progress.increment_ready()
        progress.increment_started()


def _validates(trainer: Trainer) -> bool:
    """Whether the batch that has just ended is followed by a validation."""
    batches, every = trainer.num_val_batches, trainer.val_check_batch
    if not trainer.enable_validation or not every or not (sum(batches) if isinstance(batches, list) else batches):
        return False
    loop = trainer.fit_loop.epoch_loop
    if trainer.check_val_every_n_epoch is None:
        return (loop.total_batch_idx + 1) % every == 0
    return (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch == 0 and (loop.batch_idx + 1) % every == 0
