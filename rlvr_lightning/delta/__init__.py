"""SparseDelta: which entries of a model's weights changed, exactly; in memory and as a file."""

from rlvr_lightning.delta.sparse import SparseDelta, TensorDelta, digest_state

__all__ = ["SparseDelta", "TensorDelta", "digest_state"]
