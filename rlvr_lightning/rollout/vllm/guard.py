"""Runs a command for as long as the process that started this one is there, and leaves nothing behind.

vLLM's engine processes outlive a trainer that is killed, and ignore SIGTERM. This process leads a group of its own,
starts the command in it, and when its standard input ends, because whoever held the other end is gone, or the command
has ended, it kills the group. Run as a file: it imports nothing of this package.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> None:
    """Start the command; never returns."""
    if os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def wait() -> None:
        child.wait()
        end()

    def end() -> None:
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
    while os.read(0, 4096):
        pass
    end()


if __name__ == "__main__":
    main(sys.argv[1:])
