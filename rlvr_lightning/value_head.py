"""What a completion is worth so far, read off the policy's own hidden states: the critic of PPO.

A separate critic is a second model, with weights, gradients, optimizer state and activations of its own. This one is
two layers on the policy's last hidden states: for a model of 8 billion parameters (hidden size 4096) 17 million, 64
MiB. It reads the hidden states and does not shape them: no gradient flows from it into the policy, whose updates are
those of the policy gradient alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """One value of each hidden state; 0 for all until it has learned something. Computes in float32.

    With n the layer norm: v = w2 . silu(W1 n(h) + b1) / sqrt(H) + b2. The division makes learning rates of the same
    size right for every H: a gradient step on w2 moves a value by about as much.

    Args:
        hidden_size: H.

    Example:
        >>> head = ValueHead(4)
        >>> head(torch.randn(3, 4)).tolist(), sum(p.numel() for p in head.parameters())
        ([0.0, 0.0, 0.0], 25)
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, hidden_size, dtype=torch.float32)
        self.outer = nn.Linear(hidden_size, 1, dtype=torch.float32)
        if not self.outer.weight.is_meta:
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values, float32 [N], of hidden states, float [N, H]."""
        with torch.autocast(hidden.device.type, enabled=False):
            normed = nn.functional.layer_norm(hidden.float(), hidden.shape[-1:])
            features = nn.functional.silu(self.inner(normed)) / math.sqrt(hidden.shape[-1])
            return self.outer(features)[:, 0]
