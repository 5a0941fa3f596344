"""What a run may take."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the run of one program may take; past any of it the program has failed.

    Raises:
        ValueError: a limit is not a positive number.
    """

    cpu_s: int = 5
    """Processor time of a process, and one more if it ignores that. On standard input each case is a process."""
    wall_s: float = 15.0
    """The whole run, all cases of it; on a busy machine it is the one that honest programs meet."""
    memory_mib: int = 2048
    """All processes of the run together: an equal share for each that `processes` allows, and one for the checker."""
    processes: int = 3
    """Processes and threads of the program at a time."""
    tmp_mib: int = 64
    """Its private /tmp, which is memory too, and the longest file."""
    output_mib: int = 4
    """Standard output and error of a case together."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"limits.{name} must be positive, got {value}")

    @property
    def share_bytes(self) -> int:
        """Address space of one process."""
        return (self.memory_mib << 20) // (self.processes + 1)
