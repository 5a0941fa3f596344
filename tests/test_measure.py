"""`profile --measure`: real steps in processes of their own, also such as run out of memory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlvr_lightning.profiling import command, measure
from rlvr_lightning.profiling.ledger import of_phases
from rlvr_lightning.profiling.measure import compared, most, worker

SMALL = "--data.prompts_per_step 5 --model.sampling.max_tokens 7 --model.group_size 3 --model.batching.micro_batch 15"
RUN = ["--config", "sgd.yaml", "--measure", *SMALL.split(), "--trainer.accelerator", "cpu"]


KILLER = """
import os
import signal
from rlvr_lightning.rewards.base import Reward

class Killer(Reward):
    def __call__(self, samples):
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is short
"""


def test_steps_beside_their_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    assert command.main([*RUN, "--out", str(out), "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert "| MiB | predicted | measured | predicted, error % |" in text
    assert "2 steps done, every completion to its limit, prompts of up to" in text
    record = json.loads(out.read_text())
    assert {"command", "environment", "config_sha256", "run", "counted", "process"} <= set(record)
    assert record["counted"]["status"] == record["process"]["status"] == "ok" and "failed" not in record
    assert record["counted"]["device"] == "cpu" and record["counted"]["step"] == 2
    held = {kind: {i["name"]: i["held"] for i in instants} for kind, instants in record["ledgers"].items()}
    weights = 445_760 * 4
    assert held["measured"]["backward"]["weights"] == held["predicted"]["loss, backward"]["weights"] == weights
    assert held["measured"]["backward"]["reference"] == weights  # a copy: every fp32 entry moves
    assert held["measured"]["optimizer"]["gradients"] == held["predicted"]["optimizer step"]["gradients"] == weights
    peaks = {kind: max(sum(one.values()) for one in instants.values()) for kind, instants in held.items()}
    assert abs(peaks["predicted"] / peaks["measured"] - 1) < 0.1, peaks
    process = record["process"]
    assert max(process["phase_peak_bytes"].values()) > process["before_bytes"] > 100 << 20


def test_out_of_memory_is_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    large = ["--data.prompts_per_step", "32", "--model.group_size", "8", "--model.batching.micro_batch", "256"]
    assert (
        command.main([*RUN, *large, "--model.sampling.max_tokens", "64", "--limit", "150MiB", "--out", str(out)]) == 1
    )
    said = capsys.readouterr()
    told = re.match(r"error: out of memory of 0\.15 GiB in (reference|forward), step 1; 0\.1", said.err)
    assert told, said.err
    assert said.err.count("\n") == 1
    assert "reached" in said.out and "error %" not in said.out  # no error is told against a step that was not done
    record = json.loads(out.read_text())
    assert record["failed"] in said.err
    process = record["process"]
    above = process["phase_peak_bytes"][told[1]] - process["before_bytes"]
    assert 50 << 20 < above < 200 << 20
    assert record["counted"]["owners_bytes"]["rollout"]["kv_cache"] > 10 << 20  # what had been reached before


def test_a_killed_process_leaves_what_it_had_reached(tmp_path: Path) -> None:
    (tmp_path / "killing.py").write_text(KILLER)
    config = tmp_path / "config.yaml"
    text = (Path(measure.__file__).parents[1] / "configs" / "sgd.yaml").read_text()
    config.write_text(text.replace("rlvr_lightning.rewards.arithmetic.FinalAnswer", "killing.Killer"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        found = worker(tmp_path / "found.json", ["--config", str(config), *RUN[3:]], 0, count=False)
    assert (found["status"], found["exit_status"], found["phase"], found["step"]) == ("out of memory", -9, "reward", 0)
    assert found["phase_peak_bytes"]["rollout"] > 100 << 20
    assert measure.said_of(found, 0).startswith("out of memory in reward, step 1; 0.")


def test_a_setting_that_only_the_run_understood(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*RUN, "--model.sampling.max_token", "5"]) == 2
    assert capsys.readouterr().err == "error: max_tokens: the run has 5, the prediction 7; name it in full\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--measure"], "--measure runs a config: add --config"),
        ([*RUN, "--optimizer", "adamw"], "--optimizer: --measure runs a config as it is"),
        ([*RUN, "--out", "record.md"], "--out: --measure writes a JSON record, so the name must end in .json"),
        ([*RUN, "--limit", "much"], "--limit: 'much' is no size; give one such as 24GiB or 80GB"),
        (["--config", "sgd.yaml", "--limit", "1GiB"], "--limit is of --measure"),
        ([*RUN, "--trainer.devices", "5"], "--measure runs one process, the config has 5; add --trainer.devices 1"),
        ([*RUN, "--model.batching.micro_batch", "2"], "micro_batch (2) must divide group_size (3)"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(argv) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_table_compares_the_fullest_moments() -> None:
    real = of_phases({"rollout": {"weights": 2**20}, "forward": {"weights": 2**20, "activations": 4 * 2**20}})
    guess = of_phases({"forward": {"weights": 2**20, "activations": 3 * 2**20}, "backward": {"weights": 1}})
    rollout, training = compared({"predicted": guess, "measured": real})
    assert most(guess, "rollout").total == 0
    assert rollout.rows == [["weights", 0.0, 1.0, -100.0], ["together", 0.0, 1.0, -100.0]]
    assert training.rows[1] == ["activations", 3.0, 4.0, -25.0]
    assert training.rows[-1] == ["together", 4.0, 5.0, pytest.approx(-20.0)]
