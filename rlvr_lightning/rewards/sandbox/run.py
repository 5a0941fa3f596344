"""One run of a program: the host's side, which trusts nothing it hears."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rlvr_lightning.rewards.sandbox import bubblewrap
from rlvr_lightning.rewards.sandbox.inside.plain import decode, encode, frame_size, framed
from rlvr_lightning.rewards.sandbox.limits import Limits

_START_LIMIT_S = 60.0  # a disk that sleeps, a machine with too much to do
_END_LIMIT_S = 10.0
_INFO_LIMIT_S = 1.0  # bubblewrap writes it before anything of ours runs
_ANSWER_BYTES = 1 << 16  # above the output that it holds


GONE = "the run has ended: a process of the sandbox was killed, or exceeded a limit"


class RunEnded(Exception):
    """The run is over: time is up, or the supervisor has gone."""


class Run:
    """A program in a sandbox, as a context: when it is left, no process and no file of the run is there any more.

    Args:
        program: Python text.
        kind: "cases" to run it on standard inputs, "calls" to call its functions.
        limits: what it may take.
        bwrap: path of bubblewrap; None for the weak sandbox.

    Raises:
        RuntimeError: (on entering) the sandbox did not start.
    """

    def __init__(self, program: str, kind: str, limits: Limits, bwrap: str | None) -> None:
        self.program, self.kind, self.limits, self.bwrap = program, kind, limits, bwrap

    def __enter__(self) -> Run:
        self._folder = tempfile.mkdtemp(prefix="rlvr_run_") if self.bwrap is None else None
        self._info: int | None = None
        self._first: int | None = None
        self._deadline = time.monotonic() + _START_LIMIT_S
        try:
            self._process = self._started()
            assert self._process.stdin is not None and self._process.stdout is not None
            self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
            os.set_blocking(self._to, False)
            os.set_blocking(self._from, False)
            self._begin()
        except BaseException:
            self._clean_up()
            raise
        return self

    def _started(self) -> subprocess.Popen[bytes]:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        if self.bwrap is None:
            command = bubblewrap.python(str(bubblewrap.FOLDER))
            return subprocess.Popen(command, cwd=self._folder, env={}, start_new_session=True, bufsize=0, **pipes)
        filter_file = bubblewrap.filter_pipe()
        self._info, info_writing = os.pipe()
        os.set_blocking(self._info, False)
        files = (filter_file, info_writing)
        try:
            command = bubblewrap.sandboxed(self.bwrap, self.limits, *files)
            return subprocess.Popen(command, env={}, pass_fds=files, bufsize=0, **pipes)
        finally:
            for file in files:
                os.close(file)

    def _begin(self) -> None:
        try:
            self.send(self._settings())
            if self.receive() != "ready":
                raise RunEnded("it speaks of something else")
            self._find_first()
            self._deadline = time.monotonic() + self.limits.wall_s
            self.send({"kind": self.kind, "program": self.program})
        except RunEnded as error:
            raise RuntimeError(f"the sandbox did not start: {self._complaint() or error}") from None

    def _settings(self) -> dict[str, Any]:
        who = bubblewrap.identity()
        alone = self.bwrap is not None
        megabytes = {"file_bytes": self.limits.tmp_mib << 20, "output_bytes": self.limits.output_mib << 20}
        counted = {"tasks": self.limits.processes + who.own_tasks if alone else None}
        mine = {"share_bytes": self.limits.share_bytes, "cpu_s": self.limits.cpu_s}
        return {"alone": alone, "uid": who.uid if alone else None, **megabytes, **counted, **mine}

    def _complaint(self) -> str:
        """The last line on the sandbox's own standard error."""
        assert self._process.stderr is not None
        self._kill()
        os.set_blocking(self._process.stderr.fileno(), False)  # whoever still holds it has nothing to say
        lines = (self._process.stderr.read() or b"").decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""

    def send(self, value: Any) -> None:
        """Send the supervisor a value; RunEnded if it does not take it in time."""
        rest = memoryview(framed(encode(value)))
        while rest:
            self._wait(self._to, select.POLLOUT)
            try:
                rest = rest[os.write(self._to, rest) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise RunEnded(GONE) from None

    def receive(self) -> Any:
        """The supervisor's next value; RunEnded if there is none in time, or it is none."""
        size = frame_size(self._exactly(4))
        if size > (self.limits.output_mib << 20) + _ANSWER_BYTES:
            raise RunEnded("the answer is too long")
        try:
            return decode(self._exactly(size))
        except ValueError as error:
            raise RunEnded(str(error)) from None

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            self._wait(self._from, select.POLLIN)
            part = os.read(self._from, size - len(parts))
            if not part:
                raise RunEnded(GONE)
            parts += part
        return bytes(parts)

    def _wait(self, file: int, event: int) -> None:
        poll = select.poll()
        poll.register(file, event)
        left_s = self._deadline - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise RunEnded(f"it took longer than {self.limits.wall_s:g} s")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._clean_up()

    def _clean_up(self) -> None:
        if hasattr(self, "_process"):
            self._kill()
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
                if pipe is not None:
                    pipe.close()
        if self._info is not None:
            os.close(self._info)
            self._info = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _kill(self) -> None:
        """End the run: when this returns, nothing of it is left.

        What is killed is the first process of the sandbox: the kernel lets it end after all others. Bubblewrap itself
        may end before.
        """
        if self.bwrap is None:
            _kill_session(self._process.pid)
        else:
            self._find_first()
        if self._first is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._first, signal.SIGKILL)
            select.select([self._first], [], [], _END_LIMIT_S)
            os.close(self._first)
            self._first = None
        self._process.kill()
        self._process.wait()

    def _find_first(self) -> None:
        """Take hold of the sandbox's first process, if bubblewrap has come so far as to make it."""
        if self._info is None:
            return
        select.select([self._info], [], [], _INFO_LIMIT_S)
        try:
            process = int(json.loads(os.read(self._info, 1 << 12))["child-pid"])
            first = os.pidfd_open(process)
        except (BlockingIOError, ValueError, KeyError, ProcessLookupError):
            return
        finally:
            os.close(self._info)
            self._info = None
        if _status(process, PARENT) == self._process.pid:
            self._first = first
        else:  # it has ended, and another has its number
            os.close(first)


PARENT, SESSION = 1, 3  # fields of /proc/PID/stat, counted from that after the name


def _status(process: int, field: int) -> int | None:
    """A number the kernel tells of a process; None if there is no such process."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[field])
    except OSError:
        return None


def _kill_session(leader: int) -> None:
    """Kill the processes of a session, but for those that have left it."""
    for process in [int(path.name) for path in Path("/proc").glob("[0-9]*")]:
        if _status(process, SESSION) == leader:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
