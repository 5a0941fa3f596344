"""Asks whether two answers are mathematically equal: math-verify in processes that may hang, die or be lied to."""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Question = tuple[str, ...]
"""`("same", right answer, answer)` or `("parses", text)`; LaTeX without dollar signs."""
GRACE_S = 30.0
"""Longer than a machine under load needs to notice that a time limit has passed."""
_START_LIMIT_S = 120.0  # importing sympy from a cold disk
_KEPT = 1 << 16


def require_math_verify() -> None:
    """Raise ValueError unless the package math-verify is there."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("MathAnswer needs the package math-verify: pip install 'rlvr-lightning[math]'")


def worker_count() -> int:
    """Of the processes on this machine that share its cores, this one's part; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class Verifier:
    """A pool of processes, started when first asked. Works in any thread: its time limits are no signals.

    Args:
        time_limit_s: for one question. It delays no other: the others go on in the other processes, and the one that
            hung is replaced within milliseconds.
        workers: processes; None is one for each core.
    """

    def __init__(self, time_limit_s: float = 5.0, workers: int | None = None) -> None:
        if time_limit_s <= 0:
            raise ValueError(f"time_limit_s must be positive, got {time_limit_s}")
        self.time_limit_s, self.workers = time_limit_s, workers
        self._begin()

    def _begin(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._asked = 0
        self._unread = b""
        self._known: dict[Question, str] = {}
        self._lock = threading.Lock()

    def verdicts(self, questions: Sequence[Question]) -> list[str]:
        """An answer to each question; a question that was answered before is not asked again.

        Returns:
            `true`, `false`, `unparsable`, or `time` or `memory` where a limit was reached.

        Raises:
            RuntimeError: the processes cannot be started.
        """
        with self._lock:
            new = list(dict.fromkeys(question for question in questions if question not in self._known))
            if len(self._known) + len(new) > _KEPT:
                self._known, new = {}, list(dict.fromkeys(questions))
            found = self._ask(new) if new else {}
            self._known |= {question: said for question, said in found.items() if said not in ("time", "memory")}
            return [self._known.get(question) or found[question] for question in questions]

    def same(self, gold: str, answer: str) -> bool:
        """Whether two answers are mathematically equal."""
        return self.verdicts([("same", gold, answer)]) == ["true"]

    def parses(self, text: str) -> bool:
        """Whether an answer can be parsed."""
        return self.verdicts([("parses", text)]) == ["true"]

    def close(self) -> None:
        """End the processes."""
        process, self._process, self._unread = self._process, None, b""
        if process is not None and self._owner == os.getpid():  # a fork must leave its parent's alone
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout) if process is not None else ():
            if pipe is not None:
                pipe.close()

    def _ask(self, questions: Sequence[Question]) -> dict[Question, str]:
        """Ask; if the pool dies, ask the rest once more in a new one, and then call them unparsable."""
        found: dict[Question, str] = {}
        for _ in range(2):
            left = [question for question in questions if question not in found]
            numbers = {self._asked + k: question for k, question in enumerate(left)}
            self._asked += len(left)
            try:
                self._exchange(numbers, found)
            except (BrokenPipeError, TimeoutError):
                self.close()
                continue
            return found
        return dict.fromkeys(questions, "unparsable") | found

    def _exchange(self, numbers: dict[int, Question], found: dict[Question, str]) -> None:
        pool = self._running()
        assert pool.stdin is not None
        batch = [[number, self.time_limit_s, *question] for number, question in numbers.items()]
        pool.stdin.write(json.dumps(batch).encode() + b"\n")
        pool.stdin.flush()
        while numbers:
            number, said = json.loads(self._line(self.time_limit_s + GRACE_S))
            if number not in numbers:  # it speaks of something else
                raise BrokenPipeError
            found[numbers.pop(number)] = said

    def _line(self, limit_s: float) -> bytes:
        """The next line of the pool's output; TimeoutError if the limit passes, BrokenPipeError if it ends."""
        assert self._process is not None and self._process.stdout is not None
        while b"\n" not in self._unread:
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                if not selector.select(limit_s):
                    raise TimeoutError
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise BrokenPipeError
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self.close()
            worker = Path(__file__).with_name("math_worker.py")
            # -P: its folder must not shadow other modules
            command = [sys.executable, "-P", str(worker), str(self.workers or worker_count())]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            # a session of its own: Ctrl-C lets a run finish its step, for which it needs rewards
            self._process = subprocess.Popen(command, start_new_session=True, **pipes)
            self._owner = os.getpid()
            try:
                started = self._line(_START_LIMIT_S) == b"ready"
            except (TimeoutError, BrokenPipeError):
                started = False
            if not started:
                self.close()
                raise RuntimeError(f"the math-verify workers did not start: try {' '.join(command)}")
        return self._process

    def __getstate__(self) -> dict[str, Any]:
        return {"time_limit_s": self.time_limit_s, "workers": self.workers}  # no copy of a process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.time_limit_s, self.workers = state["time_limit_s"], state["workers"]
        self._begin()

    def __del__(self) -> None:
        self.close()
