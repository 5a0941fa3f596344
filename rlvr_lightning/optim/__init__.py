"""SGD at two to four bytes a parameter, and gradients that are used up during the backward pass."""

from rlvr_lightning.optim.release import GradientRelease, ReleasedUpdate
from rlvr_lightning.optim.sgd import SGD

__all__ = ["SGD", "GradientRelease", "ReleasedUpdate"]
