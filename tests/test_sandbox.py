"""Hostile programs: they earn nothing and harm nothing, while an honest one beside them is paid.

`hostile/calls_*.txt` attack what calls their functions, `hostile/cases_*.txt` what runs them on standard input. They
are no .py files, so that nothing imports them by accident.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlvr_lightning.rewards.code_answer import CodeAnswer
from rlvr_lightning.rewards.sandbox import Case, Limits, Sandbox
from rlvr_lightning.rewards.sandbox import sandbox as sandbox_module
from rlvr_lightning.rewards.sandbox.bubblewrap import is_administrator
from rlvr_lightning.rewards.sandbox.inside.plain import decode, encode
from rlvr_lightning.rewards.sandbox.seccomp import filter_program
from rlvr_lightning.schema import Sample

HOSTILE = sorted((Path(__file__).parent / "hostile").glob("*.txt"))
CALLS = [path for path in HOSTILE if path.name.startswith("calls_")]
WAITING = [path for path in HOSTILE if "# waits" in path.read_text()]
LIMITS = Limits(cpu_s=1, wall_s=3.0, memory_mib=512, processes=3, tmp_mib=8, output_mib=1)
DOUBLES: dict[float, float] = {21: 42, -3: -6, 0.25: 0.5, 4: 8, 9: 18}
TESTS = [
    *(f"assert double({x}) == {y}" for x, y in DOUBLES.items()),
    "assert all(map(lambda pair: double(pair[0]) == pair[1], [(2, 4), (5, 10)]))",
    "assert abs(double(1.5) - 3) < 1e-9",
    "import unittest\nunittest.TestCase().assertEqual(double(8), 16)",
]
CALLS_RECORD = {"test_list": TESTS}
CASES_RECORD = {"inputs": ["21\n7\n"], "outputs": ["42 14"]}
HONEST_CALLS = "def double(x):\n    return 2 * x"
HONEST_CASES = "print(2 * int(input()), 2 * int(input()))"

needs_bwrap = pytest.mark.skipif(
    shutil.which("bwrap") is None and not os.environ.get("CI"), reason="apt-get install bubblewrap"
)
pytestmark = needs_bwrap


def sample(program: str, record: dict[str, Any]) -> Sample:
    return Sample(prompt="", text=program, token_ids=[], record=record)


def record_of(path: Path) -> dict[str, Any]:
    return CALLS_RECORD if path in CALLS else CASES_RECORD


@pytest.fixture(scope="module")
def reward() -> CodeAnswer:
    return CodeAnswer(credit="share", limits=LIMITS, workers=2)


@dataclass
class Host:
    """What a hostile program could reach, were it let."""

    file: Path
    tests: Path
    server: socket.socket
    abstract: socket.socket

    def arm(self, program: str) -> str:
        """The program, told where everything is."""
        for name, value in {
            "HOST_FILE": self.file,
            "TESTS_FILE": self.tests,
            "HOST_PORT": self.server.getsockname()[1],
            "HOST_PID": os.getpid(),
        }.items():
            program = program.replace(name, str(value))
        return program

    def check(self) -> None:
        """Nothing was changed, and nobody called."""
        assert self.file.read_text() == "precious"
        assert sorted(path.name for path in self.file.parent.iterdir()) == ["precious.txt", "tests.json"]
        for server in (self.server, self.abstract):
            with pytest.raises(BlockingIOError):
                server.accept()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("HOST_SECRET", "HOST_SECRET")
    file, tests = tmp_path / "precious.txt", tmp_path / "tests.json"
    file.write_text("precious")
    tests.write_text(json.dumps({str(x): y for x, y in DOUBLES.items()}))
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0rlvr_hostile_{os.getpid()}")
        abstract.listen()
        for each in (server, abstract):
            each.setblocking(False)
        yield Host(file, tests, server, abstract)


def sandbox_processes() -> set[int]:
    """Processes of runs: by their command, or by the users that only runs have."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, user = (folder / "cmdline").read_bytes(), folder.stat().st_uid
        except OSError:
            continue
        if b"inside.supervisor" in command or user >= 1_000_000_000:
            found.add(int(folder.name))
    return found


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("rlvr_run_*"))


