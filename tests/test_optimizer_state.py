"""OptimizerState: bytes that are known exactly."""

from __future__ import annotations

import pytest
import torch
from callback_module import Tiny, fit, rows_of
from torch import nn

from rlvr_lightning.callbacks import OptimizerState, optimizer_state_bytes
from rlvr_lightning.callbacks.optimizer_state import count_state


def stepped(optimizer_class, dtype=torch.float32, **kwargs):
    weights = [nn.Parameter(torch.ones(3, 5, dtype=dtype)), nn.Parameter(torch.ones(7, dtype=dtype))]
    optimizer = optimizer_class(weights, lr=0.1, **kwargs)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs", "dtype", "expected"),
    [
        (torch.optim.SGD, {}, torch.float32, 0),
        (torch.optim.SGD, {"momentum": 0.9}, torch.float32, 22 * 4),
        (torch.optim.SGD, {"momentum": 0.9}, torch.bfloat16, 22 * 2),
        (torch.optim.RMSprop, {}, torch.float32, 22 * 4 + 2 * 4),
        (torch.optim.AdamW, {}, torch.float32, 22 * 8 + 2 * 4),
        (torch.optim.AdamW, {}, torch.bfloat16, 22 * 4 + 2 * 4),
        (torch.optim.AdamW, {"amsgrad": True}, torch.float32, 22 * 12 + 2 * 4),
    ],
)
def test_state_bytes_are_exact(optimizer_class, kwargs, dtype, expected):
    assert optimizer_state_bytes(stepped(optimizer_class, dtype, **kwargs)) == expected


def test_state_is_found_in_nested_containers_and_shared_storages_count_once():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    flat = torch.zeros(10)
    optimizer.state[weight] = {"history": [flat[:3], {"more": flat[3:7]}], "again": flat, "note": "text", "step": 3}
    entries = {entry.key: entry.local_bytes for entry in count_state(optimizer)}
    assert entries == {"history": 28, "again": 12}


def test_optimizer_state_logs_bytes_of_weights_gradients_and_state(tmp_path):
    module = Tiny(manual=True)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=0.1)
    fit(module, [[1], [2]], tmp_path, [OptimizerState()])
    row = rows_of(tmp_path)[-1]
    assert float(row["memory/weights_bytes"]) == 43 * 4
    assert float(row["memory/gradients_bytes"]) == 35 * 4
    assert float(row["memory/optimizer_state_bytes"]) == 35 * 8 + 4
