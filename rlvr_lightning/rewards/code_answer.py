"""Programs, run against the tests of their problem."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.code_tests import program_of, tests_of
from rlvr_lightning.rewards.sandbox import Calls, Limits, Sandbox, Verdict
from rlvr_lightning.schema import Sample


class CodeAnswer(Reward):
    """1 if the program in a completion passes the tests of its record, else 0, or the share of tests it passes.

    Tests are outputs for given standard inputs, or Python code that calls the program's functions; where the columns
    of a record hold them: `code_tests.tests_of`. Programs are run by `sandbox.Sandbox`. They have the standard library
    and no other packages. Arguments of calls are copies, and results are compared as plain data (numbers, text, lists,
    tuples, sets, dicts): a change made in place is not seen, an object of a class of the program's equals nothing.

    Args:
        credit: `all` tests or nothing, or the `share` passed.
        whole_text: whether a completion without a fenced block is a program as a whole.
        limits: what the run of a program may take.
        workers: programs run at a time; by default as many as there are cores.
        allow_weak_sandbox: whether to do with less where bubblewrap is not installed or does not work; see `Sandbox`.

    Raises:
        ValueError: a setting is impossible, bubblewrap is missing, or (on scoring) a record has no tests that can run.
    """

    def __init__(
        self,
        credit: Literal["all", "share"] = "all",
        whole_text: bool = True,
        limits: Limits | None = None,
        workers: int | None = None,
        allow_weak_sandbox: bool = False,
    ) -> None:
        if credit not in ("all", "share"):
            raise ValueError(f"credit must be all or share, got {credit!r}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.credit = credit
        self.whole_text = whole_text
        self.workers = workers or os.cpu_count() or 1
        self.sandbox = Sandbox(limits, allow_weak_sandbox)

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """0.0 to 1.0 for each sample; ValueError if tests cannot run, RuntimeError if the sandbox does not."""
        verdicts = self.verdicts(samples)
        if self.credit == "share":
            return [verdict.passed / verdict.total for verdict in verdicts]
        return [float(verdict.passed == verdict.total) for verdict in verdicts]

    def explain(self, sample: Sample) -> str:
        """How many tests a sample passes, and its first failure."""
        [verdict] = self.verdicts([sample])
        counted = f"{verdict.passed} of {verdict.total} tests passed"
        return f"{counted}; {verdict.why}" if verdict.why else counted

    def verdicts(self, samples: Sequence[Sample]) -> list[Verdict]:
        """What the tests say of each sample, and why; under `all` tests after the first failure are not run."""
        with ThreadPoolExecutor(max_workers=self.workers) as threads:
            return list(threads.map(self._verdict, samples))

    def problem_with(self, record: Mapping[str, Any]) -> str | None:
        """Why no program could be judged by a record's tests; None if one could be."""
        try:
            self._judged("", record)
        except ValueError as error:
            return str(error)
        return None

    def _verdict(self, sample: Sample) -> Verdict:
        program = program_of(sample.text, sample.record, self.whole_text)
        if program is None:
            return Verdict(passed=0, total=1, why="no program: no closed block between ``` in the completion")
        return self._judged(program, sample.record)

    def _judged(self, program: str, record: Mapping[str, Any]) -> Verdict:
        tests, stop = tests_of(record), self.credit == "all"
        if isinstance(tests, Calls):
            return self.sandbox.run_calls(program, tests, stop)
        return self.sandbox.run_cases(program, tests, stop)
