"""Orders that follow running pass rates: by hand, through a fit, resumed, and on three ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rlvr_lightning.data.arithmetic import Arithmetic
from rlvr_lightning.data.curriculum import Curriculum, RunningRates, tell_curriculum
from rlvr_lightning.data.prompts import PromptData, PromptLoader
from rlvr_lightning.ranks import Ranks
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.schema import Sample, Sampling

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def rates(known: Sequence[float | None], **settings) -> RunningRates:
    return RunningRates(Curriculum(**settings), known)


def test_a_running_rate_weighs_the_newest_half() -> None:
    running = rates([None, 0.0])
    for rate in (1.0, 0.5, 0.0):
        running.observe(0, rate)
    running.observe(1, 1.0)
    assert running.now == [0.375, 0.5]  # (1 + 0.5) / 2 / 2, and (0 + 1) / 2


def test_what_is_outside_the_band_leaves_its_place_to_what_is_inside() -> None:
    running = rates([0.0, 0.1, 0.5, 0.9, 1.0, None, 0.95], band=[0.1, 0.9], revisit=3)
    shuffled = [6, 0, 5, 3, 4, 1, 2]
    assert running.order(shuffled, 2, 0, 0) == shuffled[:6], "all are served first"
    assert running.order(shuffled, 2, 3, 0) == shuffled[:6], "and again, every third epoch"
    order = running.order(shuffled, 2, 1, 0)
    assert order[:4] == [5, 3, 1, 2] and len(order) == 6 and set(order[4:]) < {5, 3, 1, 2}
    assert order != running.order(shuffled, 2, 1, 7) or order != running.order(shuffled, 2, 2, 7)
    assert running.served_frac() == 4 / 7


def test_no_problem_is_twice_in_a_batch_and_all_inside_come_equally_often() -> None:
    running = rates([0.5] * 5 + [0.0] * 18, band=[0.1, 0.9])
    order = running.order(list(range(23)), 2, 1, 0)
    batches = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert len(batches) == 11 and all(len(set(batch)) == 2 for batch in batches)
    assert set(order) == set(range(5)) | {5} and set(Counter(order).values()) <= {3, 4}


def test_where_few_are_inside_the_nearest_join_them() -> None:
    running = rates([0.0, 0.5, 1.0, 0.95, 0.0, 0.05], band=[0.1, 0.9])
    assert Counter(running.order([0, 1, 2, 3, 4, 5], 3, 1, 0)) == {1: 2, 3: 2, 5: 2}, "to fill a batch"
    running = rates([0.0] * 9 + [0.5, 0.05], band=[0.1, 0.9])
    order = running.order(list(range(11)), 1, 1, 0)
    assert order[:2] == [9, 10] and set(order) == {9, 10, 0} and max(Counter(order).values()) == 4, (
        "so that none comes too often"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"band": [0.1]}, r"curriculum\.band must be two numbers from 0 to 1"),
        ({"band": [0.9, 0.1]}, r"curriculum\.band must be"),
        ({"revisit": 1}, r"curriculum\.revisit must be at least 2, got 1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curriculum(**settings)


# --- the loader ---


def loader(curriculum: Curriculum | None = Curriculum(revisit=9)) -> PromptLoader:  # noqa: B008 (frozen)
    return PromptLoader([{"index": 2 * i, "pass_rate": 0.5 if i == 6 else None} for i in range(7)], 2, 0, curriculum)


def serve(source: PromptLoader, batches: int) -> list[list[int]]:
    """Indices of batches to come; after each, problems above index 5 are solved always, the others half the time."""
    served: list[list[int]] = []
    while True:
        for batch in source:
            served.append([record["index"] for record in batch])
            for record in batch:
                assert source.rates is not None
                source.rates.observe(record["index"] // 2, float(record["index"] > 5) or 0.5)
            if len(served) == batches:
                return served


def test_what_was_measured_before_the_run_is_where_rates_start() -> None:
    source = loader()
    assert source.rates is not None and source.rates.now == [None] * 6 + [0.5]


def test_an_epoch_serves_what_the_last_one_left_inside() -> None:
    first, later = (served := serve(loader(), 12))[:3], served[3:]
    assert len({index for batch in first for index in batch}) == 6
    left_out = {0, 2, 4, 6, 8, 10, 12} - {index for batch in first for index in batch}
    assert {index for batch in later[:3] for index in batch} <= {0, 2, 4, 12} | left_out
    assert {index for batch in later[3:] for index in batch} <= {0, 2, 4} | left_out | {12}


@pytest.mark.parametrize("served", range(1, 10))
def test_resume_is_exact_from_any_position(served: int) -> None:
    whole = loader()
    serve(whole, served)
    state = json.loads(json.dumps(whole.state_dict()))
    rest = serve(whole, 8)
    resumed = loader()
    resumed.load_state_dict(state)
    assert serve(resumed, 8) == rest


def test_resume_with_and_without_a_curriculum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.curriculum: cannot resume: .* taken with one, this run is without"):
        loader(None).load_state_dict(loader().state_dict())
    with pytest.raises(ValueError, match=r"data\.curriculum: cannot resume: .* taken without one, this run is with"):
        loader().load_state_dict(loader(None).state_dict())


# --- a fit ---


class Told(LightningModule):
    """Tells the data module that problems with an even index are never solved, and notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        indices = [record["index"] for record in batch]
        self.seen.append(indices)
        self.trainer.datamodule.observe({index: 0.5 * (index % 2) for index in indices})
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(**settings) -> PromptData:
    given = {"train": Arithmetic(num=7, levels=[1]), "prompts_per_step": 2, "curriculum": Curriculum(revisit=9)}
    return PromptData("tiny", **given | settings)


