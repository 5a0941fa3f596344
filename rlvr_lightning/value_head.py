"""What a completion is worth so far, read off the policy's own hidden states: the critic of PPO.

A separate critic is a second model, with weights, gradients, optimizer state and activations of its own. This one is
one more output of the last layer: for a model of 8 billion parameters (hidden size 4096) 4097 numbers. It reads the
hidden states and does not shape them: no gradient flows from it into the policy, whose updates are those of the policy
gradient alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """One value of each hidden state; 0 for all until it has learned something. Computes in float32.

    With n the layer norm of a hidden state: v = w . n / sqrt(H) + b. What multiplies w has length 1, whatever H, so
    that the same learning rates are right for models of every size: plain gradient steps on the squared error are
    stable below 1.

    Args:
        hidden_size: H.

    Example:
        >>> head = ValueHead(4)
        >>> head(torch.randn(3, 4)).tolist(), sum(p.numel() for p in head.parameters())
        ([0.0, 0.0, 0.0], 5)
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """Values, float32 [N], of hidden states, float [N, H]."""
        with torch.autocast(hidden.device.type, enabled=False):
            normed = nn.functional.layer_norm(hidden.float(), hidden.shape[-1:])
            return normed @ (self.weight / math.sqrt(hidden.shape[-1])) + self.bias