def test_there_are_many() -> None:
    assert len(HOSTILE) >= 100 and len(WAITING) == 7


def attack(paths: list[Path], reward: CodeAnswer, host: Host) -> None:
    """Run some hostile programs and an honest one of each kind at the same time."""
    before, files = sandbox_processes(), folders()
    samples = [sample(host.arm(path.read_text()), record_of(path)) for path in paths]
    honest = [sample(HONEST_CALLS, CALLS_RECORD), sample(HONEST_CASES, CASES_RECORD)]
    *verdicts, calls, cases = reward.verdicts([*samples, *honest])
    assert sandbox_processes() <= before
    assert folders() <= files
    host.check()
    for path, verdict in zip(paths, verdicts, strict=True):
        partly = "# earns part" in path.read_text()
        assert (0 < verdict.passed < verdict.total if partly else verdict.passed == 0) and verdict.why, path.stem
    for verdict in (calls, cases):
        assert verdict.passed == verdict.total, verdict.why


@pytest.mark.parametrize("path", sorted({*HOSTILE} - {*WAITING}), ids=lambda path: path.stem)
def test_a_hostile_program_earns_and_harms_nothing(path: Path, reward: CodeAnswer, host: Host) -> None:
    attack([path], reward, host)


def test_hostile_programs_that_wait_for_their_time_to_end(host: Host) -> None:
    attack(WAITING, CodeAnswer(credit="share", limits=LIMITS, workers=len(WAITING) + 1), host)


def test_most_cheats_would_be_paid_where_the_asserts_share_their_interpreter() -> None:
    sandbox = Sandbox(LIMITS)
    paying = [path for path in CALLS if path.read_text().startswith("# pays where")]
    assert len(paying) >= 10
    for path in paying:
        verdict = sandbox.run_cases(
            "\n".join([path.read_text(), *TESTS[:5]]), [Case(given="", accepts=lambda out: True)]
        )
        assert not verdict.why, path.stem
    for name, paid in {"calls_builtins_overridden": 6, "calls_unittest_patched": 7, "calls_stop_iteration": 5}.items():
        program = (Path(__file__).parent / "hostile" / f"{name}.txt").read_text()
        verdict = sandbox.run_cases(f"{program}\n{TESTS[paid]}", [Case(given="", accepts=lambda out: True)])
        assert not verdict.why, name


def test_a_program_that_ends_fails_also_a_test_that_swallows_everything(reward: CodeAnswer) -> None:
    record = {"test_list": ["try:\n    double(1)\nexcept BaseException:\n    pass", "pass"]}
    ends, raises = reward.verdicts(
        [sample(f"import os\ndef double(x): {does}", record) for does in ("os._exit(0)", "raise ValueError")]
    )
    assert (ends.passed, raises.passed) == (0, 2)


def test_right_answers_do_not_pay_for_a_process_left_behind(reward: CodeAnswer) -> None:
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\n" + HONEST_CASES
    before = sandbox_processes()
    [verdict] = reward.verdicts([sample(program, CASES_RECORD)])
    assert verdict.passed == 1  # it is right, and what it left is gone
    assert sandbox_processes() <= before


def test_a_case_finds_no_process_of_the_case_before() -> None:
    program = """
import os, time
for process in range(3, 100):
    try:
        os.kill(process, 0)
        if process != os.getpid():
            print("somebody is here")
    except OSError:
        pass
if os.fork() == 0:
    os.setsid()
    time.sleep(1000)
"""
    cases = [Case(given="", accepts=lambda out: out == "")] * 3
    verdict = Sandbox(LIMITS).run_cases(program, cases)
    assert verdict.passed == 3, verdict.why


