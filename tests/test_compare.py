"""Two files of problems side by side: what is said of their difference, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlvr_lightning import compare
from rlvr_lightning.__main__ import main

Row = dict[str, Any]


def row(index: int, greedy: bool, sampled: list[bool] | None = None, benchmark: str = "aime", **more) -> Row:
    found = {"id": f"{index:016x}", "benchmark": benchmark, "index": index, "record": "same"}
    tries = {"greedy": {"correct": [greedy]}} | ({} if sampled is None else {"sampled": {"correct": sampled}})
    return found | tries | more


def write(folder: Path, rows: list[Row], split: str = "val", **settings) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"problems_{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (folder / f"problems_{split}.json").write_text(json.dumps({"settings": settings}))
    return folder


def said(capsys, *paths: Path) -> tuple[int, str, str]:
    status = main(["compare", *map(str, paths)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_two_answers_more_of_thirty_could_be_chance(tmp_path: Path, capsys) -> None:
    """McNemar of 3 against 5: P(at most 3 of 8 heads) * 2 = 2 * (1 + 8 + 28 + 56) / 256 = 0.7266."""
    a = write(tmp_path / "a", [row(i, greedy=i < 13) for i in range(30)])
    b = write(tmp_path / "b", [row(i, greedy=3 <= i < 18) for i in range(30)])
    status, out, _ = said(capsys, a, b)
    assert status == 0
    heading, cells = out.splitlines()[3:5]
    assert len(heading) == len(cells)
    assert cells.split() == ["aime", "greedy", "30", "43.3", "50.0", "+6.7", "[-10.0,", "+26.7]", "0.73"]
    expected = "a difference of 6.7 points on 30 problems (3 right in A alone, 5 in B alone): p = 0.73; could be chance"
    assert f"aime, greedy: {expected}" in out


def test_a_large_difference_is_told_from_chance(tmp_path: Path, capsys) -> None:
    a = write(tmp_path / "a", [row(i, False, [False, i % 2 == 0]) for i in range(40)])
    b = write(tmp_path / "b", [row(i, True, [True, i % 2 == 0]) for i in range(40)])
    _, out, _ = said(capsys, a, b)
    assert "aime, greedy: a difference of 100 points" in out
    assert "p < 0.0001; unlikely to be chance" in out
    # each problem is half a point better: the interval has no width, and the p-value is as low as resampling can tell
    assert "aime, pass@1: a difference of 50 points on 40 problems (A is better on 0, B on 40)" in out
    assert "[+50.0, +50.0]" in out


def test_benchmarks_are_compared_one_by_one_and_together(tmp_path: Path, capsys) -> None:
    rows = [row(i, i % 2 == 0, [True, False], name) for name in ("amc", "aime") for i in range(3)]
    a, b = write(tmp_path / "a", rows), write(tmp_path / "b", rows[::-1])
    _, out, _ = said(capsys, a, b)
    named = [tuple(line.split()[:3]) for line in out.splitlines()[4:10]]
    assert named == [
        (name, measure, num)
        for name, num in (("amc", "3"), ("aime", "3"), ("all", "6"))
        for measure in ("greedy", "pass@1")
    ]
    assert "6 comparisons: of those between equals one in 20 has p below 0.05" in out


def test_repeated_problems_are_paired_in_their_order(tmp_path: Path, capsys) -> None:
    def rows(*greedy: bool) -> list[Row]:
        return [row(i, right, id="0" * 16) for i, right in enumerate(greedy)]

    a, b = write(tmp_path / "a", rows(True, False)), write(tmp_path / "b", rows(False, True))
    _, out, _ = said(capsys, a, b)
    assert "aime, greedy: no difference on 2 problems (1 right in A alone, 1 in B alone): p = 1; could be chance" in out


def test_what_else_differs_is_said(tmp_path: Path, capsys) -> None:
    a = write(tmp_path / "a", [row(0, True), row(1, True)], weights="w", seed=0)
    b = write(tmp_path / "b", [row(0, True), row(1, True, record="other")], weights="w", seed=1)
    _, out, _ = said(capsys, a, b)
    assert "the weights of A and B are the same (w)" in out
    assert "not measured alike: from A to B seed changed from 0 to 1" in out
    assert "1 problems have the same prompt, but other right answers or fields" in out


def test_other_problems_are_refused_by_name(tmp_path: Path, capsys) -> None:
    a = write(tmp_path / "a", [row(i, True) for i in range(7)])
    b = write(tmp_path / "b", [row(i, True) for i in (0, 1, 9)])
    status, out, err = said(capsys, a, b)
    assert (status, out) == (2, "")
    [line] = err.splitlines()
    assert line == (
        "error: compare: not the same problems: 5 of 7 problems are in A alone (aime[2] 0000000000000002, aime[3] "
        "0000000000000003, aime[4] 0000000000000004, ...), and 1 of 3 problems are in B alone (aime[9] "
        "0000000000000009)"
    )
    c = write(tmp_path / "c", [row(9, True)])
    assert "none is in both: the prompts may be worded differently" in said(capsys, a, c)[2]


def test_what_is_no_file_of_problems_is_refused(tmp_path: Path, capsys) -> None:
    good = write(tmp_path / "good", [row(0, True)])
    (tmp_path / "empty").mkdir()
    both = write(write(tmp_path / "both", [row(0, True)]), [row(0, True)], split="test")
    torn = write(tmp_path / "torn", [row(0, True)])
    with (torn / "problems_val.jsonl").open("a") as file:
        file.write("{")
    for other, message in [
        (tmp_path / "nowhere", "is no file of problems, nor a folder with one; validate and test write one"),
        (tmp_path / "empty", "is no file of problems, nor a folder with one; validate and test write one"),
        (both, "it holds problems_test.jsonl and problems_val.jsonl: name one"),
        (torn, "has 1 damaged lines; give the command again that wrote it"),
    ]:
        status, _, err = said(capsys, good, other)
        assert (status, len(err.splitlines())) == (2, 1)
        assert message in err
    assert said(capsys, good, both / "problems_test.jsonl")[0] == 0


def test_samples_in_one_alone_are_not_compared(tmp_path: Path, capsys) -> None:
    a, b = write(tmp_path / "a", [row(0, True, [True])]), write(tmp_path / "b", [row(0, True)])
    _, out, _ = said(capsys, a, b)
    assert "pass@1" not in out
    assert [each.measure for each in compare.compared(*(compare.read_problems(at)[1] for at in (a, b)))] == ["greedy"]
