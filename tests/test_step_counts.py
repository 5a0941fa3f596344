"""Steps of several optimizers over a resume, by hand: what callbacks write."""

from __future__ import annotations

import pytest
import torch
from callback_module import Tiny, fit, lines

from rlvr_lightning.callbacks import UpdateSparsity, WhySparse
from rlvr_lightning.callbacks.step_counts import StepCounts

CALLBACKS = {"sparsity.jsonl": UpdateSparsity, "why_sparse.jsonl": WhySparse}


class Two(Tiny):
    """The other of two optimizers steps past the trainer, twice a batch, as PRIME's of the reward model does."""

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.manual_backward(self.loss(batch[0]))
        first.step()
        for _ in range(2):
            second.optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part, lr=self.lr) for part in ([self.embed.weight], [self.layers[0]["norm"]])]


def numbers(file):
    return [(one["optimizer"], one["step"], one["since_step"]) for one in lines(file)]


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_resumed_run_goes_on_counting_the_steps_of_each_optimizer(tmp_path, name):
    """Of 3 batches the optimizers have made 3 and 6 steps."""
    callback = CALLBACKS[name](every_n_steps=2)
    trainer = fit(Two(manual=True), [[1]] * 3, tmp_path / "a", [callback])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fit(Two(manual=True), [[1]] * 5, tmp_path / "b", [callback], ckpt_path=tmp_path / "a.ckpt", max_epochs=2)
    assert numbers(tmp_path / "a" / name) == [(0, 1, 0), (1, 1, 0), (1, 3, 0), (0, 3, 0), (1, 5, 0)]
    assert numbers(tmp_path / "b" / name)[:3] == [(1, 7, 6), (0, 5, 3), (1, 9, 6)]


def test_a_checkpoint_without_counts_takes_the_trainer_s(tmp_path):
    """4 steps of two optimizers through the trainer are 2 of each."""

    class Through(Two):
        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch[0]))
                optimizer.step()

    trainer = fit(Through(manual=True), [[1]] * 2, tmp_path / "a", [])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    callback = StepCounts()
    with pytest.warns(UserWarning, match="how often each of 2 optimizers has stepped; their steps are numbered from 2"):
        fit(Through(manual=True), [[1]] * 2, tmp_path / "b", [callback], ckpt_path=tmp_path / "a.ckpt", max_epochs=2)
    assert callback.steps == [2, 2]
