r"""Mathematical answers: the last \boxed{}, compared in a process that may hang, die or be lied to."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlvr_lightning.rewards.math_answer import MathAnswer, usable_golds
from rlvr_lightning.rewards.math_text import MAX_CHARS, gold_text, last_boxed, plain, stated_answer
from rlvr_lightning.rewards.math_verifier import Verifier
from rlvr_lightning.schema import Sample

needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="extra [math]")


@pytest.fixture(scope="module")
def reward() -> Iterator[MathAnswer]:
    made = MathAnswer(time_limit_s=20.0, workers=1)
    yield made
    made.verifier.close()


def judge(reward: MathAnswer, text: str, gold: str | list[str]) -> float:
    return reward([Sample(prompt="", text=text, token_ids=[], record={"answer": gold})])[0]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1} or rather \boxed{2}.", "2"),
        (r"$\boxed{1}$, \(\boxed{\frac{1}{2}}\) \text{ and } \boxed{3}", r"1, \frac{1}{2}, 3"),  # a list is one answer
        (r"\boxed{1}, \boxed{}, \boxed{3}", "3"),
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
@pytest.mark.parametrize("gold", ["", "$$", r"\left(", r"\boxed{", "1" * 401, []])
def test_an_unparseable_gold_raises_and_never_pays(reward: MathAnswer, gold: str) -> None:
    assert not gold or usable_golds([gold], reward.verifier) == [None]
    for answer in (gold, "", r"\boxed{}", rf"\boxed{{{gold}}}"):
        with pytest.raises(ValueError, match=r"answer: .* cannot be parsed"):
            judge(reward, str(answer), gold)


@needs_math_verify
@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (["2", "3"], "3", 1),  # several golds
        (["2", "3"], "2, 3", 0),
        ("3, 5", "3", 0),  # one gold of several parts
        (r"1331 \text{ and } 1728", "1728, 1331", 1),
        (r"\{1, 2\}", "2, 1", 1),  # sets
        (r"\{1, 2\}", r"\{1\}", 0),
        ("(1, 2)", "(2, 1)", 0),
        ("[1, 2)", "[1, 2)", 1),  # intervals
        ("[1, 2)", "(1, 2)", 0),
        (r"(-\infty, 3] \cup (5, \infty)", r"x \in (-\infty, 3] \cup (5, \infty)", 1),
        (r"1 < x < 2", "(1, 2)", 1),
        (r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}", r"\begin{bmatrix}1 & 2\\3 & 4\end{bmatrix}", 1),  # matrices
        (r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}", r"\begin{bmatrix}1 & 2\\3 & 5\end{bmatrix}", 0),
        ("$10$ cm", r"10\text{ cm}", 1),  # units
        ("10", r"5\text{ cm}", 0),
        (r"90^\circ", "90", 1),
        (r"50\%", "0.5", 1),  # percentages
        (r"50\%", "50", 1),
        (r"50\%", "5", 0),
        (r"\$1{,}000", "$1,000", 1),  # money, and thousands
        ("1000", r"1\,000", 1),
        ("1000", "1 000", 1),
        (r"0.\overline{3}", r"\frac13", 1),  # the next two read as 0 elsewhere
        (r"0.\overline{3}", "0", 0),
        (r"1 - \frac{1}{\mathrm{e}}", r"1 + \frac{1}{\mathrm{e}}", 0),  # and both of these as 1
        (r"\text{east}", "East", 1),  # words
        ("east", "seat", 0),  # the same product of variables
        (r"\text{no solution}", "none", 0),
        ("7", "+7", 1),
        ("7", "-7", 0),
        (r"-\frac{1}{2}", r"\frac{-3}{6}", 1),
        (r"\frac{1}{2}", r"\frac{2}{5}", 0),
        ("7", "14/2", 1),
        ("7", "7/0", 0),
        ("007", "7", 1),
        (r"1\frac{1}{2}", "1.5", 1),
        (r"\frac{1}{3}", "0.333", 0),
        ("12345678901234567890", "12345678901234567891", 0),
    ],
)
def test_kinds_of_answers(reward: MathAnswer, gold: str, answer: str, right: int) -> None:
    assert judge(reward, rf"\boxed{{{answer}}}", gold) == right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 12. So the answer is 13.", "13"),
        ("Answer: $\\frac{1}{2}$\nThat was all.", r"\frac{1}{2}"),
        ("**Final Answer**: **7**", "7"),
        ("she has 3 left\n#### 3", "3"),
        (r"The answer is 5, no, \boxed{6}", "6"),
        (r"The answer is 5, no, \boxed{", None),
        ("5", None),
        ("The answer is", None),
        ("The answer is\n5", None),
        ("answer " * 20_000, None),
    ],
)
def test_stated_answers(text: str, answer: str | None) -> None:
    assert stated_answer(text) == answer


@needs_math_verify
def test_stated_answers_count_where_they_are_asked_for(reward: MathAnswer) -> None:
    stated = MathAnswer(extract="stated", workers=1)
    assert judge(stated, "So the answer is 1/2.", "0.5") == 1.0 and judge(reward, "So the answer is 1/2.", "0.5") == 0.0
    assert judge(stated, "The answer is 1. The answer is 2.", "1") == 0.0
    stated.verifier.close()


@needs_math_verify
def test_it_says_what_it_compared(reward: MathAnswer) -> None:
    def why(text: str) -> str:
        return reward.explain(Sample(prompt="", text=text, token_ids=[], record={"answer": "2"}))

    assert why(r"\boxed{1+1}") == "equal: '1+1' against '2'"
    assert why(r"\boxed{3}") == "not equal: '3' against '2'"
    assert why(r"\boxed{\left(}") == r"the answer cannot be parsed: '\\left(' against '2'"
    assert why("2") == "no answer was found"


@pytest.mark.parametrize("text", [r"\mathrm{e}", r"0.\dot{3}", r"1\,000{,}000", "$7", "12~km", "1,5"])
def test_what_is_plain_stays_so(text: str) -> None:
    assert plain(plain(text)) == plain(text)


@needs_math_verify
def test_poison_delays_its_own_question_only() -> None:
    """The others do not wait for it, neither in the same batch nor behind it."""
    verifier = Verifier(time_limit_s=3.0, workers=2)
    assert verifier.parses("2"), "started"
    poison = [("same", "2", "9^{9^{9^{9}}}"), ("same", "7", r"2^{10^{10^{2}}}"), ("same", "7", r"3^{10^{10^{2}}}")]
    fine = [("same", "2", f"{n} - {n - 2}") for n in range(30)]
    started = time.monotonic()
    assert verifier.verdicts([*fine[:9], *poison, *fine[9:]]) == ["true"] * 9 + ["time"] * 3 + ["true"] * 21
    assert time.monotonic() - started < 3 * 3.0 + 3.0, "no more than one after the other"
    started = time.monotonic()
    assert verifier.same("5", "2+3"), "and the next batch finds fresh processes"
    assert time.monotonic() - started < 2.0
    verifier.close()


@needs_math_verify
def test_too_much_memory_is_a_verdict(tmp_path: Path) -> None:
    script = tmp_path / "greedy.py"
    script.write_text(
        "from rlvr_lightning.rewards import math_worker\n"
        "math_worker.verdict = lambda verb, *texts: 'true' if len(bytearray(int(texts[0]))) else 'false'\n"
        "math_worker.WARM_UP = ()\n"
        "math_worker.main(['1'])\n"
    )
    batch = [[n, 20.0, "parses", size] for n, size in enumerate(["7", str(2 << 30), "7"])]
    done = subprocess.run([sys.executable, script], input=json.dumps(batch) + "\n", capture_output=True, text=True)
    assert done.stdout.splitlines() == ["ready"], "the input ended, and so does the pool"
    pool = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert pool.stdin and pool.stdout
    print(json.dumps(batch), file=pool.stdin, flush=True)
    lines = [pool.stdout.readline().strip() for _ in range(4)]
    assert lines == ["ready", '[0, "true"]', '[1, "memory"]', '[2, "true"]']
    pool.communicate()


def descendants(pid: int) -> list[int]:
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in children] + [grand for child in children for grand in descendants(int(child))]


@needs_math_verify
def test_a_killed_pool_or_worker_is_replaced_and_nothing_stays() -> None:
    verifier = Verifier(time_limit_s=20.0, workers=2)
    assert verifier.same("2", "2+0")
    assert verifier._process is not None
    first = verifier._process.pid
    workers = descendants(first)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    assert verifier.verdicts([("same", "2", f"{n}-{n - 2}") for n in range(5)]) == ["true"] * 5
    os.kill(first, signal.SIGKILL)
    assert verifier.same("2", "3-1") and not verifier.same("2", "3")
    mine = [verifier._process.pid, *descendants(verifier._process.pid)]
    verifier.close()
    deadline = time.monotonic() + 10
    while [pid for pid in (*workers, *mine) if Path(f"/proc/{pid}").exists()] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in (*workers, *mine) if Path(f"/proc/{pid}").exists()]


@needs_math_verify
def test_an_answer_to_another_question_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = Verifier(time_limit_s=20.0, workers=1)
    assert verifier.same("2", "2+0")
    real, lies = Verifier._line, [b'[0, "true"]']
    monkeypatch.setattr(Verifier, "_line", lambda self, limit_s: lies.pop() if lies else real(self, limit_s))
    assert not verifier.same("2", "3"), "asked again in a new pool"
    assert not lies
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


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="workers must be at least 1"):
        MathAnswer(workers=0)
    with pytest.raises(ValueError, match="time_limit_s must be positive"):
        MathAnswer(time_limit_s=0)
