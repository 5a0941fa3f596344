"""Choice, match, format, length, functions: what earns and what does not."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlvr_lightning.data.gym import GymPrompts
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.choice import Choice
from rlvr_lightning.rewards.extract import answer_of, extract_answer
from rlvr_lightning.rewards.function import Function
from rlvr_lightning.rewards.match import ExactMatch, NumericMatch
from rlvr_lightning.rewards.score import score
from rlvr_lightning.rewards.shape import Format, LengthPenalty
from rlvr_lightning.rewards.tasks import TaskReward, refuse_evaluation
from rlvr_lightning.schema import Sample


def sample(text: str, truncated: bool = False, tokens: int = 3, **record: Any) -> Sample:
    return Sample(prompt="p", text=text, token_ids=[7] * tokens, record=record, truncated=truncated)


@pytest.mark.parametrize(
    ("how", "text", "answer"),
    [
        ("whole", " a\nb ", "a\nb"),
        ("whole", " \n ", None),
        ("first_line", "a\nb", "a"),
        ("first_line", "\nb", None),
        ("last_line", "a\nb\n\n", "b"),
        ("last_line", "", None),
        ("tag", "<answer>1</answer><answer> 2 </answer>", "2"),
        ("tag", "<answer>1", None),
        ("tag", "<answer></answer>", None),
        ("tag", "<answer>1<answer>2</answer>", "2"),
        ("boxed", r"\boxed{3}", "3"),
        ("stated", "the answer is 4.", "4"),
    ],
)
def test_where_the_answer_is(how: Any, text: str, answer: str | None) -> None:
    assert extract_answer(text, how) == answer


def test_a_cut_answer_is_none_unless_it_was_closed() -> None:
    cut = [("whole", "12"), ("last_line", "a\n12"), ("stated", "The answer is 12"), ("first_line", "12")]
    assert [answer_of(sample(text, truncated=True), how) for how, text in cut] == [None] * 4  # type: ignore[arg-type]
    closed = [("boxed", r"\boxed{12}, so"), ("stated", r"\boxed{12}, so"), ("tag", "<answer>12</answer> s")]
    assert [answer_of(sample(text, truncated=True), how) for how, text in closed] == ["12"] * 3  # type: ignore[arg-type]


OPTIONS = ["red", "green", "4.5", "blue"]


@pytest.mark.parametrize(
    ("text", "earned"),
    [
        ("Answer: B", 1),
        ("The answer is (B) green.", 1),
        ("The final answer is **B**", 1),
        (r"\boxed{B}", 1),
        (r"\boxed{\text{(B)}}", 1),
        (r"\boxed{\text{B}}", 1),
        ("Answer: B. green", 1),
        ("Answer: Green.", 1),  # the option itself
        ("Answer: B because A is wrong", 0),  # two letters: not told apart from hedging
        ("Answer: B or A", 0),
        ("Answer: A, B", 0),
        ("Answer: A", 0),
        ("Answer: Bananas", 0),
        ("Answer: E", 0),
        ("Answer: b", 0),
        ("B", 0),  # not stated
        ("", 0),
    ],
)
def test_choice(text: str, earned: int) -> None:
    assert Choice()([sample(text, answer="B", choices=OPTIONS)]) == [earned]


def test_choice_by_other_ways() -> None:
    assert Choice(extract="whole")([sample("C", answer="C", choices=OPTIONS), sample("C", answer="C")]) == [1.0, 1.0]
    assert Choice(extract="whole")([sample("4.5", answer="C", choices=OPTIONS)]) == [1.0]
    assert Choice()([sample("Answer: same", answer="A", choices=["same", "same"])]) == [0.0], "which of them?"
    with pytest.raises(ValueError, match="answer: 'E' must be a letter, one of the first 4"):
        Choice()([sample("Answer: E", answer="E", choices=OPTIONS)])
    assert Choice().explain(sample("Answer: A", answer="B")) == "'A' chooses A; right is B"


@pytest.mark.parametrize(
    ("text", "right", "earned"),
    [
        ("1,234.50", 1234.5, 1),
        ("$7", "7", 1),
        ("50%", "0.5", 1),
        ("-3", -3, 1),
        ("3", -3, 0),
        ("1e3", 1000, 1),
        ("12345678901234567890", 12345678901234567891, 1),  # within a millionth
        ("0", 0, 1),
        ("1e-9", 0, 0),
        ("3 or 4", 3, 0),
        ("nan", 3, 0),
        ("inf", 3, 0),
        ("1e999", 3, 0),
        ("1,23", 123, 0),
        ("9" * 100_000, 3, 0),
        ("\u0663", 3, 0),
        ("", 3, 0),
    ],
)
def test_numbers(text: str, right: Any, earned: int) -> None:
    assert NumericMatch()([sample(text, answer=right)]) == [earned]


def test_numbers_to_a_tolerance() -> None:
    assert NumericMatch(tolerance=0.1)([sample("110", answer=100), sample("111", answer=100)]) == [1.0, 0.0]
    assert NumericMatch(tolerance=0.0)([sample("0.1", answer="0.10"), sample("0.1001", answer="0.1")]) == [1.0, 0.0]
    for bad in ("x", float("nan"), None):
        with pytest.raises(ValueError, match=r"answer: .* is not a finite number"):
            NumericMatch()([sample("1", answer=bad)])
    with pytest.raises(ValueError, match=r"tolerance must lie in \[0, 1\), got 1"):
        NumericMatch(tolerance=1)


def test_exact_text() -> None:
    assert ExactMatch()([sample("  Paris ", answer="paris"), sample("Paris!", answer="paris")]) == [1.0, 0.0]
    assert ExactMatch(ignore_case=False)([sample("Paris", answer="paris")]) == [0.0]
    assert ExactMatch()([sample("", answer="")]) == [0.0]
    assert ExactMatch(extract="tag").explain(sample("<answer>x</answer>", answer="y")) == "'x' against 'y'"
    with pytest.raises(ValueError, match="extract must be one of whole, first_line"):
        ExactMatch(extract="word")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("form", "opened", "text", "earned"),
    [
        ("think_answer", False, "<think>a</think>\n<answer>b</answer>\n", 1),
        ("think_answer", True, "a</think><answer>b</answer>", 1),
        ("think_answer", False, "x<think>a</think><answer>b</answer>", 0),
        ("think_answer", False, "<think>a</think><answer>b</answer>x", 0),
        ("think_answer", False, "<think></think><answer>b</answer>", 0),
        ("think_answer", False, "<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("think_answer", False, "<think>a<think>b</think><answer>c</answer>", 0),
        ("think", False, "<think>a</think> b", 1),
        ("think", False, "<think>a</think> ", 0),
        ("think", False, "b", 0),
        ("boxed", False, r"so \boxed{1}", 1),
        ("boxed", False, r"so \boxed{}", 0),
        ("boxed", False, r"\boxed{1}\boxed{2}", 0),
    ],
)
def test_format(form: Any, opened: bool, text: str, earned: int) -> None:
    assert Format(form, opened)([sample(text), sample(text, truncated=True)]) == [earned, 0]


def test_settings_of_shape() -> None:
    with pytest.raises(ValueError, match="form must be think_answer, think or boxed, got 'xml'"):
        Format("xml")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="buffer_tokens must lie between 0 and max_tokens=5, got 5"):
        LengthPenalty(5, 5)


def test_reasoning_gym_by_name() -> None:
    gym = pytest.importorskip("reasoning_gym", reason="extra [gym]")
    entries = [e for name in ("gcd", "leg_counting") for e in gym.create_dataset(name, size=3, seed=7)]
    right = [sample(f"<answer>{entry['answer']}</answer>", entry=entry, answer=entry["answer"]) for entry in entries]
    assert TaskReward(extract="tag")(right) == [1.0] * 6
    wrong = [sample("<answer>17</answer>", entry=entry, answer=entry["answer"]) for entry in entries[:3]]
    assert TaskReward(extract="tag")(wrong) == [0.0] * 3
    assert 0.5 in TaskReward(extract="tag", partial=True)(wrong), "gcd gives half for a number that divides both"
    assert pickle.loads(pickle.dumps(TaskReward(extract="tag", partial=True)))(right)[0] == 1.0


def test_tasks_whose_scorers_run_the_answer_are_refused(tmp_path: Path) -> None:
    gym = pytest.importorskip("reasoning_gym", reason="extra [gym]")
    from reasoning_gym.factory import DATASETS

    refused = []
    for name in DATASETS:
        try:
            refuse_evaluation(name)
        except ValueError:
            refused.append(name)
    assert sorted(refused) == [
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    ]
    entry = gym.create_dataset("spiral_matrix", size=1, seed=7)[0]
    trace = tmp_path / "trace"
    hostile = f"[open({str(trace)!r}, 'w').close()]"
    gym.get_score_answer_fn("spiral_matrix")(hostile, entry)
    assert trace.exists(), "the gym's own scorer runs it"
    trace.unlink()
    with pytest.raises(ValueError, match="task spiral_matrix: its scorer in reasoning-gym runs the answer as Python"):
        TaskReward()([sample(hostile, entry=entry, answer="x")])
    assert not trace.exists()
    with pytest.raises(ValueError, match="or use the reward Countdown"):
        GymPrompts(tasks={"countdown": 1}, num=3)


def test_functions_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import asyncio\n"
        "def score(samples, bonus=0.0):\n"
        "    return [len(s.text) + bonus for s in samples]\n"
        "async def slowly(samples):\n"
        "    await asyncio.sleep(0)\n"
        "    return [1.0 for s in samples]\n"
        "number = 5\n"
    )
    monkeypatch.chdir(tmp_path)
    both = {"mine": Function("mine.py:score", {"bonus": 0.5}), "async": Function("mine.py:slowly")}
    assert score(both, {"async": 2.0}, [sample("abc"), sample("")]).total.tolist() == [5.5, 2.5]
    assert list(pickle.loads(pickle.dumps(both["mine"]))([sample("ab")])) == [2.5]
    for path, message in {
        "mine.py:missing": "cannot load 'mine.py:missing': .*no attribute 'missing'",
        "other.py:score": "there is no Python file",
        "no_such_module.score": "cannot load 'no_such_module.score'",
        "score": "'score' must be package.module.name, or file.py:name",
        "mine.py:number": "'mine.py:number' is int, not a function",
    }.items():
        with pytest.raises(ValueError, match=message):
            Function(path)
    with pytest.raises(ValueError, match=r"path: mine.py:score takes \(samples, bonus=0.0\), not \(samples, bonis\)"):
        Function("mine.py:score", {"bonis": 1})


def test_rewards_wait_together() -> None:
    """Each needs the other to have begun; asked one after the other they would wait for ever."""
    begun = [threading.Event(), threading.Event()]

    class Waits(Reward):
        def __init__(self, me: int) -> None:
            self.me = me

        async def __call__(self, samples: Sequence[Sample]) -> list[float]:
            begun[self.me].set()
            for _ in range(1000):
                if begun[1 - self.me].is_set():
                    return [1.0] * len(samples)
                await asyncio.sleep(0.01)
            return [0.0] * len(samples)

    assert score({"a": Waits(0), "b": Waits(1)}, {}, [sample("x")]).total.tolist() == [2.0]


def test_rewards_can_be_asked_where_a_loop_runs() -> None:
    class Async(Reward):
        async def __call__(self, samples: Sequence[Sample]) -> list[float]:
            return [3.0]

    async def inside() -> float:
        return float(score({"a": Async()}, {}, [sample("x")]).total)

    assert asyncio.run(inside()) == 3.0
