"""The benchmark against TRL: its clock, its medians, and that both sides are given the same work."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlvr_lightning.profiling import bench_trl, bench_trl_sides


def test_the_clock_gives_each_part_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 11.0, 14.0, 16.0, 17.0, 20.0, 20.5])
    monkeypatch.setattr(bench_trl_sides.time, "perf_counter", lambda: next(ticks))
    clock = bench_trl_sides.Clock()
    clock.begin()  # 10
    clock.switch("generate")  # 11
    clock.switch("train")  # 14
    clock.switch("generate")  # 16
    clock.switch("")  # 17
    clock.end()  # 20, and 20.5 as the end of the step
    assert clock.steps == [{"step_s": 10.5, "generate_s": 3.0 + 1.0, "train_s": 2.0}]


def test_medians_are_over_all_steps_and_over_processes() -> None:
    def process(peak: int, *seconds: float) -> dict:
        steps = [{"step_s": s, "train_s": s / 2} for s in seconds]
        return {"peak_bytes": peak, "above_import_bytes": peak - 1, "steps": steps}

    summary = bench_trl.summarize([process(7, 1.0, 9.0), process(5, 2.0, 3.0), process(30, 4.0)])
    assert summary == {"step_s": 3.0, "train_s": 1.5, "peak_bytes": 7, "above_import_bytes": 6}


def test_trl_gets_the_same_batch_and_cannot_end_early() -> None:
    plan = {"prompts": 3, "group": 8, "micro_batch": 8, "tokens": 5, "steps": 2, "seed": 0, "prompts_file": "p/f.jsonl"}
    settings = bench_trl_sides.trl_settings(plan)
    completions = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    assert completions == 3 * 8 and settings["steps_per_generation"] == settings["gradient_accumulation_steps"]
    assert settings["generation_kwargs"]["min_new_tokens"] == settings["max_completion_length"] == 5


@pytest.mark.parametrize("sizes", [["--micro-batch=5"], ["--prompts=3", "--micro-batch=16"]])
def test_sizes_that_do_not_divide_are_refused(sizes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_trl.parse(["--model=tiny4x256", *sizes])
    assert "--micro-batch must be whole groups" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="extra [bench]")
def test_it_runs(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    sizes = ["--prompts=2", "--group=3", "--tokens=4", "--micro-batch=6", "--steps=1", "--rounds=1", f"--out={out}"]
    command = [sys.executable, "-m", "rlvr_lightning.profiling.bench_trl", "--model=tiny4x256", *sizes]
    subprocess.run(command, check=True, capture_output=True)
    record = json.loads(out.read_text())
    assert [len(record["rounds"][side][0]["steps"]) for side in ("trl", "ours")] == [1, 1]
    assert record["ratio"]["step_s"] == record["median"]["ours"]["step_s"] / record["median"]["trl"]["step_s"]
