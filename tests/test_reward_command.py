"""`reward`: a config's rewards for a file of completions, and the warning of a first batch without signal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlvr_lightning.__main__ import main
from rlvr_lightning.scoring import no_signal

LINES = [
    {"prompt": "47+8=", "completion": "+8=55 answer 55", "answer": 55},
    {"prompt": "47+8=", "text": "answer 5", "record": {"answer": 55}},
    {"completion": "\x1b[2J answer 55", "answer": 55, "truncated": True},
]


def write(folder: Path, lines: list[dict[str, object]]) -> str:
    file = folder / "completions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def test_parts_total_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [
        "--model.rewards.long.class_path",
        "rlvr_lightning.rewards.shape.Format",
        "--model.rewards.long.form",
        "boxed",
    ]
    weights = ["--model.reward_weights", "{long: 0.5, answer: 2}"]
    file, out = write(tmp_path, LINES), tmp_path / "scored.jsonl"
    assert main(["reward", "--config", "sgd.yaml", "--completions", file, "--out", str(out), *more, *weights]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["reward"] for row in rows] == [2.0, 0.0, 0.0]
    assert rows[0]["parts"] == {"answer": 1.0, "long": 0.0}
    assert rows[1]["why"]["answer"] == "'5' after 'answer ', right is 55"
    assert rows[2]["why"]["answer"].endswith("and the text is cut")
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and r"\x1b[2J answer 55" in shown
    assert "answer: mean 0.333, at most 1, at least 0" in shown and "reward: mean 0.667 of 3 completions" in shown


def test_a_reward_that_fails_says_why_and_counts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["reward", "--config", "sgd.yaml", "--completions", write(tmp_path, [*LINES, {"text": "answer 1"}])]) == 0
    )
    shown = capsys.readouterr().out
    assert "KeyError: 'answer'" in shown and "failed on 1, counted 0" in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"completion": "a"}\n\n{"completion": 5}\n', r"completions.jsonl:3: no text under 'completion'"),
        (b'{"completion": "a"\n', r"completions.jsonl:1: Expecting ',' delimiter"),
        (b'{"completion": "\xff"}\n', r"completions.jsonl:1: 'utf-8' codec can't decode"),
        (b'{"completion": "a", "record": 5}\n', r"completions.jsonl:1: 'record' must be an object, got int"),
        (b"\n", "--completions: .* is empty"),
    ],
)
def test_bad_files(content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    file = tmp_path / "completions.jsonl"
    file.write_bytes(content)
    assert main(["reward", "--config", "sgd.yaml", "--completions", str(file)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_bad_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, LINES)
    for words, message in (
        (["--config", "tiny_sft.yaml"], "--config: it has no model.rewards"),
        (["--config", "sgd.yaml", "--model.reward_weights", "{answr: 1}"], "weights names 'answr'"),
        (["--config", "sgd.yaml", "--model.rewards.answer.marker", ""], "marker must not be empty"),
        (["--config", "none.yaml"], "--config: no file 'none.yaml' here"),
    ):
        assert main(["reward", "--completions", file, *words]) == 2, words
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert main(["reward", "--config", "sgd.yaml", "--completions", "nowhere.jsonl"]) == 2
    assert "there is no file 'nowhere.jsonl'" in capsys.readouterr().err


def test_what_is_said_of_a_batch_without_signal() -> None:
    told = [
        {"prompt": f"problem {k // 3}", "completion": "x" * 500, "reward": float(k // 3), "truncated": k < 3}
        for k in range(15)
    ]
    lines = no_signal(told, 3).splitlines()
    assert "nothing to learn from in any of 5 groups (rewards differ between prompts only)" in lines[0]
    assert lines[1].startswith("  reward 0, cut at the limit: 'problem 0' -> 'xxx") and len(lines) == 4
    assert "any of 1 groups (all rewards are 0)" in no_signal(told[:3], 3)
    told[4]["reward"] = 0.5  # a penalty, of which nothing is learned where the verifier finds all alike
    assert "any of 5 groups (rewards differ within groups, but not in what is learned from)" in no_signal(told, 3)
