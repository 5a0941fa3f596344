"""Our optimizer's modes, for the tests of several rooms."""

from __future__ import annotations

from functools import partial

import torch
from test_grpo import weights

from rlvr_lightning.experience import Batching
from rlvr_lightning.optim import SGD

WHOLE = Batching(micro_batch=24)
MODES = {
    "split": partial(SGD, lr=0.5),
    "fp32": partial(SGD, lr=0.5, master="fp32"),
    "nearest": partial(SGD, lr=0.5, master="none"),
    "stochastic": partial(SGD, lr=0.5, master="none", rounding="stochastic"),
}


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))
