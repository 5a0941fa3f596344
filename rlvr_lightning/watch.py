"""What the processes of a run tell each other about their ends, so that none waits for one that is gone.

A process that waits in a collective call for one that died may wait for ever, whoever launched them. So each has a
thread with a connection of its own to the store of torch's default process group, through which it

- counts, to show that it lives, and says when it leaves (`Watch.close`);
- announces an exception at once, in one line (`Watch.failed`);
- misses the others: those of its own machine within seconds, by their pid; those of other machines when they have not
  counted for `SILENT_S`, seen by the first process, which all others look after.

The first such news is the cause. Every other process reads it, says it once for each machine, and ends with status 1.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from signal import Signals
from typing import Any

import torch.distributed as dist

EVERY_S = 1.0
SILENT_S = 40.0
"""Without a sign of life from another machine; a process that computes counts nevertheless."""
GRACE_S = 5.0
"""Before a process is ended from within: it may be about to end by itself, with more to say."""
CONSEQUENCE = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset)|[Bb]roken pipe")
"""What collective calls raise when another process is gone."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """How the first process that failed did so."""

    rank: int
    host: str
    pid: int
    how: str
    """A verb and what follows: "raised ValueError: ..."."""

    def __str__(self) -> str:
        """One line.

        >>> print(Cause(rank=3, host="node1", pid=77, how="was killed by SIGKILL"))
        rank 3 (host node1, pid 77) was killed by SIGKILL
        """
        return f"rank {self.rank} (host {self.host}, pid {self.pid}) {self.how}"


class Watch:
    """One process's side; see the module. Made by `start`.

    Args:
        store: of the process group, with a connection of its own.
        rank: of this process.
        size: number of processes.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.group = dist.group.WORLD
        self.host, self.machine = socket.gethostname(), machine()
        self.cause: Cause | None = None
        self.failing_since_s: float | None = None
        self.children: Mapping[int, subprocess.Popen[Any]] = {}
        self._closed = threading.Event()
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._missed: set[int] = set()
        self._store_is_gone = False
        self._looked_s = time.monotonic()
        self.store.set(f"watch/who/{rank}", json.dumps([self.host, os.getpid()]))
        self.store.set(f"watch/beat/{rank}", "0")
        self.store.append(f"watch/machine/{self.machine}", f"{rank}:{os.getpid()}:{started_at(os.getpid())};")
        self.first = self._who(0) if rank else (self.host, os.getpid())
        self._thread = threading.Thread(target=self._run, daemon=True, name="rlvr-watch")
        self._thread.start()

    # ---- the thread ----

    def _run(self) -> None:
        beat = 0
        while not self._closed.wait(EVERY_S):
            beat += 1
            try:
                self.store.set(f"watch/beat/{self.rank}", str(beat))
                found = self._announced() or self._missing()
                if found:
                    found = self.conclude(found)
            except (RuntimeError, ValueError):
                self._store_is_gone, found = True, self._storeless()
            if found and self._end(found):
                return

    def _missing(self) -> Cause | None:
        """A process that is gone without a word."""
        late = time.monotonic() - self._looked_s > SILENT_S / 4  # this process itself was asleep
        self._looked_s = time.monotonic()
        for rank, pid, started in self._neighbours():
            if alive(pid, started) or self.has_left(rank):
                self._missed.discard(rank)
            elif rank in self._missed or pid in self.children:  # twice: its parent may know how it ended
                return self._cause(rank, how_it_ended(self.children.get(pid)))
            else:
                self._missed.add(rank)
        others = [0] if self.rank else [r for r in range(self.size) if r in self._heard or self._has_begun(r)]
        here = {rank for rank, _, _ in self._neighbours()}  # of those the pid tells all, however busy they are
        others = [rank for rank in others if rank not in here]
        beats = self.store.multi_get([f"watch/beat/{r}" for r in others]) if others else []
        for rank, beat in zip(others, beats, strict=True):
            known, since_s = self._heard.get(rank, (b"", 0.0))
            if late or beat != known:
                self._heard[rank] = (beat, time.monotonic())
            elif beat != b"left" and time.monotonic() - since_s > SILENT_S:
                return self._cause(
                    rank,
                    f"has not answered for {SILENT_S:.0f} s: killed, its machine down, or busy in one call of Python's",
                )
        return None

    def _neighbours(self) -> list[tuple[int, int, str]]:
        """Rank, pid and start of the processes of this machine."""
        text = self.store.get(f"watch/machine/{self.machine}").decode() if self.machine else ""
        entries = [entry.split(":") for entry in text.split(";") if entry]
        return [(int(rank), int(pid), started) for rank, pid, started in entries if int(rank) != self.rank]

    def _storeless(self) -> Cause | None:
        """The store does not answer: it is kept by the first process, or by torchrun beside it."""
        if self._closed.is_set() or not dist.is_initialized():
            return None
        if self._heard.get(0, (b"", 0.0))[0] == b"left":
            return None
        host, pid = self.first
        keeper = "torchrun beside it" if "TORCHELASTIC_RUN_ID" in os.environ else "it"
        return Cause(rank=0, host=host, pid=pid, how=f"does not answer: the store that {keeper} keeps is gone")

    def _end(self, cause: Cause) -> bool:
        """End this process, unless it does so by itself; whether there is no more to do."""
        self.cause = self.cause or cause
        if self._closed.wait(GRACE_S):
            return True
        if self.failing_since_s and time.monotonic() - self.failing_since_s < SILENT_S + 15:
            return False  # the main thread is about to tell
        self.tell()
        for child in self.children.values():
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    # ---- what is said ----

    def _announced(self) -> Cause | None:
        if self.cause is None and self.store.check(["watch/cause"]):
            self.cause = Cause(**json.loads(self.store.get("watch/cause")))
        return self.cause

    def conclude(self, cause: Cause) -> Cause:
        """Announce a cause; returns the one that was announced first."""
        self.store.compare_set("watch/cause", "", json.dumps(asdict(cause)))
        found = self._announced()
        assert found is not None
        return found

    def _cause(self, rank: int, how: str) -> Cause:
        host, pid = self._who(rank)
        return Cause(rank=rank, host=host, pid=pid, how=how)

    def _who(self, rank: int) -> tuple[str, int]:
        host, pid = json.loads(self.store.get(f"watch/who/{rank}"))
        return host, pid

    def _has_begun(self, rank: int) -> bool:
        return bool(self.store.check([f"watch/beat/{rank}"]))

    def has_left(self, rank: int) -> bool:
        """Whether a process has said that it is done."""
        return self.store.get(f"watch/beat/{rank}") == b"left"

    def failed(self, error: BaseException) -> None:
        """The main thread has an exception: announce it, or find out whose end it comes from.

        One with a true attribute `agreed` is raised by all processes alike and is no failure.
        """
        if getattr(error, "agreed", False) or self.failing_since_s:
            return
        self.failing_since_s = time.monotonic()
        deadline_s = self.failing_since_s + patience_s(error)
        while not self.cause and time.monotonic() < deadline_s and self._thread.is_alive():
            time.sleep(0.1)
        if self._store_is_gone:
            self.cause = self.cause or self._storeless()
            return
        try:
            self.store.add(self._key_of(one_line(error)), 1)
            self.conclude(Cause(rank=self.rank, host=self.host, pid=os.getpid(), how=what_happened(error)))
        except (RuntimeError, ValueError):
            self.cause = self.cause or self._storeless()

    def _key_of(self, text: str) -> str:
        return f"watch/same/{hashlib.sha256(text.encode()).hexdigest()}"

    @property
    def is_first(self) -> bool:
        """Whether this process failed before any other."""
        return self.cause is None or self.cause.rank == self.rank

    def on_all(self, error: BaseException) -> bool:
        """Whether all processes raised the same; waits for them a little."""
        deadline_s = time.monotonic() + 2
        try:
            while (same := self.store.add(self._key_of(one_line(error)), 0)) < self.size:
                if time.monotonic() > deadline_s:
                    break
                time.sleep(0.05)
            return same >= self.size
        except (RuntimeError, ValueError):
            return False

    def tell(self, text: str | None = None) -> None:
        """Say the cause, or something better, on stderr, unless another process of this machine has."""
        first = True
        if not self._store_is_gone:
            with suppress(RuntimeError, ValueError):
                first = self.store.add(f"watch/told/{self.machine or self.rank}", 1) == 1
        if first and (text or self.cause):
            print(f"\nerror: {text or f'{self.cause}; this ends the other processes'}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave in peace. The first process waits a little for the others, for it may keep the store."""
        if self._closed.is_set():
            return
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(5 * EVERY_S)  # a thread that ends with the interpreter, in C++, aborts the process
        if self._store_is_gone:
            return
        try:
            self.store.set(f"watch/beat/{self.rank}", "left")
            deadline_s = time.monotonic() + 3 * EVERY_S
            while self.rank == 0 and time.monotonic() < deadline_s:
                if all(beat == b"left" for beat in self.store.multi_get([f"watch/beat/{r}" for r in range(self.size)])):
                    break
                time.sleep(0.05)
        except (RuntimeError, ValueError):
            pass  # the store has left before


_current: Watch | None = None


def current() -> Watch | None:
    """This process's watch, if there is one."""
    return _current


def start(children: Mapping[int, subprocess.Popen[Any]] | None = None) -> Watch | None:
    """Begin to watch, once for a process group; without one of several processes there is nothing to watch.

    Args:
        children: of this process that belong to the group, by pid.
    """
    global _current
    if not dist.is_initialized() or dist.get_world_size() == 1 or dist.get_backend() == "fake":
        return None
    if _current is not None and _current.group is not dist.group.WORLD:
        _current.close()
        _current = None
    if _current is None:
        shared: Any = dist.distributed_c10d._get_default_store()
        store = shared.clone()
        store.set_timeout(timedelta(seconds=SILENT_S))
        _current = Watch(store, dist.get_rank(), dist.get_world_size())
        atexit.register(_current.close)
    _current.children = children or _current.children
    return _current


def watch_children(children: list[subprocess.Popen[Any]]) -> None:
    """End this process and its children when one of them fails before the process group is there to tell of it."""

    def run() -> None:
        while _current is None:
            time.sleep(EVERY_S / 2)
            for rank, child in enumerate(children, start=1):
                if child.poll() and _current is None:
                    how = f"rank {rank} (host {socket.gethostname()}, pid {child.pid}) {how_it_ended(child)}"
                    print(f"\nerror: {how} before it joined the others", file=sys.stderr, flush=True)
                    for other in children:
                        other.kill()
                    os._exit(1)

    threading.Thread(target=run, daemon=True, name="rlvr-children").start()


def patience_s(error: BaseException) -> float:
    """How long an exception waits for news of another process's end, from which it may come.

    >>> patience_s(RuntimeError("[...gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    42.0
    >>> patience_s(ValueError("group_size must be at least 2"))
    0.0
    """
    if not isinstance(error, RuntimeError):
        return 0.0
    if timed_out(error):
        return 3 * EVERY_S  # who is gone would be known
    return SILENT_S + 2 * EVERY_S if isinstance(error, dist.DistError) or CONSEQUENCE.search(str(error)) else 0.0


def timed_out(error: BaseException) -> bool:
    """Whether a collective call gave up waiting."""
    return isinstance(error, RuntimeError) and bool(re.search(r"Timed out|timeout", str(error)))


def what_happened(error: BaseException) -> str:
    """Continues a sentence that begins with the process.

    >>> what_happened(KeyError("a")), what_happened(SystemExit(143)), what_happened(KeyboardInterrupt())
    ("raised KeyError: 'a'", 'was ended by SIGTERM', 'was interrupted')
    """
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        return f"was ended by {Signals(error.code - 128).name}"
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted"
    if timed_out(error):
        return (
            "waited for the others in a collective call that they did not make within trainer.strategy.timeout_s "
            f"(TORCH_DISTRIBUTED_DEBUG=DETAIL names the calls): {one_line(error)}"
        )
    return f"raised {one_line(error)}"


def one_line(error: BaseException) -> str:
    """An exception's class and the first line of its text.

    >>> one_line(KeyError("a"))
    "KeyError: 'a'"
    """
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def how_it_ended(child: subprocess.Popen[Any] | None) -> str:
    """How a process ended that gave no notice."""
    code = child.poll() if child is not None else None
    if code is None:
        return "is gone without a word: killed, perhaps for want of memory (`dmesg` tells), or crashed"
    if code >= 0:
        return f"ended with status {code}"
    memory = ", perhaps for want of memory (`dmesg` tells)" if code == -9 else ""
    return f"was killed by {Signals(-code).name}{memory}"


def machine() -> str:
    """What processes have in common that see each other's pids; empty where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started_at(pid: int) -> str:
    """When a process started, as the kernel counts; empty if it is gone."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] not in "ZX" else ""


def alive(pid: int, started: str) -> bool:
    """Whether the process that had a pid still runs.

    >>> alive(os.getpid(), started_at(os.getpid())), alive(os.getpid(), "1")
    (True, False)
    """
    return started_at(pid) == started


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
