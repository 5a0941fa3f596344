"""What the model writes: a table on the console now and then, and all samples of those steps in a file."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rlvr_lightning.callbacks.run_files import append_line, run_folder

LONGEST = 400
"""Characters of a prompt or completion on the console; the file has them all."""


def printable(text: str, longest: int = LONGEST) -> str:
    r"""Text that cannot steer a terminal: control, format and other unprintable characters become escapes.

    Long text loses its middle.

    >>> printable("2 + 2 =\n4\x1b[2J")
    '2 + 2 =\\n4\\x1b[2J'
    """
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} [...] {text[-half:]}"
    return "".join(c if unicodedata.category(c)[0] not in "CZ" or c == " " else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def plain(value: Any) -> Any:
    """A value that strict JSON can hold: tensors become numbers or lists, NaN and infinities None, the rest text.

    >>> from pathlib import Path
    >>> plain({"reward": float("nan"), "parts": {"answer": 1}, "task": Path("x")})
    {'reward': None, 'parts': {'answer': 1}, 'task': 'x'}
    """
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _number(value: Any) -> str:
    value = value.item() if isinstance(value, Tensor) else value
    return f"{value:.3g}" if isinstance(value, int | float) else printable(str(value), 20)


def render(samples: Sequence[Mapping[str, Any]], title: str, width: int = 100, color: bool = False) -> str:
    """A table of samples as text, `width` columns wide.

    Args:
        samples: mappings with `prompt`, `completion`, `reward`, and if there are `parts`, `advantage`, `truncated`.
        title: one line above the table.
        width: columns of the console.
        color: with ANSI codes for bold and colours.
    """
    table = Table(title=Text(title), box=box.ASCII2, show_lines=True, title_justify="left")
    table.add_column("prompt", ratio=3, overflow="fold")
    table.add_column("completion", ratio=5, overflow="fold")
    table.add_column("reward", justify="right")
    table.add_column("parts")
    table.add_column("advantage", justify="right")
    for sample in samples:
        prompt = Text(printable(str(sample.get("prompt", ""))))
        cut = " [cut at the limit]" if sample.get("truncated") else ""
        completion = Text(printable(str(sample.get("completion", "")))).append(cut, style="yellow")
        parts = "\n".join(f"{printable(str(k), 20)} {_number(v)}" for k, v in (sample.get("parts") or {}).items())
        reward, advantage = (_number(sample.get(key, "")) for key in ("reward", "advantage"))
        # Text objects, not strings: rich would read markup in them
        table.add_row(prompt, completion, Text(reward, style="bold"), Text(parts), Text(advantage))
    console = Console(file=StringIO(), width=width, force_terminal=color, color_system="standard" if color else None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _of_all_ranks(trainer: Trainer, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On the first rank the samples of all, on the others none; every rank must call, also without samples."""
    if trainer.world_size == 1:
        return samples
    mine = [{"rank": trainer.global_rank} | sample for sample in samples]
    parts: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(mine, parts)  # texts and numbers only, made so by `plain`
    return [sample for part in parts or [] for sample in part]


class CompletionTable(Callback):
    """Shows sample completions with their rewards, and keeps them in `completions.jsonl` in the run folder.

    Logs no metric. Needs of the module only an attribute `last_samples` after each training step: a list of dicts with
    `prompt`, `completion`, `reward`, and if there are `step`, `parts` (dict), `advantage`, `truncated`; anything else
    in them goes to the file. Without the attribute it does nothing. What the model wrote is printed with control
    characters escaped. Of several processes the first prints and writes the samples of all, each with its `rank`; so
    all must run this callback.

    Args:
        every_n_steps: the first batch, then each so many batches.
        num: rows of the table; 0 prints none. The file gets all samples of the batch.
    """

    def __init__(self, every_n_steps: int = 20, num: int = 4) -> None:
        if every_n_steps < 1:
            raise ValueError(f"CompletionTable.every_n_steps must be at least 1, got {every_n_steps}")
        if num < 0:
            raise ValueError(f"CompletionTable.num must be 0 (no table) or more, got {num}")
        self.every_n_steps, self.num = every_n_steps, num

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn where the file goes."""
        self._path = run_folder(trainer) / "completions.jsonl"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show and keep this batch's samples, every N batches."""
        if batch_idx % self.every_n_steps:
            return
        samples = getattr(pl_module, "last_samples", None) or []
        samples = _of_all_ranks(trainer, [plain({"step": trainer.global_step} | dict(sample)) for sample in samples])
        for sample in samples:
            append_line(self._path, sample)
        if self.num and samples:
            self._show(trainer, samples)

    def _show(self, trainer: Trainer, samples: Sequence[Mapping[str, Any]]) -> None:
        stride = max(len(samples) // self.num, 1)  # spread over the batch, to show more than one prompt's group
        console = Console()
        where = f" of {trainer.world_size} processes" if trainer.world_size > 1 else ""
        title = f"{min(self.num, len(samples))} of {len(samples)} completions{where}, step {trainer.global_step}"
        text = render(samples[::stride][: self.num], title, console.width, console.is_terminal)
        bar = trainer.progress_bar_callback
        if bar is None:
            print(text, flush=True)
        else:
            bar.print(text)
