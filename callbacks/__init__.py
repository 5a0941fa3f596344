"""Callbacks that observe a Lightning run; each works in any Lightning project.

They are imported when they are asked for: what this package counts with does not need Lightning.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlvr_lightning.callbacks.completions import CompletionTable
    from rlvr_lightning.callbacks.gpu_memory import GPUMemory
    from rlvr_lightning.callbacks.interrupt import SaveOnInterrupt
    from rlvr_lightning.callbacks.optimizer_state import OptimizerState, optimizer_state_bytes
    from rlvr_lightning.callbacks.progress import ShortProgressBar
    from rlvr_lightning.callbacks.update_sparsity import UpdateSparsity
    from rlvr_lightning.callbacks.why_sparse import WhySparse

__all__ = [
    "GPUMemory",
    "OptimizerState",
    "UpdateSparsity",
    "WhySparse",
    "CompletionTable",
    "SaveOnInterrupt",
    "ShortProgressBar",
    "optimizer_state_bytes",
]
_MODULES = {
    "GPUMemory": "gpu_memory",
    "OptimizerState": "optimizer_state",
    "UpdateSparsity": "update_sparsity",
    "WhySparse": "why_sparse",
    "CompletionTable": "completions",
    "SaveOnInterrupt": "interrupt",
    "ShortProgressBar": "progress",
    "optimizer_state_bytes": "optimizer_state",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
