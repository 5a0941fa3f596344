"""Programs judged by tests: outputs compared on this side, calls made from a process that the program cannot touch."""

from __future__ import annotations

import compileall
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlvr_lightning.rewards.sandbox import bubblewrap
from rlvr_lightning.rewards.sandbox.limits import Limits
from rlvr_lightning.rewards.sandbox.run import Run, RunEnded

INSTALL = "install bubblewrap (Debian, Ubuntu: apt-get install bubblewrap)"
WEAKER = "or set allow_weak_sandbox: true, which keeps limits of time and memory but lets programs read this machine"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of a program on standard input."""

    given: str
    """Its standard input."""
    accepts: Callable[[str], bool]
    """Whether some standard output is right; asked on this side of the sandbox."""


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Tests that call what a program defines."""

    tests: Sequence[str]
    """Python texts; each passes if it raises nothing."""
    setup: str = ""
    """Python text that the tests need."""
    names: Sequence[str] = ()
    """What the program must define, whatever the name means elsewhere; other unknown names are the program's too."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What tests said of a program."""

    passed: int
    total: int
    why: str
    """The first failure; empty if all passed."""


class Sandbox:
    """Runs programs, each in processes, a network and a /tmp of its own; may be used from several threads at a time.

    With bubblewrap a program sees the interpreter, the standard library and system libraries, read-only, and nothing
    else of the machine; no process but its own, no network, no environment. Its tests are not there to be read: outputs
    are compared outside, and calls come from a checker in another process (`inside/checker.py`). What is left to it is
    to use up what `limits` allow, and what the kernel has left open. Not limited but by time: how many empty files.

    Args:
        limits: what a run may take.
        allow_weak_sandbox: without bubblewrap, run programs with limits on each process, in a session and a temporary
            folder of their own. They then can read files and use the network as this user, find the tests in the memory
            of the checker, and leave processes behind.

    Raises:
        ValueError: bubblewrap is missing or does not work here, and the weak sandbox is not allowed.
    """

    def __init__(self, limits: Limits | None = None, allow_weak_sandbox: bool = False) -> None:
        self.limits = limits or Limits()
        compileall.compile_dir(bubblewrap.FOLDER / "inside", quiet=2)  # for all runs to come, where it can be written
        self.bwrap = bubblewrap.find()
        problem = "it is not installed" if self.bwrap is None else self._problem()
        if problem and not allow_weak_sandbox:
            raise ValueError(f"running programs needs bubblewrap, and {problem}: {INSTALL}, {WEAKER}")
        if problem:
            self.bwrap = None
            if weak := self._problem():
                raise ValueError(f"the weak sandbox does not work either: {weak}")

    def _problem(self) -> str:
        """Why an honest program does not pass here."""
        try:
            verdict = self.run_cases("print(input())", [Case(given="x\n", accepts=lambda out: out == "x\n")])
        except (RuntimeError, OSError, ValueError) as error:
            return f"it does not work here ({error})"
        return f"a program does not run in it ({verdict.why})" if verdict.why else ""

    def run_cases(self, program: str, cases: Sequence[Case], stop: bool = True) -> Verdict:
        """Run a program on one standard input after another.

        It passes a case by a right output and the exit status 0. Nothing it started outlives the case; files in its
        /tmp stay for the next case.

        Args:
            program: Python text.
            cases: at least one.
            stop: whether to end at the first failure.

        Raises:
            RuntimeError: the sandbox did not start.
            ValueError: an input has no place in its /tmp, where it is read from.
        """
        passed, why = 0, ""
        longest = max(len(case.given) for case in cases) * 4  # bytes of a character, at most
        if longest > self.limits.tmp_mib << 20:
            raise ValueError(f"limits.tmp_mib is {self.limits.tmp_mib}; an input needs {-(-longest // (1 << 20))}")
        with Run(program, "cases", self.limits, self.bwrap) as run:
            for number, case in enumerate(cases):
                try:
                    run.send(case.given.encode("utf-8", "surrogatepass"))
                    problem = _problem(run.receive(), case)
                except RunEnded as error:
                    return Verdict(passed=passed, total=len(cases), why=why or f"case {number}: {error}")
                passed += not problem
                why = why or (problem and f"case {number}: {problem}")
                if problem and stop:
                    break
        return Verdict(passed=passed, total=len(cases), why=why)

    def run_calls(self, program: str, calls: Calls, stop: bool = True) -> Verdict:
        """Load a program once, and run tests that call it.

        Args:
            program: Python text.
            calls: tests, at least one.
            stop: whether to end at the first failure.

        Raises:
            RuntimeError: the sandbox did not start.
            ValueError: the tests do not compile, or what they need cannot be run.
        """
        total = len(calls.tests)
        tests = {"setup": calls.setup, "names": list(calls.names), "tests": list(calls.tests), "stop": stop}
        with Run(program, "calls", self.limits, self.bwrap) as run:
            try:
                run.send(tests)
                answer: dict[str, Any] = run.receive()
            except RunEnded as error:
                return Verdict(passed=0, total=total, why=str(error))
        if answer["invalid"]:
            raise ValueError(f"the tests themselves cannot run: {answer['invalid']}")
        return Verdict(passed=sum(answer["passed"]), total=total, why=answer["why"])


def _problem(outcome: dict[str, Any], case: Case) -> str:
    """What is wrong with a run on standard input."""
    if outcome["too_much"]:
        return "it printed more than output_mib"
    if outcome["status"] < 0:
        name = signal.Signals(-outcome["status"]).name
        return f"it was ended by {name}{', it took longer than cpu_s' if name == 'SIGXCPU' else ''}"
    if outcome["status"]:
        lines = outcome["error"].decode("utf-8", "replace").strip().splitlines()
        return f"exit status {outcome['status']}: {lines[-1] if lines else ''}"[:300]
    try:
        right = case.accepts(outcome["out"].decode("utf-8"))
    except UnicodeDecodeError:
        return "its output is not UTF-8"
    return "" if right else "wrong output"
