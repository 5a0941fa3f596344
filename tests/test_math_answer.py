r"""Mathematical answers: the last \boxed{}, compared in a process that may hang, die or be lied to."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from rlvr_lightning.rewards.math_answer import (
    MAX_CHARS,
    MathAnswer,
    Verifier,
    gold_parses,
    gold_text,
    last_boxed,
)
from rlvr_lightning.schema import Sample

needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="extra [math]")


@pytest.fixture(scope="module")
def reward() -> Iterator[MathAnswer]:
    made = MathAnswer(time_limit_s=20.0)
    yield made
    made.verifier.close()


def judge(reward: MathAnswer, text: str, gold: str) -> float:
    return reward([Sample(prompt="", text=text, token_ids=[], record={"answer": gold})])[0]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1} or rather \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed{1} and \boxed{2", None),  # the last one counts, and it is open
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxed 6", None),
        (r"\boxed", None),
        ("7", None),
        ("", None),
        (r"\boxed{" + "1" * MAX_CHARS + "}", "1" * MAX_CHARS),
        (r"\boxed{" + "1" * (MAX_CHARS + 1) + "}", None),
        (r"\boxed{" + "{" * 100_000, None),
    ],
)
def test_the_last_box_is_found(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("gold", "text"),
    [("$7$", "7"), (" 7 ", "7"), (r"Thus $x=\boxed{7}$.", "7"), ("$$", None), ("", None), ("7" * 401, None)],
)
def test_golds_may_be_answers_or_solutions(gold: str, text: str | None) -> None:
    assert gold_text(gold) == text


@needs_math_verify
@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\frac12", "1/2"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        ("1,000", "1000"),
        ("x^2+1", "1+x^2"),
        ("2", "x=2"),
        ("3, 5", "5, 3"),
        ("(1,2)", "(1, 2)"),
        (r"\text{east}", "east"),
        (r"10\text{ cm}", "10"),
        (r"\boxed{4}, so four", "4"),
    ],
)
def test_equal_answers_are_right(reward: MathAnswer, gold: str, answer: str) -> None:
    assert judge(reward, rf"The answer is \boxed{{{answer}}}.", gold) == 1.0


@needs_math_verify
@pytest.mark.parametrize(
    "text",
    [
        "2",  # not in a box
        r"\boxed{2} \boxed{3}",
        r"\boxed{1, 2, 3}",
        r"\boxed{2 \text{ or } 3}",
        r"\boxed{2$ $3}",
        r"\boxed{3$ or $2}",
        r"\boxed{\pm 2}",
        r"\boxed{-2}",
        r"\boxed{x}",
        r"\boxed{x < 3}",
        r"\boxed{nan}",
        r"\boxed{\infty}",
        r"\boxed{2/0}",
        r"\boxed{\left(}",
        r"\boxed{\frac{}{}}",
        r"\boxed{\int_0^2 1 dx}",
        r"\boxed{\sum_{i=1}^{2} 1}",
        r"\boxed{__import__('os').system('true')}",
        "\\boxed{\x00\ud7ff\n}",
        r"\boxed{two}",
        "",
    ],
)
def test_anything_else_is_wrong(reward: MathAnswer, text: str) -> None:
    assert judge(reward, text, "2") == 0.0


@needs_math_verify
@pytest.mark.parametrize("gold", ["", "$$", r"\left(", r"\boxed{", "1" * 401])
def test_an_unparseable_gold_raises_and_never_pays(reward: MathAnswer, gold: str) -> None:
    assert not gold_parses(gold, reward.verifier)
    for answer in (gold, "", r"\boxed{}", rf"\boxed{{{gold}}}"):
        with pytest.raises(ValueError, match=r"answer: .* cannot be parsed"):
            judge(reward, answer, gold)


@needs_math_verify
def test_endless_mathematics_is_wrong_in_time_and_the_next_question_is_answered() -> None:
    verifier = Verifier(time_limit_s=1.0)
    assert verifier.parses("2"), "started"
    started = time.monotonic()
    assert not verifier.same("2", "9^{9^{9^{9}}}")
    assert time.monotonic() - started < 5
    verifier.time_limit_s = 20.0
    assert verifier.same("2", "1+1") and not verifier.same("2", "3")
    verifier.close()


@needs_math_verify
def test_a_killed_worker_is_replaced() -> None:
    verifier = Verifier(time_limit_s=20.0)
    assert verifier.same("2", "2")
    assert verifier._process is not None
    os.kill(verifier._process.pid, signal.SIGKILL)
    verifier._process.wait()
    assert verifier.same("2", "2") and not verifier.same("2", "3")
    verifier.close()


@needs_math_verify
def test_an_answer_to_another_question_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = Verifier(time_limit_s=20.0)
    assert verifier.same("2", "2")
    monkeypatch.setattr("rlvr_lightning.rewards.math_answer._line", lambda *_: "1 true\n")
    assert not verifier.same("2", "2"), "question 2, answer 1"
    monkeypatch.undo()
    assert verifier.same("2", "2")
    verifier.close()


@needs_math_verify
def test_it_works_in_a_thread_where_signals_do_not(reward: MathAnswer) -> None:
    verdicts: list[float] = []
    thread = threading.Thread(target=lambda: verdicts.append(judge(reward, r"\boxed{0.5}", r"\frac{1}{2}")))
    thread.start()
    thread.join()
    assert verdicts == [1.0]


@needs_math_verify
def test_it_can_be_copied_and_pickled(reward: MathAnswer) -> None:
    assert judge(reward, r"\boxed{2}", "2") == 1.0, "so it holds a live process"
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert twin.verifier._process is None
        assert judge(twin, r"\boxed{2}", "2") == 1.0
        twin.verifier.close()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'rlvr-lightning\[math\]'"):
        MathAnswer()


def test_the_limit_must_be_positive() -> None:
    with pytest.raises(ValueError, match="time_limit_s must be positive"):
        MathAnswer(time_limit_s=0)
