"""`python -m rlvr_lightning compare A B`: whether B answers better than A, problem by problem.

A and B are files of problems that `validate` or `test` wrote, or run folders with one. The greedy completions are
compared by McNemar's exact test, the rates of right samples by a paired bootstrap over the problems; both p-values are
two-sided. Both files must hold the same problems.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlvr_lightning.estimates import interval, mcnemar_p, paired_p
from rlvr_lightning.evaluation_table import aligned
from rlvr_lightning.problem_file import Row, about, differences, read_rows

SHOWN = 3
CHANCE, LEAST = 0.05, 0.0001
Problems = dict[tuple[str, str, int], Row]
"""By benchmark, id, and how often the id came before."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """B less A on one benchmark, in one measure."""

    benchmark: str
    measure: str
    problems: int
    a: float
    b: float
    low: float
    high: float
    """Of the difference, with 95 % confidence."""
    p: float
    how: str
    """What the p-value was computed from."""

    def cells(self) -> list[str]:
        """A row of the table, in per cent."""
        shares = [f"{100 * share:.1f}" for share in (self.a, self.b)]
        bounds = f"[{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        points = f"{100 * (self.b - self.a):+.1f}"
        return [self.benchmark, self.measure, str(self.problems), *shares, points, bounds, told_p(self.p)]

    def words(self) -> str:
        """The same in a sentence."""
        points = f"{100 * abs(self.b - self.a):.1f}".removesuffix(".0")
        what = f"a difference of {points} points" if self.a != self.b else "no difference"
        verdict = "could be chance" if self.p >= CHANCE else "unlikely to be chance"
        p = f"p {told_p(self.p)}" if self.p < LEAST else f"p = {told_p(self.p)}"
        return f"{self.benchmark}, {self.measure}: {what} on {self.problems} problems ({self.how}): {p}; {verdict}"


def told_p(p: float) -> str:
    """A p-value for people.

    >>> told_p(0.6875), told_p(0.00042), told_p(1e-9), told_p(1.0)
    ('0.69', '0.00042', '< 0.0001', '1')
    """
    return f"< {LEAST}" if p < LEAST else f"{p:.2g}"


def find_file(source: Path) -> Path:
    """The file of problems that a path is or holds.

    Raises:
        ValueError: there is none, or more than one.
    """
    if source.is_file():
        return source
    found = sorted(source.glob("problems_*.jsonl"))
    if len(found) == 1:
        return found[0]
    names = (
        f"it holds {' and '.join(file.name for file in found)}: name one" if found else "validate and test write one"
    )
    raise ValueError(f"compare: {source} is no file of problems, nor a folder with one; {names}")


def read_problems(source: Path) -> tuple[Path, Problems]:
    """The problems of a file, or of a folder's.

    Raises:
        ValueError: there is none, or a line of it is damaged.
    """
    file = find_file(source)
    rows, damaged = read_rows(file)
    if damaged or not rows:
        what = f"{damaged} damaged lines" if damaged else "no problems"
        raise ValueError(f"compare: {file} has {what}; give the command again that wrote it")
    before: Counter[tuple[str, str]] = Counter()
    problems: Problems = {}
    for row in sorted(rows, key=lambda row: row["index"]):
        name = (row["benchmark"], row["id"])
        problems[(*name, before[name])] = row
        before[name] += 1
    return file, problems


def check_same(a: Problems, b: Problems) -> None:
    """Raise ValueError unless both are of the same problems; it names the difference."""
    said = []
    for mine, others, name in ((a, b, "A"), (b, a, "B")):
        if missing := [mine[key] for key in mine if key not in others]:
            shown = ", ".join(f"{row['benchmark']}[{row['index']}] {row['id']}" for row in missing[:SHOWN])
            more = ", ..." if len(missing) > SHOWN else ""
            said.append(f"{len(missing)} of {len(mine)} problems are in {name} alone ({shown}{more})")
    if said:
        shared = "" if a.keys() & b.keys() else "; none is in both: the prompts may be worded differently"
        raise ValueError(f"compare: not the same problems: {', and '.join(said)}{shared}")


def rights(rows: Sequence[Row], mode: str) -> Tensor:
    """Share of right completions of each problem, float64 [n]."""
    shares = [sum(row[mode]["correct"]) / len(row[mode]["correct"]) for row in rows]
    return torch.tensor(shares, dtype=torch.float64)


def compared(a: Problems, b: Problems) -> list[Difference]:
    """All differences: of each benchmark, and of all problems where there are several."""
    benchmarks = dict.fromkeys(key[0] for key in a)
    groups = {name: [key for key in a if key[0] == name] for name in benchmarks}
    if len(groups) > 1:
        groups["all"] = list(a)
    modes = [mode for mode in ("greedy", "sampled") if all(mode in row for rows in (a, b) for row in rows.values())]
    return [
        difference(name, mode, rights([a[key] for key in keys], mode), rights([b[key] for key in keys], mode))
        for name, keys in groups.items()
        for mode in modes
    ]


def difference(benchmark: str, mode: str, a: Tensor, b: Tensor) -> Difference:
    """Of two answerers of the same problems.

    Args:
        benchmark: its name.
        mode: `greedy`, where shares are 0 or 1, or `sampled`.
        a: share of right completions of each problem, float64 [n].
        b: likewise.
    """
    deltas = b - a
    only_a, only_b = int((deltas < 0).sum()), int((deltas > 0).sum())
    if mode == "greedy":
        p, how = mcnemar_p(only_a, only_b), f"{only_a} right in A alone, {only_b} in B alone"
    else:
        p, how = paired_p(deltas), f"A is better on {only_a}, B on {only_b}"
    low, high = interval(deltas)
    return Difference(
        benchmark=benchmark,
        measure="greedy" if mode == "greedy" else "pass@1",
        problems=len(deltas),
        a=float(a.mean()),
        b=float(b.mean()),
        low=low,
        high=high,
        p=p,
        how=how,
    )


def told(found: Sequence[Difference]) -> str:
    """A table, and every difference in words."""
    heading = ["benchmark", "measure", "problems", "A", "B", "B - A", "95 % interval", "p"]
    lines = [aligned([heading, *(each.cells() for each in found)]), ""]
    lines += [each.words() for each in found]
    if len(found) > 1:
        lines.append(f"{len(found)} comparisons: of those between equals one in {1 / CHANCE:.0f} has p below {CHANCE}")
    return "\n".join(lines)


def caveats(files: Mapping[str, Path], a: Problems, b: Problems) -> list[str]:
    """What else differs between the two."""
    known = [dict(about(file).get("settings") or {}) for file in files.values()]
    weights = [settings.pop("weights", None) for settings in known]
    said = [f"the weights of A and B are the same ({weights[0]})"] if None is not weights[0] == weights[1] else []
    if all(known) and known[0] != known[1]:
        said.append(f"not measured alike: from A to B {differences(*known)}")
    if changed := sum(a[key]["record"] != b[key]["record"] for key in a):
        said.append(f"{changed} problems have the same prompt, but other right answers or fields")
    return said


def main(argv: list[str]) -> int:
    """Compare and tell; 2 after a mistake, of which it says one line."""
    parser = argparse.ArgumentParser(prog="python -m rlvr_lightning compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "a", type=Path, metavar="A", help="a run's folder, or problems_val.jsonl or problems_test.jsonl"
    )
    parser.add_argument("b", type=Path, metavar="B", help="the same of another model")
    options = parser.parse_args(argv)
    try:
        (file_a, a), (file_b, b) = read_problems(options.a), read_problems(options.b)
        check_same(a, b)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"A {file_a}\nB {file_b}\n")
    print("\n".join([told(compared(a, b)), *caveats({"A": file_a, "B": file_b}, a, b)]))
    return 0
