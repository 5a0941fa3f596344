import json
import math

import pytest
import torch

from rlvr_lightning.rewards.arithmetic import FinalAnswer
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.score import score
from rlvr_lightning.schema import Sample


def sample(text, answer=59, **kwargs):
    return Sample(**{"prompt": "p", "text": text, "token_ids": [1, 2], "record": {"answer": answer}} | kwargs)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("+8=55 -5=50 +9=59 answer 59", 1.0),
        ("answer 59", 1.0),
        ("answer  59\n", 1.0),
        ("answer 059", 1.0),
        ("answer +59", 1.0),
        ("answer 58", 0.0),
        ("answer -59", 0.0),
        ("answer 59.", 0.0),
        ("answer 59.0", 0.0),
        ("answer 5 9", 0.0),
        ("answer 59 answer 60", 0.0),
        ("answer 60 answer 59", 1.0),
        ("answer 58 59", 0.0),
        ("59", 0.0),
        ("answer59", 0.0),
        ("answer ", 0.0),
        ("", 0.0),
        ("answer \u0665\u0669", 0.0),  # Arabic-Indic 59: int() would read it
        ("answer 5_9", 0.0),  # likewise
        ("answer 0x3b", 0.0),
        ("answer 60-1", 0.0),
        ("answer __import__('os').abort()", 0.0),
        ("answer " + "9" * 1_000_000, 0.0),
        ("answer " * 100_000, 0.0),
        ("answer \ud800", 0.0),
        ("answer nan", 0.0),
    ],
)
def test_final_answer(text, reward):
    assert FinalAnswer()([sample(text)]) == [reward]


def test_final_answer_of_a_truncated_completion_is_nothing():
    assert FinalAnswer()([sample("answer 59", truncated=True), sample("answer 59")]) == [0.0, 1.0]


def test_final_answer_with_another_marker_and_field():
    reward = FinalAnswer(marker="####", field="solution")
    assert reward([sample("so #### -7", record={"solution": "-7"})]) == [1.0]
    with pytest.raises(ValueError, match="marker"):
        FinalAnswer(marker="")


class Numbers(Reward):
    """The number each text spells; raises on words."""

    def __call__(self, samples):
        return [float(s.text) for s in samples]


class Always(Reward):
    """The same list whatever it is given."""

    def __init__(self, *values):
        self.values = values

    def __call__(self, samples):
        return list(self.values)


def test_total_is_the_weighted_sum():
    samples = [sample("1"), sample("-2"), sample("0.5")]
    scores = score(
        {"a": Numbers(), "b": Always(1, 2, 3), "c": Always(5, 5, 5)}, {"a": 2.0, "b": -1.0, "c": 0.0}, samples
    )
    assert scores.total.tolist() == [1.0, -6.0, -2.0] and scores.total.dtype == torch.float32
    assert scores.parts["b"].tolist() == [1.0, 2.0, 3.0] and scores.failed == 0
    assert score({"a": Numbers()}, {}, samples).total.tolist() == [1.0, -2.0, 0.5]


def test_a_failing_reward_costs_only_its_completion(tmp_path):
    samples = [sample("1"), sample("word \ud800"), sample("nan"), sample("inf"), sample("1e39"), sample("5")]
    file = tmp_path / "run" / "failures.jsonl"
    scores = score({"a": Numbers(), "one": Always(1, 1, 1, 1, 1, 1)}, {}, samples, file)
    assert scores.parts["a"].tolist() == [1, 0, 0, 0, 0, 5]
    assert scores.total.tolist() == [2, 1, 1, 1, 1, 6]
    assert scores.failed == 4
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["completion"] for line in lines] == ["word \ud800", "nan", "inf", "1e39"]
    assert "could not convert" in lines[0]["error"] and "Traceback" in lines[0]["error"]
    assert "not a finite" in lines[1]["error"] and lines[1]["reward"] == "a" and lines[1]["record"] == {"answer": 59}
    score({"a": Numbers()}, {}, samples[1:2], file)
    assert len(file.read_text().splitlines()) == 5  # appended


@pytest.mark.parametrize("values", [(), (1.0,), (1.0, 1.0, 1.0)])
def test_wrong_number_of_values_is_a_failure(values):
    scores = score({"a": Always(*values)}, {}, [sample("1"), sample("2")])
    alone = [1.0, 1.0] if len(values) == 1 else [0.0, 0.0]  # asked one by one, one value is right
    assert scores.total.tolist() == alone and scores.failed == (0 if len(values) == 1 else 2)


def test_a_completion_failing_twice_counts_once():
    scores = score({"a": Numbers(), "b": Always(None)}, {}, [sample("x")])
    assert scores.failed == 1 and scores.total.tolist() == [0.0]


def test_interrupts_pass_through():
    class Interrupted(Reward):
        def __call__(self, samples):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score({"a": Interrupted()}, {}, [sample("x")])


def test_bad_weights_are_refused():
    for rewards, weights, message in [
        ({}, {}, "rewards is empty"),
        ({"a": Numbers()}, {"b": 1.0}, r"weights names 'b', which is not among the rewards \['a'\]"),
        ({"a": Numbers()}, {"a": math.nan}, r"weights\.a must be a finite number"),
    ]:
        with pytest.raises(ValueError, match=message):
            score(rewards, weights, [])


def test_nothing_to_score():
    scores = score({"a": Numbers()}, {}, [])
    assert scores.total.shape == (0,) and scores.failed == 0
