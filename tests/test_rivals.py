"""Other people's low-memory optimizers train here, and their state is counted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from test_grpo import fit, folder, module, weights  # noqa: F401 (a fixture)

from rlvr_lightning.callbacks import OptimizerState

RIVALS = [
    pytest.param("torchao.optim", "AdamW8bit", {"lr": 1e-3, "block_size": 16}),
    pytest.param("bitsandbytes.optim", "AdamW8bit", {"lr": 1e-3, "min_8bit_size": 1}),
    pytest.param("optimi", "SGD", {"lr": 0.1}),
    pytest.param("flashoptim", "FlashAdamW", {"lr": 1e-3}, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("package", "name", "settings"), RIVALS)
def test_rival_trains_and_its_state_is_counted(folder, tmp_path: Path, package, name, settings) -> None:  # noqa: F811
    optimizer = getattr(pytest.importorskip(package), name)
    model = module(folder, dtype="bfloat16", optimizer=partial(optimizer, **settings))
    model.configure_model()
    before = weights(model)
    trainer = fit(model, tmp_path, steps=2, callbacks=[OptimizerState()])
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    counted = float(trainer.callback_metrics["memory/optimizer_state_bytes"])
    parameters = sum(p.numel() for p in model.policy.parameters())
    assert 0 < counted < 8 * parameters  # less than fp32 moments
