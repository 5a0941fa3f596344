"""Runs per second of the code reward: `python -m rlvr_lightning.profiling.bench_sandbox`.

The same little program, again and again: in plain processes of Python with no protection, under bubblewrap on standard
input, under bubblewrap called by a test, and in the weak sandbox. As many at a time as there are cores; all sides in
turn in each round, so that what else the machine does falls on all of them. The ratio is to the plain processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlvr_lightning.rewards.code_answer import CodeAnswer
from rlvr_lightning.rewards.sandbox.sandbox import Sandbox
from rlvr_lightning.schema import Sample

COMMAND = "python -m rlvr_lightning.profiling.bench_sandbox"
ADDS = "print(sum(map(int, input().split())))"
ONE_CASE = {"inputs": ["1 2\n"], "outputs": ["3\n"]}
TEN_CASES = {"inputs": ["1 2\n"] * 10, "outputs": ["3\n"] * 10}
CALLS = {"test_list": ["assert add(1, 2) == 3", "assert add(2, 5) == 7", "assert add(-1, 1) == 0"]}
LABELS = {
    "plain": "`python -I -S`, no protection",
    "cases": "bubblewrap, standard input",
    "ten_cases": "bubblewrap, 10 standard inputs to a run",
    "calls": "bubblewrap, 3 asserts",
    "weak": "weak sandbox, standard input",
}


def plain(workers: int, runs: int) -> None:
    """Run the program with nothing around it."""

    def run(_: int) -> None:
        command = [os.path.realpath(sys.executable), "-I", "-S", "-c", ADDS]
        assert subprocess.run(command, input="1 2\n", capture_output=True, text=True, check=True).stdout == "3\n"

    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(run, range(runs)))


def judged(reward: CodeAnswer, program: str, record: dict[str, Any], runs: int) -> None:
    """Judge the program by the reward."""
    samples = [Sample(prompt="", text=program, token_ids=[], record=record)] * runs
    assert reward(samples) == [1.0] * runs


def weak_reward(workers: int) -> CodeAnswer:
    """A reward that does without bubblewrap."""
    reward = CodeAnswer(workers=workers)
    reward.sandbox.bwrap = None
    return reward


def measure(workers: int, runs: int, rounds: int) -> dict[str, list[float]]:
    """Runs per second of each side in each round."""
    strong, weak = CodeAnswer(workers=workers), weak_reward(workers)
    sides: dict[str, Callable[[], None]] = {
        "plain": lambda: plain(workers, runs),
        "cases": lambda: judged(strong, ADDS, ONE_CASE, runs),
        "ten_cases": lambda: judged(strong, ADDS, TEN_CASES, runs),
        "calls": lambda: judged(strong, "def add(a, b):\n    return a + b", CALLS, runs),
        "weak": lambda: judged(weak, ADDS, ONE_CASE, runs),
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            speeds[name].append(runs / (time.perf_counter() - started))
    return speeds


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--runs", type=int, default=100, help="in a round, of each side")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results/bench_sandbox.json"))
    settings = parser.parse_args(argv)
    load_before = os.getloadavg()[0]
    speeds = measure(settings.workers, settings.runs, settings.rounds)
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    ratios = {name: statistics.median(map(float.__truediv__, found, speeds["plain"])) for name, found in speeds.items()}
    bwrap = subprocess.run([str(Sandbox().bwrap), "--version"], capture_output=True, text=True, check=True).stdout
    record = {
        "command": f"{COMMAND} --runs {settings.runs} --rounds {settings.rounds}",
        "workers": settings.workers,
        "cores": os.cpu_count(),
        "load_before": load_before,
        "python": platform.python_version(),
        "bubblewrap": bwrap.strip(),
        "machine": platform.machine(),
        "runs_a_round": settings.runs,
        "median_runs_per_s": medians,
        "median_ratio_to_plain": ratios,
        "runs_per_s": speeds,
    }
    for name, label in LABELS.items():
        print(f"{label:45} {medians[name]:8.1f} runs/s   {ratios[name]:5.2f} of plain")
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
