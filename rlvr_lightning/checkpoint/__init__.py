"""Checkpoints that are whole or absent, exact to resume from, and may hold only what changed since the start."""

from rlvr_lightning.checkpoint.io import DeltaCheckpointIO, check_readable
from rlvr_lightning.checkpoint.module import DeltaCheckpoints

__all__ = ["DeltaCheckpointIO", "DeltaCheckpoints", "check_readable"]
