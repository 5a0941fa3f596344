"""Verifications per second, and agreement with another project's test cases: `-m rlvr_lightning.profiling.bench_math`.

Speed: answers as a model gives them to competition problems, eight to a right answer, some right, all written
differently, so that nothing is remembered; by the pool of `MathAnswer`, and by one process that is asked one question
at a time. Then the same with one endless answer among every hundred.

Agreement: the cases of math-verify's own test files, read out of its source package and never run. A case whose
prediction is a long text is judged by its last box or formula. Every disagreement is kept in the record.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlvr_lightning.rewards.math_answer import MathAnswer
from rlvr_lightning.rewards.math_text import bare, last_boxed
from rlvr_lightning.schema import Sample

POISON = "9^{9^{9^{9}}}"
GROUP = 8
_FORMULA = re.compile(r"\$\$?(.+?)\$\$?|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)


def problem(rng: random.Random) -> tuple[str, list[str]]:
    """A right answer, and `GROUP` answers to it, of which about a third are right."""
    a, b, c = (rng.randint(2, 99) for _ in range(3))
    kind = rng.choices(["integer", "fraction", "root", "pair", "interval", "expression"], [60, 18, 7, 6, 4, 5])[0]
    gold, right, wrong = {
        "integer": (str(a * b), rf"{a} \cdot {b}", "{}"),
        "fraction": (rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{a * c}}}{{{b * c}}}", rf"\frac{{{{{{}}}}}}{{{{{b}}}}}"),
        "root": (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}", rf"{{}}\sqrt{{{{{b}}}}}"),
        "pair": (f"({a}, {b})", f"({a},{b})", f"({{}}, {b})"),
        "interval": (rf"[{a}, {a + b})", rf"x \in [{a}, {a + b})", f"[{{}}, {a + b})"),
        "expression": (f"x^2+{a}x", f"x(x+{a})", "x^2+{}x"),
    }[kind]
    answers = [f"{right}+{n}-{n}" if kind in ("integer", "fraction", "root") else right + " " * n for n in range(3)]
    return gold, answers + [wrong.format(a * 100 + n) for n in range(GROUP - len(answers))]


def samples_of(count: int, seed: int, poison_every: int = 0) -> list[Sample]:
    """Boxed answers to random problems."""
    rng = random.Random(f"bench/{seed}")
    made: list[Sample] = []
    while len(made) < count:
        gold, answers = problem(rng)
        made += [_boxed(answer, gold) for answer in answers]
    for at in range(poison_every // 2, count, poison_every) if poison_every else ():
        made[at] = _boxed(f"{POISON}+{at}", made[at].record["answer"])
    return made[:count]


def _boxed(answer: str, gold: str) -> Sample:
    return Sample(prompt="", text=rf"It is \boxed{{{answer}}}.", token_ids=[], record={"answer": gold})


def per_second(reward: MathAnswer, samples: Sequence[Sample], batch: int) -> float:
    """Verifications in a second, the processes already started."""
    reward([_boxed("1", "1+0")])
    started = time.perf_counter()
    for at in range(0, len(samples), batch):
        reward(samples[at : at + batch])
    return len(samples) / (time.perf_counter() - started)


def speed(count: int) -> dict[str, Any]:
    """Rates of the pool, of one process, and with poison."""
    rates: dict[str, Any] = {"verifications": count, "group": GROUP}
    for name, workers, batch, poison in (
        ("pool", None, 512, 0),
        ("one at a time", 1, 1, 0),
        ("poisoned", None, 512, 100),
    ):
        reward = MathAnswer(time_limit_s=1.0, workers=workers)
        rates[f"{name} per_s"] = per_second(reward, samples_of(count, seed=0, poison_every=poison), batch)
        reward.verifier.close()
    return rates


def fetch_cases(folder: Path) -> list[Path]:
    """Test files of the installed version of math-verify, from its source package; OSError if there is none to be had.

    The package is fetched without being built, and only texts are read out of it.
    """
    wanted = f"math-verify=={version('math-verify')}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
    ]
    done = subprocess.run([*command, "-d", str(folder), wanted], capture_output=True, text=True, timeout=300)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        raise OSError(f"cannot fetch the source of {wanted}: {done.stderr.strip()[-300:]}")
    with tarfile.open(archives[0]) as archive:
        for member in archive.getmembers():
            if re.fullmatch(r"[^/]+/tests/test_\w+\.py", member.name) and (file := archive.extractfile(member)):
                (folder / Path(member.name).name).write_bytes(file.read())
    return sorted(folder.glob("test_*.py"))


def read_cases(files: Sequence[Path]) -> Iterator[tuple[str, str, str, bool]]:
    """(place, right answer, prediction, whether it is right) of every parametrized test that has these."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != "parametrize":
                continue
            names = [name.strip() for name in str(ast.literal_eval(node.args[0])).split(",")]
            if names[:2] != ["gold", "pred"] or not isinstance(node.args[1], ast.List):
                continue
            for row in node.args[1].elts:
                try:
                    gold, prediction, right = ast.literal_eval(row)[:3]
                except ValueError:  # made by code
                    continue
                yield f"{file.name}:{row.lineno}", gold, prediction, bool(right)


def stated(prediction: str) -> str | None:
    """The last box of a prediction, else its last formula, else all of it."""
    formulas = _FORMULA.findall(prediction)
    return last_boxed(prediction) or bare("".join(formulas[-1]) if formulas else prediction)


def agreement(files: Sequence[Path]) -> dict[str, Any]:
    """How often the reward says what the cases say, and where it does not."""
    reward = MathAnswer()
    found: dict[str, Any] = {"cases": 0, "agree": 0, "unusable_gold": [], "wrong_for_us": [], "right_for_us": []}
    for place, gold, prediction, right in read_cases(files):
        found["cases"] += 1
        told = {"case": place, "gold": gold[-80:], "answer": (stated(prediction) or "")[:80]}
        try:
            earned = reward([_boxed(stated(prediction) or "", gold)])[0] == 1.0
        except ValueError:
            found["unusable_gold"].append(told)
            continue
        if earned == right:
            found["agree"] += 1
        else:
            found["right_for_us" if earned else "wrong_for_us"].append(told)
    reward.verifier.close()
    return found


def main(argv: list[str] | None = None) -> int:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4000, help="verifications in each measurement of speed")
    parser.add_argument("--out", type=Path, default=Path("results/bench_math.json"))
    args = parser.parse_args(argv)
    record: dict[str, Any] = {
        "command": "python -m rlvr_lightning.profiling.bench_math",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("math-verify", "sympy", "latex2sympy2_extended")},
        "speed": speed(args.count),
    }
    with tempfile.TemporaryDirectory() as folder:
        record["agreement"] = agreement(fetch_cases(Path(folder)))
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    told = {name: value if isinstance(value, int) else len(value) for name, value in record["agreement"].items()}
    print(json.dumps(record["speed"], indent=1), json.dumps(told), f"wrote {args.out}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
