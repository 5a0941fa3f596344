"""Texts made of a policy's own completions: what is written, what is left out, what is refused."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from rlvr_lightning.__main__ import main
from rlvr_lightning.data.texts import Demonstrations, Labels, Pairs
from rlvr_lightning.evaluation import Drawn
from rlvr_lightning.policy import TINY, load_tokenizer
from rlvr_lightning.rewards.arithmetic import FinalAnswer
from rlvr_lightning.samples import lines_of
from rlvr_lightning.schema import Rollouts, Sample
from rlvr_lightning.scoring import Scorer
from rlvr_lightning.sft import SFT

RIGHT = [Drawn("2", True, False), Drawn(" 2", True, False), Drawn("2", True, False)]
WRONG = [Drawn("3", False, False), Drawn("", False, False), Drawn("44", False, True)]


@pytest.mark.parametrize(
    ("kind", "drawn", "lines", "counts"),
    [
        ("pairs", RIGHT + WRONG, [("2", "3")], {"repeated ones": 1, "cut completions": 1, "empty ones": 1}),
        ("pairs", RIGHT, [], {"problems without a wrong one": 1}),
        ("correct", RIGHT + WRONG, [("2",), (" 2",)], {"used": 1, "lines": 2}),
        ("correct", WRONG, [], {"problems without a right completion": 1, "used": 0}),
        ("labels", WRONG + RIGHT[:1], [("3", False), ("2", True)], {"lines": 2, "problems": 1}),
    ],
)
def test_lines_of_a_problem(kind: str, drawn: list[Drawn], lines: list, counts: dict[str, int]) -> None:
    found: Counter[str] = Counter()
    made = lines_of("1+1=", drawn, kind, found)
    assert [tuple(line.values()) for line in made] == [("1+1=", *line) for line in lines]
    assert {name: found[name] for name in counts} == counts


def draw(tmp_path: Path, kind: str, *options: str) -> int:
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    return main(["samples", "--config=sgd.yaml", f"--out={tmp_path}/{kind}.jsonl", f"--kind={kind}", *quiet, *options])


def test_every_kind_is_what_its_source_reads(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    answers = {}
    for kind, source in (("pairs", Pairs), ("labels", Labels), ("correct", Demonstrations)):
        assert draw(tmp_path, kind, "--num=20", "--n=4") == 0
        rows = [json.loads(line) for line in (tmp_path / f"{kind}.jsonl").read_text().splitlines()]
        assert len(source(f"{kind}.jsonl")) == len(rows) > 5
        answers[kind] = rows
        assert f"wrote {len(rows)} " in capsys.readouterr().out
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["correct.jsonl", "labels.jsonl", "pairs.jsonl"]
    labels = {(row["prompt"], row["completion"]): row["label"] for row in answers["labels"]}
    assert all(labels[row["prompt"], row["completion"]] for row in answers["correct"])
    for row in answers["pairs"]:  # the same draws, judged again from the text
        assert labels[row["prompt"], row["chosen"]] and not labels[row["prompt"], row["rejected"]]
        total, *steps = row["prompt"].rstrip("=").replace("-", "+-").split("+")
        record = {"answer": int(total) + sum(map(int, steps))}
        sides = [Sample(prompt="", text=row[side], token_ids=[], record=record) for side in ("chosen", "rejected")]
        assert FinalAnswer()(sides) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("pairs", ["--n=1"], "--n must be at least 2 for pairs, got 1"),
        ("labels", ["--num=0"], "--num must be at least 1, got 0"),
        ("labels", ["--num=5001"], "--num: data.train has 5000 problems, fewer than 5001"),
        ("labels", ["--model.rewards.answer.field=total"], "data.train: its problems cannot be judged: answer: "),
        ("best", [], "kind: expected one of ['pairs', 'labels', 'correct']"),
        ("correct", ["--num=2", "--model.sampling.max_tokens=1"], "--out: there is nothing to write; left out: "),
    ],
)
def test_mistakes_are_one_line(kind: str, options: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert outcome(tmp_path, kind, *options) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_texts_end_as_they_were_drawn(tmp_path: Path) -> None:
    assert draw(tmp_path, "labels", "--num=9", "--n=2", '--model.stop=["="]') == 0
    texts = [json.loads(line)["completion"] for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert len(texts) > 5 and all(text.index("=") == len(text) - 1 for text in texts)
    module = SFT("tiny", partial(torch.optim.SGD, lr=0.1), stop=["="])
    for text in texts:
        [ids] = module.text_of({"prompt": "1+1=", "prompt_ids": [3], "demonstration": text}).completions
        assert module.tokenizer.decode(ids) == text  # no end-of-sequence token behind it
    [ids] = module.text_of({"prompt": "1+1=", "prompt_ids": [3], "demonstration": "2"}).completions
    assert ids[-1] == module.tokenizer.eos_token_id and len(ids) == 2


def test_a_stop_string_that_is_a_special_token_is_kept() -> None:
    """Of chat models the end of a turn is one; end-of-sequence is put behind texts again, and is not in them."""
    tokenizer = load_tokenizer(str(TINY))
    plus, end, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("+", "=", tokenizer.eos_token))
    tokenizer.add_special_tokens({"additional_special_tokens": ["="]})
    rollouts = Rollouts(
        prompt_ids=[[plus]],
        completion_ids=torch.tensor([[plus, end, 0], [plus, eos, 0], [end, plus, plus]]),
        completion_mask=torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool(),
        rollout_logprobs=torch.zeros(3, 3),
        truncated=torch.tensor([False, False, True]),
    )
    with_stop, without = (Scorer(tokenizer=tokenizer, rewards={}, weights={}, stop=stop) for stop in (["="], []))
    assert with_stop.drawn(rollouts)[1] == ["+=", "+", "++"]
    assert without.drawn(rollouts)[1] == ["+", "+", "++"]
    assert [sample.text for sample in with_stop.samples(rollouts, [{"prompt": "+"}])] == ["+", "+", "++"]


def test_a_file_is_not_overwritten(tmp_path: Path, capsys) -> None:
    (tmp_path / "pairs.jsonl").write_text("mine\n")
    assert outcome(tmp_path, "pairs") == 2
    assert "pairs.jsonl exists; give another name, or remove it" in capsys.readouterr().err
    assert (tmp_path / "pairs.jsonl").read_text() == "mine\n"


def outcome(tmp_path: Path, kind: str, *options: str) -> int:
    """The exit status, however it is given."""
    try:
        return draw(tmp_path, kind, *options)
    except SystemExit as exit_:
        return int(exit_.code or 0)
