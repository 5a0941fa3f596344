r"""Answers in \boxed{}, compared by the package math-verify in a process of its own, under a time limit."""

from __future__ import annotations

import importlib.util
import json
import selectors
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.schema import Sample

BOX = "\\boxed"
MAX_CHARS = 400  # of an answer; longer ones are wrong. Most golds are under 40
UNFINISHED = ("\\sum", "\\prod", "\\int", "\\lim")
_START_LIMIT_S = 120.0  # importing sympy from a cold disk


class MathAnswer(Reward):
    r"""1 if the last \boxed{...} of the completion equals the right answer mathematically, else 0.

    The right answer is the record's `field`, or the last \boxed{} in it where the field is a worked solution. Only the
    last box counts: naming many answers earns nothing. An answer that is missing, unbalanced, too long, cannot be
    parsed or takes too long to compare is wrong, never right.

    Args:
        field: key of the right answer in the data record.
        time_limit_s: for one comparison; then the worker process is replaced and the answer is wrong.

    Raises:
        ValueError: the package math-verify is missing, or (on scoring) the right answer itself cannot be parsed.
    """

    def __init__(self, field: str = "answer", time_limit_s: float = 5.0) -> None:
        if time_limit_s <= 0:
            raise ValueError(f"time_limit_s must be positive, got {time_limit_s}")
        require_math_verify()
        self.field = field
        self.verifier = Verifier(time_limit_s)

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """1.0 or 0.0 for each sample; ValueError if a record's answer cannot be parsed, KeyError if it has none."""
        return [float(self._right(sample)) for sample in samples]

    def _right(self, sample: Sample) -> bool:
        gold = gold_text(str(sample.record[self.field]))
        if gold is None or not self.verifier.parses(gold):
            raise ValueError(f"{self.field}: {sample.record[self.field]!r:.80} cannot be parsed; see gold_parses")
        answer = last_boxed(sample.text)
        return answer is not None and self.verifier.same(gold, answer)


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} holds, braces balanced; None if there is none, or it is empty, open or too long.

    Example:
        >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}")
        '\\frac{1}{2}'
        >>> last_boxed(r"\boxed{1} and \boxed{2") is None
        True
    """
    start = text.rfind(BOX)
    if start < 0:
        return None
    body = text[start + len(BOX) :].lstrip()
    if not body.startswith("{"):
        return None
    depth = 0
    for at, char in enumerate(body[: MAX_CHARS + 2]):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return body[1:at].strip() or None
    return None


def gold_text(gold: str) -> str | None:
    r"""The answer in a gold text: the content of its last \boxed{}, else the text itself without dollar signs."""
    if BOX in gold:
        return last_boxed(gold)
    text = gold.strip().strip("$").strip()
    return text if 0 < len(text) <= MAX_CHARS else None


def gold_parses(gold: str, verifier: Verifier) -> bool:
    """Whether a right answer can be parsed, and so compared with at all."""
    text = gold_text(gold)
    return text is not None and verifier.parses(text)


def require_math_verify() -> None:
    """Raise ValueError unless the package math-verify is there."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("MathAnswer needs the package math-verify: pip install 'rlvr-lightning[math]'")


class Verifier:
    """One worker process, started when first asked and replaced when it hangs or dies.

    Args:
        time_limit_s: for one question; a question that takes longer is answered False.
    """

    def __init__(self, time_limit_s: float = 5.0) -> None:
        self.time_limit_s = time_limit_s
        self._process: subprocess.Popen[str] | None = None
        self._asked = 0
        self._golds: dict[str, bool] = {}

    def same(self, gold: str, answer: str) -> bool:
        """Whether two answers (LaTeX, without dollar signs) are mathematically equal."""
        return _worth_asking(gold, answer) and self._ask("same", gold, answer)

    def parses(self, text: str) -> bool:
        """Whether an answer can be parsed; remembered, because the golds of a data set come back every epoch."""
        if text not in self._golds:
            self._golds[text] = self._ask("parses", text)
        return self._golds[text]

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _ask(self, *question: str) -> bool:
        process = self._running()
        assert process.stdin is not None
        self._asked += 1
        try:
            process.stdin.write(json.dumps([self._asked, *question]) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            self.close()
            return False
        number, _, verdict = _line(process, self.time_limit_s).strip().partition(" ")
        if number != str(self._asked):  # it hangs, died, or speaks of something else
            self.close()
            return False
        return verdict == "true"

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            worker = Path(__file__).with_name("math_worker.py")
            command = [sys.executable, "-P", str(worker)]  # -P: its folder must not shadow other modules
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, text=True, encoding="utf-8", **pipes)
            if _line(self._process, _START_LIMIT_S).strip() != "ready":
                self.close()
                raise RuntimeError(f"the math-verify worker did not start: try {' '.join(command)}")
        return self._process

    def __getstate__(self) -> dict[str, Any]:
        return {"time_limit_s": self.time_limit_s, "_process": None, "_asked": 0, "_golds": {}}  # no copy of a process

    def __del__(self) -> None:
        self.close()


def _worth_asking(gold: str, answer: str) -> bool:
    """Whether an answer is one finished expression.

    A dollar sign would end it and start another, of which math-verify accepts any; and a sum or integral left standing
    is a question, costly to evaluate, unless the right answer has it too.
    """
    return "$" not in answer and not any(sign in answer and sign not in gold for sign in UNFINISHED)


def _line(process: subprocess.Popen[str], limit_s: float) -> str:
    """The next line of a process's output; empty if it ended or the limit passed."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        ready = selector.select(limit_s)
    return process.stdout.readline() if ready else ""
