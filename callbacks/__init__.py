"""Callbacks that observe a Lightning run; each works in any Lightning project."""

from rlvr_lightning.callbacks.completions import CompletionTable
from rlvr_lightning.callbacks.gpu_memory import GPUMemory
from rlvr_lightning.callbacks.interrupt import SaveOnInterrupt
from rlvr_lightning.callbacks.optimizer_state import OptimizerState, optimizer_state_bytes
from rlvr_lightning.callbacks.progress import ShortProgressBar
from rlvr_lightning.callbacks.update_sparsity import UpdateSparsity

__all__ = [
    "GPUMemory",
    "OptimizerState",
    "UpdateSparsity",
    "CompletionTable",
    "SaveOnInterrupt",
    "ShortProgressBar",
    "optimizer_state_bytes",
]
