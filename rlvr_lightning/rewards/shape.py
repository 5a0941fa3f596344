"""Rewards for how a completion is written, beside what it says: format and length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.math_text import last_boxed
from rlvr_lightning.schema import Sample

Form = Literal["think_answer", "think", "boxed"]
THINK_ANSWER = re.compile(r"\s*<think>(.+?)</think>\s*<answer>(.+?)</answer>\s*", re.DOTALL)
THINK = re.compile(r"\s*<think>(.+?)</think>\s*\S.*", re.DOTALL)


class Format(Reward):
    r"""1 if the completion has a form, else 0; a truncated one has none.

    Args:
        form: `think_answer`, "<think>...</think> <answer>...</answer>" and nothing else; `think`, a thought and then
            something; `boxed`, exactly one \boxed{}, not empty.
        opened: the prompt ends with "<think>" already, so the completion goes on after it.

    Example:
        >>> sample = lambda text: Sample(prompt="", text=text, token_ids=[], record={})
        >>> Format("think_answer")([sample("<think>1+1</think><answer>2</answer>"), sample("<answer>2</answer>")])
        [1.0, 0.0]
        >>> Format("boxed")([sample(r"\boxed{2}"), sample(r"\boxed{2} or \boxed{3}")])
        [1.0, 0.0]
    """

    def __init__(self, form: Form = "think_answer", opened: bool = False) -> None:
        if form not in ("think_answer", "think", "boxed"):
            raise ValueError(f"form must be think_answer, think or boxed, got {form!r}")
        self.form, self.opened = form, opened

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """1.0 or 0.0 for each sample."""
        return [float(not sample.truncated and self._has(sample.text)) for sample in samples]

    def _has(self, text: str) -> bool:
        if self.form == "boxed":
            return text.count("\\boxed") == 1 and last_boxed(text) is not None
        text = f"<think>{text}" if self.opened else text
        once = ("<think>", "</think>") + (("<answer>", "</answer>") if self.form == "think_answer" else ())
        pattern = THINK_ANSWER if self.form == "think_answer" else THINK
        return all(text.count(tag) == 1 for tag in once) and pattern.fullmatch(text) is not None


class LengthPenalty(Reward):
    """0 for completions that leave room, falling to -1 as they fill the last of it: DAPO (arXiv 2503.14476), eq. 13.

    Add it to a verifier; the length is counted in tokens.

    Args:
        max_tokens: at this length and beyond it is -1; give the same as `sampling.max_tokens`.
        buffer_tokens: the penalty begins so many tokens before.

    Raises:
        ValueError: the buffer is not shorter than the whole.

    Example:
        >>> sample = lambda tokens: Sample(prompt="", text="", token_ids=[0] * tokens, record={})
        >>> LengthPenalty(max_tokens=10, buffer_tokens=4)([sample(n) for n in (3, 6, 7, 9, 10, 12)])
        [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]
    """

    def __init__(self, max_tokens: int, buffer_tokens: int) -> None:
        if not 0 < buffer_tokens < max_tokens:
            raise ValueError(f"buffer_tokens must lie between 0 and max_tokens={max_tokens}, got {buffer_tokens}")
        self.max_tokens, self.buffer_tokens = max_tokens, buffer_tokens

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """From -1.0 to 0.0 for each sample."""
        free = self.max_tokens - self.buffer_tokens
        return [-min(1.0, max(0.0, (len(s.token_ids) - free) / self.buffer_tokens)) + 0.0 for s in samples]
