"""The processes in which math-verify runs: mathematics from a language model can loop for ever or eat all memory.

Run as a file, not imported: it loads neither torch nor this package. One process imports math-verify, prints "ready"
and forks workers, each of which is asked one question at a time; one that takes too long is killed and replaced by a
fork, which takes milliseconds, and only its own question is lost. Standard input brings batches, a JSON list of
`[number, limit_s, verb, text...]` a line, where the verb is `parses` (one text) or `same` (right answer, answer);
standard output brings `[number, verdict]` a line for each question, in the order in which they are settled.

Of the `VERDICTS` only `true` says that anything is right.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from selectors import EVENT_READ, DefaultSelector
from typing import Any, TextIO

VERDICTS = ("true", "false", "unparsable", "time", "memory")
MEMORY_BYTES = 1 << 30  # of a worker, beyond what it was born with
WARM_UP = (r"\frac{1}{2}", r"\sqrt{2}x^2+3", r"(1, 2)", r"\{1, 2\}", r"10\text{ cm}", r"5\%")  # fills parsers' caches


def verdict(verb: str, *texts: str) -> str:
    """The answer to one question; raises whatever sympy raises."""
    if verb == "parses":
        return "true" if parsed(texts[0]) else "unparsable"
    from math_verify import verify

    gold, answer = (parsed(text) for text in texts)
    if not gold or not answer:
        return "unparsable"
    return "true" if verify(gold, answer, timeout_seconds=None) else "false"


@lru_cache(maxsize=4096)
def parsed(text: str) -> list[Any]:
    """The whole text as LaTeX; empty if it is none. A part of it that happens to read as a number is not looked for."""
    from math_verify import LatexExtractionConfig, parse

    # No time limit inside: theirs is a signal, ours is the process that forked this one.
    return parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)


def serve_questions(connection: socket.socket) -> None:
    """A worker: answer lines until there are no more. What cannot be compared is not shown to be right."""
    limit_memory()
    lines = connection.makefile("rw", encoding="utf-8")
    for line in lines:
        broken = False
        try:
            said = verdict(*json.loads(line))
        except MemoryError:
            said, broken = "memory", True
        except Exception:  # sympy raises nearly anything
            said = "unparsable"
        lines.write(said + "\n")
        lines.flush()
        if broken:
            return


def limit_memory() -> None:
    """Cap this process's address space, and end with the parent, where the system can."""
    try:
        import ctypes
        import resource

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        with open("/proc/self/statm") as statm:
            held = int(statm.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError, AttributeError):
        return
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))


class Worker:
    """A fork, and the question that it is at."""

    def __init__(self, inherited: list[socket.socket]) -> None:
        self.socket, theirs = socket.socketpair()
        self.question: list[Any] | None = None
        self.deadline = 0.0
        self.pid = os.fork()
        if self.pid == 0:
            for other in (self.socket, *inherited):
                other.close()
            os.close(0)
            try:
                serve_questions(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def ask(self, question: list[Any]) -> None:
        """Give it something to do."""
        self.question, self.deadline = question, time.monotonic() + question[1]
        self.socket.sendall(json.dumps(question[2:]).encode() + b"\n")

    def end(self) -> None:
        """Whatever it is doing."""
        self.socket.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Pool:
    """Some workers and the questions that wait for them."""

    def __init__(self, count: int, answers: TextIO) -> None:
        self.answers = answers
        self.waiting: deque[list[Any]] = deque()
        self.retried: set[int] = set()
        self.selector = DefaultSelector()
        self.workers: list[Worker] = []
        for _ in range(count):
            self._hire()

    def _hire(self) -> None:
        worker = Worker([other.socket for other in self.workers])
        self.workers.append(worker)
        self.selector.register(worker.socket, EVENT_READ, worker)

    def _replace(self, worker: Worker) -> None:
        self.selector.unregister(worker.socket)
        self.workers.remove(worker)
        worker.end()
        self._hire()

    def _ask(self, worker: Worker, question: list[Any]) -> None:
        try:
            worker.ask(question)
        except OSError:  # killed while it had nothing to do
            worker.question = None
            self._replace(worker)
        else:
            self.waiting.popleft()

    def _settle(self, worker: Worker, said: str) -> None:
        assert worker.question is not None
        self.answers.write(json.dumps([worker.question[0], said]) + "\n")
        worker.question = None

    def _hear(self, worker: Worker) -> None:
        """Of a worker that says something or has died."""
        try:
            line = worker.socket.recv(64).decode(errors="replace").strip()
        except OSError:
            line = ""
        question = worker.question
        if not line and question is not None and question[0] not in self.retried:
            self.retried.add(question[0])  # it may have been dead before it was asked
            self.waiting.appendleft(question)
        elif question is not None:
            # twice without a word: killed by the system, or by what it computed
            self._settle(worker, line if line in VERDICTS else "memory")
        if line in ("", "memory"):
            self._replace(worker)

    def step(self, on_input: Callable[[], bool]) -> bool:
        """Hand out questions and wait for the next thing to happen; False when the input has ended."""
        for worker in list(self.workers):
            if worker.question is None and self.waiting:
                self._ask(worker, self.waiting[0])
        busy = [worker.deadline for worker in self.workers if worker.question is not None]
        pause = max(0.0, min(busy) - time.monotonic()) if busy else None
        for key, _ in self.selector.select(pause):
            if isinstance(key.data, Worker):
                self._hear(key.data)
            elif not on_input():
                return False
        now = time.monotonic()
        for worker in list(self.workers):
            if worker.question is not None and now >= worker.deadline:
                self._settle(worker, "time")
                self._replace(worker)
        self.answers.flush()
        return True


def main(argv: list[str]) -> None:
    """Serve standard input until it ends, by as many workers as the first argument says."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints must not be taken for an answer
    for text in WARM_UP:
        verdict("same", text, text)
    pool = Pool(int(argv[0]), answers)
    pool.selector.register(0, EVENT_READ)
    unread = b""

    def on_input() -> bool:
        nonlocal unread
        piece = os.read(0, 1 << 16)
        *lines, unread = (unread + piece).split(b"\n")
        for line in lines:
            pool.waiting.extend(json.loads(line))
        return bool(piece)

    print("ready", file=answers, flush=True)
    while pool.step(on_input):
        pass
    for worker in pool.workers:
        worker.end()


if __name__ == "__main__":
    main(sys.argv[1:])
