"""Checkpoints that hold what changed since the start of a run: one file each, atomic, exact to resume from."""

from rlvr_lightning.checkpoint.io import DeltaCheckpointIO, DeltaCheckpoints, check_readable

__all__ = ["DeltaCheckpointIO", "DeltaCheckpoints", "check_readable"]
