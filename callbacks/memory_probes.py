"""Ways to read how much memory a process holds, and its peak since a reset; and the bookkeeping of peaks by phase."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Protocol

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class MemoryProbe(Protocol):
    """Reads memory; `method` says how, for the record."""

    method: str

    def reset(self) -> None:
        """Start a new peak at what is held now."""

    def peak_bytes(self) -> int:
        """The most that was held since the last reset."""

    def total_bytes(self) -> int:
        """All the memory there is."""


class CudaProbe:
    """Memory that torch's caching allocator has handed out on one CUDA device."""

    method = "torch.cuda.max_memory_allocated, reset at each phase"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        """Start a new peak; this resets the process-wide peak counters of torch.cuda."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """Peak of allocated bytes since the reset."""
        return torch.cuda.max_memory_allocated(self.device)

    def total_bytes(self) -> int:
        """Memory of the device."""
        return torch.cuda.mem_get_info(self.device)[1]


class ResidentProbe:
    """Resident memory of this process on Linux: VmHWM, the kernel's own high-water mark, which can be reset."""

    method = "resident memory: VmHWM of /proc/self/status, reset at each phase"

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._status, self._clear, self._meminfo = proc / "self/status", proc / "self/clear_refs", proc / "meminfo"

    def reset(self) -> None:
        """Ask the kernel to set the high-water mark to what is resident now.

        Raises:
            OSError: the kernel or the container does not allow it.
        """
        with open(self._clear, "w") as file:
            file.write("5")

    def peak_bytes(self) -> int:
        """Peak of resident bytes since the reset."""
        return kib_field(self._status, "VmHWM:")

    def total_bytes(self) -> int:
        """Memory of the machine."""
        return kib_field(self._meminfo, "MemTotal:")


class LifetimeProbe:
    """The peak since the process began, where a peak cannot be reset (macOS, some containers).

    A later phase then shows at least the peak of an earlier one.
    """

    method = "resident memory: ru_maxrss, never reset: a phase shows the highest peak up to its end"

    def reset(self) -> None:
        """Nothing can be reset."""

    def peak_bytes(self) -> int:
        """Peak of resident bytes since the process began."""
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def total_bytes(self) -> int:
        """Memory of the machine."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def kib_field(path: Path, field: str) -> int:
    """Bytes of a field in KiB of a file such as /proc/self/status."""
    for line in path.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no {field}")


def choose_probe(device: torch.device) -> MemoryProbe | None:
    """The best probe that works here; None, with a warning, where there is none."""
    if device.type == "cuda":
        return CudaProbe(device)
    for probe in (ResidentProbe(), LifetimeProbe()):
        try:
            probe.reset()
            probe.peak_bytes()
            probe.total_bytes()
            return probe
        except (OSError, ImportError, ValueError, AttributeError):
            continue
    rank_zero_warn("GPUMemory: this system tells no process its memory; nothing is measured")
    return None


class PhaseMeter:
    """The peak of each phase, of the current step and of the whole run."""

    def __init__(self, probe: MemoryProbe) -> None:
        self.probe = probe
        self.phase = "other"
        self.run: dict[str, int] = {}
        self._step: dict[str, int] = {}
        probe.reset()

    def enter(self, phase: str) -> None:
        """Close the phase that runs now and begin another; `""` is `other`, the time outside all phases."""
        peak = self.probe.peak_bytes()
        for peaks in (self._step, self.run):
            peaks[self.phase] = max(peak, peaks.get(self.phase, 0))
        self.probe.reset()
        self.phase = phase or "other"

    def take_step(self) -> dict[str, int]:
        """Peaks by phase since the last call, in bytes."""
        self.enter(self.phase)
        step, self._step = self._step, {}
        return step


def nvml_used_bytes(device: torch.device) -> int:
    """What NVML says is in use on the whole device, by every process, with CUDA contexts and library buffers.

    Raises:
        Exception: pynvml is missing, or NVML refuses.
    """
    import pynvml

    pynvml.nvmlInit()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid)).used)
