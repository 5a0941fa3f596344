"""The math reward against cases that others wrote, and the benchmark's own answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlvr_lightning.profiling.bench_math import agreement, fetch_cases, read_cases, samples_of, stated
from rlvr_lightning.rewards.math_answer import MathAnswer

pytest.importorskip("math_verify", reason="extra [math]")
RECORD = Path(__file__).parent.parent / "results" / "bench_math.json"


def test_cases_of_others_are_judged_as_recorded_and_never_paid_for_being_wrong(tmp_path: Path) -> None:
    try:
        files = fetch_cases(tmp_path)
    except OSError as error:
        pytest.skip(str(error))
    found, kept = agreement(files), json.loads(RECORD.read_text())["agreement"]
    assert found["cases"] > 250
    assert found["agree"] >= 0.85 * found["cases"]
    assert found == kept
    # wrong there only because the formula stands on lines of its own
    assert {case["gold"] + case["answer"] for case in found["right_for_us"]} == {"$9$9"}


def test_cases_are_read_and_not_run(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "raise SystemExit\n"
        "@pytest.mark.parametrize('gold, pred, expected', [('$2$', r'so $3$, \\boxed{2}', 1), (f'{x}', '1', 0)])\n"
        "def test(): ...\n"
        "@pytest.mark.parametrize('other', [1])\n"
        "def test2(): ...\n"
    )
    assert list(read_cases([file])) == [("test_some.py:2", "$2$", r"so $3$, \boxed{2}", True)]
    assert stated(r"so $3$, \boxed{2}") == "2" and stated("so $1$, $3$.") == "3" and stated("3.") == "3"


def test_the_answers_of_the_benchmark_are_what_they_are_meant_to_be() -> None:
    samples = samples_of(160, seed=7)
    assert len({sample.text + sample.record["answer"] for sample in samples}) == 160
    reward = MathAnswer(workers=1)
    assert reward(samples) == [1.0 if k % 8 < 3 else 0.0 for k in range(160)]
    reward.verifier.close()
