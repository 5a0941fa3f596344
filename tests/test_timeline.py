"""`fit --profile_memory`: the history of a step in bounded memory, and the page that shows it."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from rlvr_lightning import cli
from rlvr_lightning.data.prompts import PromptData
from rlvr_lightning.experience import Batching
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.policy import TINY
from rlvr_lightning.profiling import timeline
from rlvr_lightning.profiling.history import History
from rlvr_lightning.profiling.memory_worker import LengthParity, Lines
from rlvr_lightning.profiling.timeline import MemoryTimeline, parse_steps
from rlvr_lightning.schema import Sampling

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WEIGHTS = 445_760 * 4


@pytest.mark.parametrize(("events", "most"), [(7, 16), (16, 16), (17, 16), (1009, 6), (10_007, 50)])
def test_a_history_is_bounded_and_keeps_the_fullest(events: int, most: int) -> None:
    numbers = random.Random(events)
    totals = [numbers.randrange(1000) for _ in range(events)]
    history = History(most=most)
    for k, total in enumerate(totals):
        if k in (0, events // 3):
            history.enter("first" if k == 0 else "second")
        history.add(total, {"a": total // 3, "b": total - total // 3, "none": 0})
    assert len(history.moments) <= most and history.events == events
    assert (history.peak.total, history.peak.event) == (max(totals), totals.index(max(totals)))
    for k, moment in enumerate(history.moments):  # each the first of the fullest of its share of events
        share = totals[k * history.every : (k + 1) * history.every]
        assert (moment.total, moment.event) == (max(share), k * history.every + share.index(max(share)))
        assert moment.owners == {
            n: s for n, s in (("a", moment.total // 3), ("b", moment.total - moment.total // 3)) if s
        }
    peaks = [phase["peak_bytes"] for phase in history.phases()]
    assert peaks == [max(totals[: events // 3]), max(totals[events // 3 :])]
    assert history.record()["events_not_shown"] == events - len(history.moments)


def fit(folder: Path, *callbacks: Any, steps: int = 3) -> GRPO:
    """A few small steps of the tiny model."""
    model = GRPO(
        "tiny",
        {"parity": LengthParity()},
        partial(torch.optim.AdamW, lr=1e-4),
        group_size=3,
        sampling=Sampling(max_tokens=5),
        batching=Batching(micro_batch=3),
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **quiet,
    )
    trainer.fit(model, datamodule=PromptData(str(TINY), train=Lines(), prompts_per_step=2))
    return model


def test_a_step_by_owner_and_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unseen: list[Tensor] = [torch.zeros(12_345)]  # alive before, of nobody
    watched = fit(tmp_path, MemoryTimeline([2, 7]))
    said = capsys.readouterr().out
    assert "memory of step 7: not shown, the run had 3" in said
    found = json.loads((tmp_path / "memory_timeline" / "step_2.json").read_text())
    assert not (tmp_path / "memory_timeline" / "step_1.json").exists()
    owners = found["owners_bytes"]
    assert set(owners["weights"]) == {WEIGHTS}
    assert min(owners["optimizer_state"]) >= 2 * WEIGHTS  # two moments, from the first step on
    assert min(owners["other"]) >= unseen[0].nbytes
    assert max(owners["gradients"]) >= WEIGHTS and owners["gradients"][0] == owners["gradients"][-1] == 0
    names = [phase["phase"] for phase in found["phases"]]
    assert names == ["between", "rollout", "reward", *["forward", "backward"] * 2, "optimizer", "between"]
    sums = [sum(sizes) for sizes in zip(*owners.values(), strict=True)]
    peak = found["peak"]
    assert peak["bytes"] == max(sums) == max(phase["peak_bytes"] for phase in found["phases"])
    assert found["event"][sums.index(max(sums))] == peak["event"]
    cache = dict(zip(found["event"], owners["kv_cache"], strict=True))
    rollout = found["phases"][1]
    inside = [size for event, size in cache.items() if 0 <= event - rollout["first_event"] < rollout["events"]]
    after = [size for event, size in cache.items() if event > rollout["first_event"] + rollout["events"] + 100]
    assert max(inside) > 0 == max(after)
    plain = fit(tmp_path / "plain")
    for one, other in zip(watched.policy.parameters(), plain.policy.parameters(), strict=True):
        assert torch.equal(one, other)  # watching changes nothing


class RunsOut(MemoryTimeline):
    """Memory runs out in a backward pass."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        def check(phase: str) -> None:
            if phase == "backward":
                raise MemoryError("no more")

        pl_module.phase_listeners.append(check)


def test_a_step_that_runs_out_of_memory_is_shown_up_to_there(tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        fit(tmp_path, RunsOut([1]))
    found = json.loads((tmp_path / "memory_timeline" / "step_1.json").read_text())
    assert found["end"] == "ended by MemoryError"
    assert [phase["phase"] for phase in found["phases"]][-1] == "forward"
    assert "Memory of step 1, ended by MemoryError" in (tmp_path / "memory_timeline" / "step_1.html").read_text()
    torch.zeros(3).add_(1)  # nothing is watched any more


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run started as a user starts it."""
    folder = tmp_path_factory.mktemp("fit")
    small = (
        "--data.prompts_per_step 2 --model.group_size 3 --model.batching.micro_batch 6 --model.sampling.max_tokens 5"
    )
    quiet = "--validate_first false --trainer.limit_val_batches 0 --trainer.max_steps 2 --trainer.accelerator cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["fit", "--config", "sgd.yaml", *small.split(), *quiet.split(), "--profile_memory"]) == 0
    return folder / "runs" / "sgd" / "version_0" / "memory_timeline" / "step_2.html"


def test_the_page_stands_alone(page: Path) -> None:
    text = page.read_text()
    record = json.loads(page.with_suffix(".json").read_text())
    assert f"Peak {record['peak']['bytes'] / 2**20:,.1f} MiB: " in text
    assert "<script src" not in text and "default-src 'none'" in text
    assert "activations" in text and "kv cache" in text and "optimizer" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
def test_a_browser_draws_it(page: Path, tmp_path: Path) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=9000"]
    command = [str(CHROMIUM), *options, f"--user-data-dir={tmp_path}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.count('class="scatterlayer') == 2 and done.stdout.count("annotation-text") > 6
    assert ">peak " in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr


@pytest.mark.parametrize("text", ["x", "0", "", "1,,2", "-3"])
def test_steps_that_are_none(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"--profile_memory: .* names no steps; give numbers from 1 on, such as 2 or 1,5"
    ):
        parse_steps(text)


def test_without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package plotly: pip install 'rlvr-lightning\[report\]'"):
        MemoryTimeline()
