"""Tests of programming problems, from the columns that data sets have."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from rlvr_lightning.rewards.sandbox import Calls, Case

SCHEMAS = (
    "inputs, outputs; input_output (APPS); public_tests, private_tests or generated_tests (CodeContests); "
    "code_prompt or prompt, test, entry_point (HumanEval); test_list (MBPP)"
)
LANGUAGES = ("python", "python3", "py")
FENCE = "```"
_DECIMAL = re.compile(r"[+-]?[0-9]+\.[0-9]+(?:[eE][+-]?[0-9]+)?")
_TOLERANCE = 1e-6


def tests_of(record: Mapping[str, Any]) -> Calls | list[Case]:
    r"""The tests in a data record.

    Args:
        record: with the columns of one of `SCHEMAS`; `input_output` may be JSON text.

    Raises:
        ValueError: it has none of them, or no tests in them.

    Example:
        >>> [case] = tests_of({"inputs": ["1 2"], "outputs": ["3"]})
        >>> case.given, case.accepts("3 \n")
        ('1 2', True)
    """
    if "inputs" in record:
        return _cases(record["inputs"], record.get("outputs", ()))
    if "input_output" in record:
        return _apps(record)
    if found := [record[f"{kind}_tests"] for kind in ("public", "private", "generated") if record.get(f"{kind}_tests")]:
        given = [text for part in found for text in part["input"]]
        return _cases(given, [text for part in found for text in part["output"]])
    if (begun := _begun(record)) is not None:
        name = record["entry_point"]
        return Calls(tests=[f"{record['test']}\n\ncheck({name})"], setup=begun, names=[name])
    if record.get("test_list"):
        return _mbpp(record)
    raise ValueError(f"the record has no tests: its columns are {sorted(record)}, needed are those of one of {SCHEMAS}")


def _begun(record: Mapping[str, Any]) -> str | None:
    """The program that a problem of HumanEval begins; None of another. A prompt may say more than the program."""
    return record.get("code_prompt", record.get("prompt")) if {"test", "entry_point"} <= record.keys() else None


def _cases(inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Case]:
    pairs = [(_text(given), _text(expected)) for given, expected in zip(*_paired(inputs, outputs), strict=True)]
    return [Case(given=given, accepts=partial(same_output, expected)) for given, expected in pairs]


def _paired(inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"the record has {len(inputs)} inputs and {len(outputs)} outputs: as many are needed, and one")
    return inputs, outputs


def _text(value: Any) -> str:
    """A text; APPS has some as lists of lines."""
    return value if isinstance(value, str) else "\n".join(map(str, value))


def _apps(record: Mapping[str, Any]) -> Calls | list[Case]:
    tests = record["input_output"]
    try:
        tests = json.loads(tests) if isinstance(tests, str) else tests
    except ValueError as error:
        raise ValueError(f"input_output is not JSON: {error}") from None
    if not isinstance(tests, Mapping) or not {"inputs", "outputs"} <= tests.keys():
        raise ValueError(f"input_output must hold inputs and outputs, got {tests!r:.80}")
    given, expected = _paired(tests["inputs"], tests["outputs"])
    if "fn_name" not in tests:
        return _cases(given, expected)
    method = "class Solution" in (record.get("starter_code") or "")
    name = f"Solution().{tests['fn_name']}" if method else tests["fn_name"]
    return Calls(tests=[_call(name, *pair) for pair in zip(given, expected, strict=True)])


def _call(name: str, args: Sequence[Any], expected: Any) -> str:
    """A test of one call. APPS writes most results in a list of one, and tuples as lists."""
    accepted = [expected, expected[0]] if isinstance(expected, list) and len(expected) == 1 else [expected]
    lines = [f"result = {name}(*{list(args)!r})", "result = list(result) if isinstance(result, tuple) else result"]
    return "\n".join([*lines, f"assert any(result == right for right in {accepted!r})"])


def _mbpp(record: Mapping[str, Any]) -> Calls:
    tests = list(record["test_list"])
    setup = "\n".join([*record.get("test_imports", ()), record.get("test_setup_code") or ""])
    defined = re.findall(r"^(?:def|class)\s+(\w+)", record.get("code") or "", re.MULTILINE)
    used = set(re.findall(r"\w+", "\n".join(tests)))
    return Calls(tests=tests, setup=setup, names=[name for name in defined if name in used])


def same_output(expected: str, printed: str) -> bool:
    r"""Whether two outputs agree line by line and word by word, but for white space; decimals within 1e-6.

    Example:
        >>> same_output("1 2\n0.5\n", " 1  2\n0.50000001\n\n"), same_output("1 2", "1\n2")
        (True, False)
    """
    right, seen = _words(expected), _words(printed)
    if len(right) != len(seen):
        return False
    return all(len(a) == len(b) and all(map(_same_word, a, b)) for a, b in zip(right, seen, strict=True))


def _words(text: str) -> list[list[str]]:
    return [line.split() for line in text.rstrip().splitlines()]


def _same_word(expected: str, printed: str) -> bool:
    if expected == printed:
        return True
    if not _DECIMAL.fullmatch(expected) or not re.fullmatch(r"[-+.eE0-9]{1,60}", printed):
        return False
    try:
        return math.isclose(float(expected), float(printed), rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    except ValueError:
        return False


def program_of(text: str, record: Mapping[str, Any], whole_text: bool = True) -> str | None:
    r"""The program in a completion; None if there is none.

    It is the last closed block in a Python fence, else the last in a plain one, else the whole text. Where the record
    is of HumanEval, a completion that does not define the function itself goes on where the prompt ends.

    Args:
        text: the completion.
        record: of the problem.
        whole_text: whether a completion without a closed block is a program.

    Example:
        >>> program_of("so:\n```python\nprint(1)\n```\nDone.", {})
        'print(1)'
    """
    blocks = list(fenced_blocks(text))
    code = next((body for language, body in reversed(blocks) if language in LANGUAGES), None)
    code = code if code is not None else next((body for language, body in reversed(blocks) if not language), None)
    if code is None and whole_text and not blocks:
        code = text
    prompt = _begun(record)
    if code is None or prompt is None:
        return code
    definition = re.compile(rf"^(?:async +)?def +{re.escape(record['entry_point'])}\b", re.MULTILINE)
    if not definition.search(code):
        return f"{prompt}{code}"
    before = [found.start() for found in definition.finditer(prompt)]
    return f"{prompt[: before[-1]] if before else prompt}\n{code}"


def fenced_blocks(text: str) -> Iterable[tuple[str, str]]:
    """Language and body of each closed block between lines that begin with three backticks."""
    language: str | None = None
    body: list[str] = []
    for line in text.split("\n"):
        mark = line.strip()
        if language is None and mark.startswith(FENCE):
            language, body = mark.removeprefix(FENCE).strip().lower(), []
        elif language is not None and mark == FENCE:
            yield language, "\n".join(body)
            language = None
        else:
            body.append(line)
