"""The few-shot problems: what is held out stays unseen, answers are right, and the reward is strict."""

from __future__ import annotations

import re
import sys

import pytest

from rlvr_lightning.data.fewshot import HELD_OUT, KINDS, FewShot, partition
from rlvr_lightning.rewards.tasks import TaskReward
from rlvr_lightning.schema import Sample

OURS = ["add", "largest", "third"]
GYM = ["chain_sum"]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    if request.param in GYM:
        pytest.importorskip("reasoning_gym")
    return request.param


def solve(line: str) -> str:
    """The answer to a line, worked out from its text alone."""
    numbers = [int(digits) for digits in re.findall(r"\d+", line)]
    if line.startswith("largest of"):
        return str(sorted(numbers)[-1])
    if line.startswith("third of"):
        return str(numbers[2])
    first, second = numbers
    return str(first + second if "+" in line else first - second)


def test_splits_share_no_problem_and_are_all_there_is(kind: str) -> None:
    splits = {name: {problem.question for problem in problems} for name, problems in partition(kind).items()}
    assert {name: len(splits[name]) for name in HELD_OUT} == HELD_OUT
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == len(KINDS[kind]())
    assert len(splits["train"]) >= 75


def test_kinds_share_no_problem() -> None:
    pytest.importorskip("reasoning_gym")
    questions = [problem.question for kind in KINDS for problem in KINDS[kind]()]
    assert len(questions) == len(set(questions)) == 300 + 200 + 720 + 5040


def test_every_line_of_every_prompt_is_right_and_solved_lines_are_training_problems(kind: str) -> None:
    train = {problem.question for problem in partition(kind)["train"]}
    for split, num in (("train", 300), ("val", 25), ("test", 100)):
        records = FewShot([kind], num=num, split=split, shots=3)
        for record in records:
            *solved, question = record["prompt"].split("\n")
            assert len(solved) == 3
            assert record["answer"] == solve(question)
            for line in solved:
                asked, _, answer = line.rpartition(" ")
                assert asked in train and asked != question
                assert answer == solve(asked)
            assert (question in train) == (split == "train")


def test_held_out_problems_come_once_each_whatever_the_seed(kind: str) -> None:
    questions = [
        sorted(record["prompt"].split("\n")[-1] for record in FewShot([kind], num=100, split="test", seed=seed))
        for seed in (0, 1)
    ]
    assert questions[0] == questions[1] and len(set(questions[0])) == 100


def test_training_goes_through_all_problems_before_one_comes_again() -> None:
    size = len(partition("add")["train"])
    questions = [record["prompt"].split("\n")[-1] for record in FewShot(["add"], num=2 * size)]
    assert len(set(questions[:size])) == len(set(questions[size:])) == size
    assert questions[:size] != questions[size:]


def test_records_depend_on_the_seed_alone() -> None:
    first, again, other = (list(FewShot(OURS, num=20, seed=seed)) for seed in (3, 3, 4))
    assert first == again != other
    assert [record["task"] for record in first[:5]] == ["add", "largest", "third", "add", "largest"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": []}, "kinds must be distinct names among"),
        ({"kinds": ["add", "add"]}, "kinds must be distinct"),
        ({"kinds": ["divide"]}, r"got \['divide'\]"),
        ({"kinds": ["add"], "num": 0}, "num must be at least 1"),
        ({"kinds": ["add"], "num": 101, "split": "test"}, "num must be at most 100 for 1 kinds in 'test'"),
        ({"kinds": ["add"], "split": "held"}, "split must be"),
        ({"kinds": ["add"], "shots": 21}, "shots must lie in"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewShot(**({"num": 5} | arguments))


def test_a_missing_gym_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    partition.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'rlvr-lightning\[gym\]'"):
        FewShot(["chain_sum"], num=1)
    assert len(FewShot(OURS, num=3)) == 3, "the other kinds need no gym"


def judge(text: str, record: dict, truncated: bool = False) -> float:
    return TaskReward()([Sample(prompt="", text=text, token_ids=[], record=record, truncated=truncated)])[0]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 15\n", 1),
        ("15", 1),
        ("15 \n16", 1),
        (" 15.\n", 0),
        ("15 16", 0),
        ("\n15", 0),
        ("", 0),
        ("015", 0),
        ("1 5", 0),
    ],
)
def test_own_problems_are_matched_strictly(text: str, right: int) -> None:
    assert judge(text, {"answer": "15"}) == right


def test_what_was_cut_is_wrong() -> None:
    assert judge(" 15", {"answer": "15"}, truncated=True) == 0


def test_the_gym_judges_its_own_problems_and_partial_credit_counts_nothing() -> None:
    pytest.importorskip("reasoning_gym")
    record = next(r for r in FewShot(GYM, num=50) if r["answer"] == "-3")
    verdicts = {text: judge(text, record) for text in ("-3", " -3.0\n", "-3 or 3", "3", "1 -3", "nan", "-3" * 50)}
    assert verdicts == {"-3": 1, " -3.0\n": 1, "-3 or 3": 0, "3": 0, "1 -3": 0, "nan": 0, "-3" * 50: 0}


def test_no_constant_answer_pays_much(kind: str) -> None:
    answers = [record["answer"] for record in FewShot([kind], num=100, split="test")]
    assert max(answers.count(answer) for answer in answers) <= 35
