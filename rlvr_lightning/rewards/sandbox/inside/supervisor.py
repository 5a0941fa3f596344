"""The first process of a run: it limits itself, starts the program in a process of its own, and answers the host.

The host speaks to its standard input and output, which the program never holds. What it must not see (the tests) is
read after it was started, and lies in this process only.
"""

from __future__ import annotations

import os
import resource
import select
import sys
import time
from _signal import SIG_DFL, SIGINT, SIGKILL, signal  # the module signal makes enumerations of all signals
from types import ModuleType

from .checker import check
from .plain import decode, encode, read_frame, write_frame
from .program import serve

TYPE_CHECKING = False  # typing takes longer to import than all the rest
if TYPE_CHECKING:
    from typing import Any

FILES = 64  # open at a time
ERROR_BYTES = 2000  # of what a program says on standard error: its end


def main() -> None:
    """Serve one run; in the program's own process this returns, and the interpreter ends as that of any program."""
    signal(SIGINT, SIG_DFL)  # else the program could interrupt this process
    settings = _received()
    confine(settings)
    write_frame(1, encode("ready"))
    job = _received()
    if job["kind"] == "calls":
        run_calls(job["program"], settings)
    else:
        run_cases(job["program"], settings)


def _received() -> Any:
    frame = read_frame(0)
    if frame is None:
        raise SystemExit("the host is gone")
    return decode(frame)


def confine(settings: dict[str, Any]) -> None:
    """Give up rights and resources, for this process and all that it starts."""
    if settings["uid"] is not None:
        os.setgroups([])
        os.setresgid(*[settings["uid"]] * 3)
        os.setresuid(*[settings["uid"]] * 3)
    limits = {
        resource.RLIMIT_AS: settings["share_bytes"],
        resource.RLIMIT_FSIZE: settings["file_bytes"],
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: FILES,
    }
    if settings["tasks"] is not None:
        limits[resource.RLIMIT_NPROC] = settings["tasks"]
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    cpu_s = settings["cpu_s"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))  # first a signal that says why, then one that kills


def run_calls(source: str, settings: dict[str, Any]) -> None:
    """Load the program in its own process, then run tests here that call it there."""
    requests, to_program = os.pipe()
    from_program, replies = os.pipe()
    child = os.fork()
    if child == 0:
        nothing = os.open(os.devnull, os.O_RDWR)
        _take({0: nothing, 1: nothing, 2: nothing, 3: requests, 4: replies})
        serve(source, 3, 4)
        os._exit(0)
    os.close(requests)
    os.close(replies)
    verdict = check(_received(), to_program, from_program, settings["output_bytes"])
    _end(child, settings)
    write_frame(1, encode(verdict))


def run_cases(source: str, settings: dict[str, Any]) -> None:
    """Run the program on one standard input after another, each time in a process of its own."""
    while (frame := read_frame(0)) is not None:
        given = _input_file(decode(frame))
        out, to_out = os.pipe()
        err, to_err = os.pipe()
        child = os.fork()
        if child == 0:
            _take({0: given, 1: to_out, 2: to_err})
            as_main(source)
            return
        for file in (given, to_out, to_err):
            os.close(file)
        outcome = _watch(child, out, err, settings)
        os.close(out)
        os.close(err)
        write_frame(1, encode(outcome))


def as_main(source: str) -> None:
    """Run a program as the main module."""
    module = ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, ["program.py"]
    exec(compile(source, "program.py", "exec"), module.__dict__)


def _input_file(text: bytes) -> int:
    """A file to read some bytes from, without a name."""
    writing = os.open("input", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    reading = os.open("input", os.O_RDONLY)
    os.unlink("input")
    rest = memoryview(text)
    while rest:
        rest = rest[os.write(writing, rest) :]
    os.close(writing)
    return reading


def _take(files: dict[int, int]) -> None:
    """In the new process: exactly these files, and a group of its own."""
    kept = {to: os.dup2(file, FILES - 1 - to) for to, file in files.items()}  # first out of each other's way
    for to, file in kept.items():
        os.dup2(file, to)
    os.closerange(len(files), 1 << 16)
    os.setpgid(0, 0)


def _watch(child: int, out: int, err: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Collect what a program prints until it ends or prints too much; then end what it left."""
    printed: dict[int, list[bytes]] = {out: [], err: []}
    total = 0
    ended = os.pidfd_open(child)
    poll = select.poll()
    for file in (out, err, ended):
        poll.register(file, select.POLLIN)
    running = True
    while running and total <= settings["output_bytes"]:
        for file, _ in poll.poll():
            if file == ended:
                running = False
            elif part := os.read(file, 1 << 16):
                printed[file].append(part)
                total += len(part)
            else:
                poll.unregister(file)
    os.close(ended)
    status = _end(child, settings)
    for file, parts in printed.items():
        total += _drain(file, parts, settings["output_bytes"] - total)
    more = total > settings["output_bytes"]
    error = b"".join(printed[err])[-ERROR_BYTES:]
    return {"status": status, "out": b"" if more else b"".join(printed[out]), "error": error, "too_much": more}


def _drain(file: int, parts: list[bytes], most: int) -> int:
    """Add what still lies in a pipe, little more than `most` bytes of it."""
    total = 0
    os.set_blocking(file, False)
    try:
        while total <= most and (part := os.read(file, 1 << 16)):
            parts.append(part)
            total += len(part)
    except BlockingIOError:
        pass
    return total


def _end(child: int, settings: dict[str, Any]) -> int:
    """Kill the program's process and all that it started; the exit status, negative for a signal."""
    _kill(child)
    _kill(-child)  # its group: all that is known of what it started, without a sandbox
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    while settings["alone"] and _kill(-1):  # everybody in this process namespace but the first process and this one
        time.sleep(0.001)
    return status


def _kill(target: int) -> bool:
    """Kill whoever a number means to `os.kill`; whether there was somebody."""
    try:
        os.kill(target, SIGKILL)
    except ProcessLookupError:
        return False
    return True