@pytest.mark.parametrize("stop", [1, 3, 4, 8])  # 3 batches an epoch
def test_a_resumed_fit_sees_what_an_uninterrupted_one_sees(tmp_path: Path, stop: int) -> None:
    def fit(steps: int, ckpt: Path | None = None) -> list[list[int]]:
        module = Told()
        keep = ModelCheckpoint(tmp_path / str(steps), every_n_train_steps=1, save_top_k=-1, filename="{step}")
        Trainer(max_steps=steps, callbacks=[keep], **QUIET).fit(module, data(), ckpt_path=ckpt)
        return module.seen

    whole = fit(11)
    assert any(index % 2 == 0 for batch in whole[:3] for index in batch)
    assert all(index % 2 for batch in whole[6:] for index in batch)
    assert fit(stop) + fit(11, tmp_path / str(stop) / f"step={stop}.ckpt") == whole


class First(Reward):
    """Half of a group's completions of even problems are right, no others."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [float(k % 2 and sample.record["index"] % 2 == 0) for k, sample in enumerate(samples)]


def test_grpo_tells_the_curriculum() -> None:
    from rlvr_lightning.grpo import GRPO

    module = GRPO(
        "tiny",
        rewards={"first": First()},
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        group_size=2,
        sampling=Sampling(max_tokens=3),
    )
    source = data()
    logged: list[float] = []
    module.log_dict = lambda values: logged.extend(v for k, v in values.items() if k == "data/served_frac")  # type: ignore
    Trainer(max_steps=3, enable_checkpointing=False, **QUIET).fit(module, source)
    known = source.train_dataloader()
    assert known.rates is not None
    for record, rate in zip(known.records, known.rates.now, strict=True):
        assert rate in (None, 0.5 if record["index"] % 2 == 0 else 0.0)
    assert sum(rate is None for rate in known.rates.now) == 1 and len(logged) == 3
    assert logged[-1] == pytest.approx(1 - known.rates.now.count(0.0) / 7)


def test_telling_without_a_curriculum_is_refused() -> None:
    source = data(curriculum=None)
    source.setup("fit")
    with pytest.raises(ValueError, match=r"data\.curriculum is not set"):
        source.observe({0: 1.0})


# --- three ranks ---


def one_rank(rank: int, folder: Path) -> None:
    """Serve four epochs, tell the curriculum of this rank's share, and write down what was served."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    source = data(prompts_per_step=3)
    source.setup("fit")
    ranks = Ranks(rank=rank, size=3)
    trainer = SimpleNamespace(datamodule=source)
    module = SimpleNamespace(trainer=trainer, ranks=ranks, scorer=SimpleNamespace(rewards={"right": None}))
    shares, served = [], source.train_dataloader()
    for batch in (batch for _ in range(4) for batch in served):
        mine = batch[ranks.rank :: ranks.size]
        right = torch.tensor([float(g and record["index"] % 2) for record in mine for g in range(2)])
        tell_curriculum(module, mine, SimpleNamespace(parts={"right": right}))
        shares.append([record["index"] for record in mine])
    (folder / f"{rank}.json").write_text(json.dumps({"shares": shares, "state": served.state_dict()}))


def test_three_ranks_share_each_batch_and_know_the_same(tmp_path: Path) -> None:
    program = """
import os, pathlib, sys
sys.path.insert(0, sys.argv[1])
from test_curriculum import one_rank
rank = next((rank for rank in (1, 2) if os.fork() == 0), 0)
one_rank(rank, pathlib.Path(sys.argv[2]))
if rank == 0:
    assert [os.wait()[1] for _ in range(2)] == [0, 0]
"""
    subprocess.run([sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)], check=True, timeout=120)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert found[0]["state"] == found[1]["state"] == found[2]["state"]
    whole = list(zip(*(one["shares"] for one in found), strict=True))
    assert len(whole) == 8 and all(len({index for share in batch for index in share}) == 3 for batch in whole)
    assert all(len(share) == 1 for batch in whole for share in batch)
    assert all(index % 2 for batch in whole[4:] for share in batch for index in share), "the even ones rest"