def test_memory_is_limited_for_all_processes_together() -> None:
    """Whatever the program forks, it gets 3 shares of a fourth of 512 MiB; each reports how many MiB it could take."""
    program = """
import os, time
read, write = os.pipe()
first = os.getpid()
for _ in range(10):
    try:
        if os.fork() == 0:
            break
    except OSError:
        pass
spare, held = bytearray(1 << 20), []
try:
    while True:
        held.append(bytearray(1 << 20))
except MemoryError:
    del spare
os.write(write, b"%d " % len(held))
time.sleep(1.5)
if os.getpid() == first:
    os.write(1, os.read(read, 10000))
"""
    printed: list[str] = []
    limits = Limits(memory_mib=512, processes=3)
    verdict = Sandbox(limits).run_cases(program, [Case(given="", accepts=lambda out: not printed.append(out))])
    assert not verdict.why
    got = [int(word) for word in printed[0].split()]
    assert len(got) == 3 and 200 < sum(got) <= 384


@pytest.mark.parametrize("administrator", [False, True])
def test_the_program_finds_no_more_than_python(administrator: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if administrator and not is_administrator():
        pytest.skip("needs root")
    monkeypatch.setattr("rlvr_lightning.rewards.sandbox.bubblewrap.is_administrator", lambda: administrator)
    program = """
import glob, os, sys
print(os.listdir("/tmp"), os.path.exists("/proc/self"), len(os.environ) < 4, os.path.exists("/bin/sh"))
print(any("site-packages" in path for path in sys.path), bool(glob.glob(sys.prefix + "/lib/python3*/site-packages/*")))
print(os.access("/", os.W_OK), os.access("/dev", os.W_OK), os.access(os.__file__, os.W_OK), os.access("/tmp", os.W_OK))
"""
    printed: list[str] = []
    Sandbox(LIMITS).run_cases(program, [Case(given="", accepts=lambda out: bool(printed.append(out)))])
    assert printed[0].splitlines() == ["[] False True False", "False False", "False False False True"]


def test_processes_of_a_run_end_with_the_host(tmp_path: Path) -> None:
    script = """
from rlvr_lightning.rewards.sandbox import *
Sandbox(Limits(wall_s=60.0)).run_cases("import time; time.sleep(50)", [Case(given="", accepts=bool)])
"""
    before = sandbox_processes()
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while len(sandbox_processes() - before) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while sandbox_processes() - before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("administrator", [False, True])
def test_both_ways_to_be_nobody_run_programs(administrator: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if administrator and not is_administrator():
        pytest.skip("needs root")
    monkeypatch.setattr("rlvr_lightning.rewards.sandbox.bubblewrap.is_administrator", lambda: administrator)
    program = "import os\ntry:\n    os.setuid(0)\nexcept OSError:\n    print(os.getuid())"
    printed: list[str] = []
    Sandbox(LIMITS).run_cases(program, [Case(given="", accepts=lambda out: bool(printed.append(out)))])
    assert int(printed[0]) > 1_000_000_000 if administrator else int(printed[0]) == 65534


ORDINARY_USER = (
    """
import sys, types
for name, path in (("rlvr_lightning", "."), ("rlvr_lightning.rewards", ".")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from rlvr_lightning.rewards.sandbox import Calls, Case, Limits, Sandbox
forks = """
    + repr(
        """
import os, time
made = 0
try:
    for _ in range(20):
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)
        made += 1
except OSError:
    print(made, os.getuid())
"""
    )
    + """
sandbox = Sandbox(Limits(processes=3))
assert not sandbox.run_cases(forks, [Case(given="", accepts=lambda out: out == "2 65534\\n")]).why
assert not sandbox.run_calls("def f(x): return 2 * x", Calls(tests=["assert f(2) == 4"])).why
assert sandbox.run_calls("import os\\ndef f(x): os.kill(os.getppid(), 9)", Calls(tests=["assert f(2) == 4"])).why
"""
)


@pytest.mark.skipif(not is_administrator() or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_an_ordinary_user_has_the_same_limits() -> None:
    system = "/usr/bin/python3"
    check = subprocess.run([system, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], check=False)
    if check.returncode:
        pytest.skip("needs a Python that all users can read")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        shutil.copytree(Path(sandbox_module.__file__).parent, Path(folder) / "sandbox")
        command = [
            "setpriv",
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            system,
            "-B",
            "-c",
            ORDINARY_USER,
        ]
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if "needs bubblewrap" in found.stderr:
        pytest.skip("ordinary users may make no namespaces here")
    assert found.returncode == 0, found.stderr


def test_without_bubblewrap_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlvr_lightning.rewards.sandbox.bubblewrap.find", lambda: None)
    with pytest.raises(ValueError, match=r"not installed: install bubblewrap .* or set allow_weak_sandbox: true"):
        CodeAnswer()


def test_a_bubblewrap_that_does_not_work_is_told_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr("rlvr_lightning.rewards.sandbox.bubblewrap.find", lambda: str(fake))
    with pytest.raises(ValueError, match=r"does not work here .*No permissions to create new namespace.*weak_sandbox"):
        CodeAnswer()
    assert CodeAnswer(allow_weak_sandbox=True).sandbox.bwrap is None


def test_the_weak_sandbox_keeps_time_memory_and_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlvr_lightning.rewards.sandbox.bubblewrap.find", lambda: None)
    before, files = sandbox_processes(), folders()
    reward = CodeAnswer(limits=LIMITS, allow_weak_sandbox=True)
    hostile = ["while True: pass", "x = bytearray(1 << 30)", "import time\ntime.sleep(9)", "open('a', 'w').write('a')"]
    hostile += ["import os, time\nif not os.fork(): time.sleep(99)"]
    samples = [sample(f"{program}\nprint(42, 14)", CASES_RECORD) for program in hostile]
    values = reward([*samples, sample(HONEST_CASES, CASES_RECORD), sample(HONEST_CALLS, CALLS_RECORD)])
    assert values == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert folders() <= files
    deadline = time.monotonic() + 10
    while sandbox_processes() - before:  # killed, and soon gone
        assert time.monotonic() < deadline


@pytest.mark.parametrize("name", ["cpu_s", "wall_s", "memory_mib", "processes", "tmp_mib", "output_mib"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_limit_must_be_positive(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"limits.{name} must be positive"):
        Limits(**{name: value})  # type: ignore[arg-type]


def test_the_filter_knows_two_machines_and_says_so() -> None:
    assert len(filter_program("x86_64")) == len(filter_program("aarch64"))
    assert filter_program("x86_64") != filter_program("aarch64")
    with pytest.raises(ValueError, match=r"knows the system calls of \['aarch64', 'x86_64'\], not of 'mips'"):
        filter_program("mips")


VALUES = [
    None,
    True,
    0,
    -1,
    127,
    128,
    -128,
    -129,
    2**64,
    -(2**64),
    10**4000,
    0.1,
    -0.0,
    float("inf"),
    1j,
    "",
    "a\ud800\u00e9",
]
VALUES += [b"\0", [], [[1], (2,), {3}, frozenset({4})], {"a": {1: [None]}}, ((), [()])]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20] if not isinstance(value, int) else "int")
def test_plain_values_arrive_as_they_were(value: Any) -> None:
    back = decode(encode(value))
    assert back == value and type(back) is type(value) and repr(back)[:100] == repr(value)[:100]


def test_what_is_not_plain_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="type object cannot be sent"):
        encode([object()])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"NN",
        b"i",
        b"i\xff\0\0\0\1",
        b"l\xff\xff\xff\xffN",
        b"S\1\0\0\0l\0\0\0\0",
        b"d\1\0\0\0N",
        b"r\0\0\0\0",
        b"s\1\0\0\0\xff",
        b"l\1\0\0\0" * 100_000,
    ],
)
def test_lies_are_an_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a value"):
        decode(data)


def test_the_host_survives_a_supervisor_that_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\nhead -c 100000 /dev/zero | tr '\\0' '\\377'\nsleep 0.2\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sandbox_module.bubblewrap, "find", lambda: str(fake))
    with pytest.raises(ValueError, match="did not start: the answer is too long"):
        Sandbox(LIMITS)
