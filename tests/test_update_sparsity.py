"""UpdateSparsity on updates worked out by hand, in automatic and in manual optimization."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from callback_module import Tiny, fit, lines, rows_of
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from rlvr_lightning.callbacks import UpdateSparsity, change_meter, snapshots
from rlvr_lightning.callbacks.change_counts import DEFINITIONS

ALL = list(DEFINITIONS)


@pytest.mark.parametrize("manual", [False, True])
def test_sparsity_of_known_updates(tmp_path, manual):
    """Step 1 looks up rows 1 and 3 (10 entries), step 2 row 3 (5), step 3 rows 0 and 1 (10)."""
    sparsity = UpdateSparsity(every_n_steps=1)
    fit(Tiny(manual), [[1, 3], [3, 3], [0, 1]], tmp_path, [sparsity])
    records = lines(tmp_path / "sparsity.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3]
    assert [r["last_step"]["changed"]["bf16"] for r in records] == [10, 5, 10]
    assert [r["total"]["changed"]["fp32"] for r in records] == [10, 10, 15]
    last = records[-1]["last_step"]
    assert last["entries"] == 35 + 5 + 3  # the frozen three are counted, unchanged
    assert last["kinds"]["embedding"]["changed"] == dict.fromkeys(ALL, 10)
    assert last["kinds"]["norm"]["changed"]["fp32"] == 0
    assert last["layers"]["0"]["entries"] == 5
    assert records[0]["module_entries"] == 43
    metrics = rows_of(tmp_path)
    assert [float(m["update/changed_frac/tol1e-5"]) for m in metrics] == pytest.approx([10 / 43, 5 / 43, 10 / 43])
    assert [float(m["update/changed_frac_total/rel1e-3"]) for m in metrics] == pytest.approx(
        [10 / 43, 10 / 43, 15 / 43]
    )


def test_every_n_counts_optimizer_steps_not_batches(tmp_path, monkeypatch):
    """4 batches of 3 optimizer steps, every 5th step measured: steps 1, 6, 11; the weights are kept for these only."""
    writes = []
    write = snapshots.Snapshot.write
    monkeypatch.setattr(snapshots.Snapshot, "write", lambda self: (writes.append(1), write(self)))
    fit(Tiny(manual=True, steps=3), [[1]] * 4, tmp_path, [UpdateSparsity(every_n_steps=5, total=False)])
    records = lines(tmp_path / "sparsity.jsonl")
    assert [r["step"] for r in records] == [1, 6, 11]
    assert records[0]["total"] == {}
    assert len(writes) == 3
    assert [float(m["update/measured_step"]) for m in rows_of(tmp_path)] == [1, 6, 6, 11]


def test_a_resumed_run_keeps_counting_steps_and_says_where_its_start_is(tmp_path):
    """3 steps, then 4 more of which every 2nd is measured: steps 5 and 7; the start is after step 3."""
    trainer = fit(Tiny(), [[0]] * 3, tmp_path / "a", [])
    trainer.save_checkpoint(tmp_path / "at3.ckpt")
    module = Tiny()
    resumed = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[UpdateSparsity(every_n_steps=2)],
        enable_model_summary=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=CSVLogger(tmp_path / "b", name="", version=""),
    )
    loader = DataLoader([torch.tensor([row]) for row in (1, 2, 3, 4)])
    resumed.fit(module, loader, ckpt_path=tmp_path / "at3.ckpt")
    records = lines(tmp_path / "b" / "sparsity.jsonl")
    assert [(r["step"], r["since_step"]) for r in records] == [(5, 3), (7, 3)]
    assert [r["total"]["changed"]["bf16"] for r in records] == [10, 20]


def test_small_updates_vanish_in_bf16_only(tmp_path):
    """1 - 1e-4 rounds to 1 in bf16, is a relative change under 1e-3, and differs as fp32."""
    fit(Tiny(lr=1e-4), [[2]], tmp_path, [UpdateSparsity()])
    changed = lines(tmp_path / "sparsity.jsonl")[0]["last_step"]["changed"]
    assert changed == {"bf16": 0, "tol1e-5": 0, "rel1e-3": 0, "fp32": 5}


def test_measuring_stops_and_training_goes_on_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(change_meter.Snapshot, "write", full)
    module = Tiny()
    with pytest.warns(UserWarning, match="No space left"):
        fit(module, [[1], [1]], tmp_path, [UpdateSparsity(every_n_steps=1, total=False)])
    assert float(module.embed.weight[1, 0]) == -1.0
    assert not (tmp_path / "sparsity.jsonl").exists()


class Ticks:
    """A clock that advances one second each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_cost_is_amortised_over_n_steps(tmp_path):
    """By the ticks: base 1 s; before-step 1 s and comparing 1 s; the batch 5 s of which 3 s were not measuring."""
    sparsity = UpdateSparsity(every_n_steps=10)
    sparsity.clock = Ticks()
    fit(Tiny(), [[1]], tmp_path, [sparsity])
    (row,) = rows_of(tmp_path)
    assert float(row["update/measure_s"]) == 2.0
    assert float(row["update/measure_frac"]) == pytest.approx((1 + 2) / (3 * 10))


def test_sparsity_leaves_optimizer_hooks_as_they_were(tmp_path):
    module = Tiny()

    class Fails(pl.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("boom")

    trainer = None
    with pytest.raises(RuntimeError, match="boom"):
        trainer = fit(module, [[1]], tmp_path, [sparsity := UpdateSparsity(), Fails()])
    assert trainer is None
    assert sparsity._watched == []
    optimizer = module.optimizers().optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_bad_arguments_are_one_line():
    with pytest.raises(ValueError, match=r"UpdateSparsity\.every_n_steps must be at least 1, got 0"):
        UpdateSparsity(every_n_steps=0)
    with pytest.raises(ValueError, match=r"definitions: unknown \['fp8'\]; there are \['bf16'"):
        UpdateSparsity(definitions=["fp8"])
