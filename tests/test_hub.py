"""Prompts from data sets: local files with the columns of NuminaMath-CoT, written here; no network."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
from pathlib import Path

import pytest

from rlvr_lightning.data.hub import HubPrompts, Shots
from rlvr_lightning.data.tables import load_table
from rlvr_lightning.data.wording import Example, Wording

needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="extra [math]")
pytestmark = pytest.mark.filterwarnings("ignore:left out")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def numina(number: int, solution: str | None = None) -> dict:
    """A row of NuminaMath-CoT: source, problem, solution, messages."""
    problem = f"What is {number} + 1?"
    solution = rf"Add one: $\boxed{{{number + 1}}}$." if solution is None else solution
    chat = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    return {"source": "synthetic", "problem": problem, "solution": solution, "messages": chat}


SOLUTION = {"prompt": "problem", "answer": "solution"}
BARE = {"prompt": "problem"}


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@needs_math_verify
@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
def test_a_worked_solution_gives_its_boxed_answer(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [numina(n) for n in range(3)])
    assert list(HubPrompts(path, columns=SOLUTION, answers="boxed")) == [
        {"prompt": f"What is {n} + 1?", "problem": f"What is {n} + 1?", "source_row": n, "answer": str(n + 1)}
        for n in range(3)
    ]


@needs_math_verify
def test_problems_without_a_usable_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    solutions = [
        None,
        "A proof. QED",
        r"\boxed{}",
        r"\boxed{1",
        r"\boxed{\left(}",
        None,
        r"first \boxed{9} last \boxed{6}",
    ]
    path = write(
        tmp_path / "train.jsonl", [numina(n, s) for n, s in enumerate(solutions)] + [numina(7) | {"problem": " "}]
    )
    with pytest.warns(
        UserWarning, match="left out 5 rows, kept 3: no text in 'problem' .line 8.; an answer that .*lines 2, 3, 4, 5"
    ):
        records = list(HubPrompts(path, columns=SOLUTION, answers="boxed"))
    assert [(record["source_row"], record["answer"]) for record in records] == [(0, "1"), (5, "6"), (6, "6")]


@needs_math_verify
def test_a_plain_answer_column_is_checked_as_math(tmp_path: Path) -> None:
    rows = [{"problem": f"p{i}", "answer": a} for i, a in enumerate(["7", None, "$8$", "", r"\frac{1}{2}"])]
    records = list(HubPrompts(write(tmp_path / "a.jsonl", rows), answers="math"))
    assert [record["answer"] for record in records] == ["7", "8", r"\frac{1}{2}"]


def test_any_answer_is_kept_as_it_is(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "final": i} for i in range(3)]
    source = HubPrompts(write(tmp_path / "a.jsonl", rows), columns={"prompt": "question", "answer": "final"})
    assert [record["answer"] for record in source] == [0, 1, 2]
    bare = HubPrompts(write(tmp_path / "b.jsonl", rows), columns={"prompt": "question"})
    assert bare[0] == {"prompt": "q0", "problem": "q0", "source_row": 0}


def test_a_subset_is_random_seeded_and_without_repetition(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [numina(n) for n in range(50)])
    rows = [
        [record["source_row"] for record in HubPrompts(path, columns=BARE, num=20, seed=seed)] for seed in (0, 0, 1)
    ]
    assert rows[0] == rows[1] != rows[2]
    assert len(set(rows[0])) == 20 and rows[0] != sorted(rows[0])
    nested = [record["source_row"] for record in HubPrompts(path, columns=BARE, num=7, seed=0)]
    assert rows[0][:7] == nested, "a smaller subset is part of a larger one"


def test_the_chat_template_wraps_system_and_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        chat_template = "not empty"

        def apply_chat_template(self, chat: list[dict], **settings: object) -> str:
            assert settings == {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
            return "".join(f"<{m['role']}>{m['content']}" for m in chat) + "<assistant>"

    monkeypatch.setattr("rlvr_lightning.policy.load_tokenizer", lambda name: Tokenizer())
    wording = Wording(
        template="{problem} Use {braces}.",
        chat_tokenizer="any",
        system="Be brief.",
        template_args={"enable_thinking": False},
    )
    source = HubPrompts(write(tmp_path / "a.jsonl", [numina(1)]), columns=BARE, wording=wording)
    assert source[0]["prompt"] == "<system>Be brief.<user>What is 1 + 1? Use {braces}.<assistant>"
    monkeypatch.setattr(Tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match=r"wording\.chat_tokenizer: 'any' has no chat template"):
        wording.prompts(["x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"columns": {"prompt": "question"}},
            "no column 'question'; the columns are source, problem, solution, messages",
        ),
        ({}, "no column 'answer'; the columns are source"),
        ({"columns": SOLUTION, "num": 4}, r"num: .* has 3 usable problems, fewer than 4"),
        ({"columns": SOLUTION, "num": 0}, "num must be at least 1"),
        ({"columns": BARE, "answers": "math"}, "answers: math needs a column for `answer`"),
        ({"columns": {"answer": "solution"}}, "columns: name the column of the problem"),
        ({"columns": BARE | {"index": "source"}}, "columns: the field 'index' is added"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path: Path, arguments: dict, message: str) -> None:
    path = write(tmp_path / "a.jsonl", [numina(n) for n in range(3)])
    with pytest.raises(ValueError, match=message) as caught:
        HubPrompts(path, **arguments)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path: there is no file"):
        HubPrompts(str(tmp_path / "none.parquet"))
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"path: cannot load '.*bad\.parquet'") as caught:
        HubPrompts(str(tmp_path / "bad.parquet"))
    assert "\n" not in str(caught.value)


def test_what_the_hub_does_not_have_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)\nmore")

    monkeypatch.setattr("datasets.load_dataset", absent)
    with pytest.raises(ValueError, match=r"path: cannot load 'owner/name': Couldn't reach .*\)$"):
        load_table("owner/name", None, "train")


@pytest.mark.parametrize("arguments", [{"template": "solve it"}, {"system": "Be brief."}, {"template_args": {"a": 1}}])
def test_wordings_that_cannot_work_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"wording\."):
        Wording(**arguments)


# --- files ---


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", b"", "is empty: it has no rows"),
        ("a.csv", b"problem,answer\n", "is empty: it has no rows"),
        ("a.json", b"[]", "is empty: it has no rows"),
        ("a.jsonl", b'{"problem": "x"}\n{"problem": \n', r"a\.jsonl:2: Expecting value"),
        ("a.jsonl", b'{"problem": "x"}\n\n[1]\n', r"a\.jsonl:3: not a JSON object"),
        ("a.jsonl", b'{"problem": "x", "answer": NaN}\n', r"a\.jsonl:1: NaN is not JSON"),
        ("a.jsonl", b'{"problem": "x"}\n{"problem": "\xe9"}\n', r"a\.jsonl:2: not UTF-8: 'utf-8' codec can't decode"),
        ("a.csv", b"problem,answer\nx,1\n\xe9,2\n", r"a\.csv:3: not UTF-8"),
        ("a.csv", b'problem,answer\n"x\ny",1\nz\n', r"a\.csv:4: 1 cells, but the first line names 2"),
        ("a.csv", b'problem,answer\n"x"y,1\n', r"a\.csv:2: "),
        ("a.csv", b"problem,problem\nx,1\n", r"a\.csv:1: column 'problem' appears twice"),
        ("a.json", b'[{"problem": "x"}, 3]', r"a\.json: entry 1 is not a JSON object"),
    ],
)
def test_damaged_files_are_named_with_the_line(tmp_path: Path, name: str, text: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=message) as caught:
        HubPrompts(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_the_same_rows_come_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"problem": f'is "{n}",\nodd?', "answer": str(n % 2)} for n in range(5)]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "a.parquet", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["problem", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    read = {kind: list(HubPrompts(str(tmp_path / f"a.{kind}"))) for kind in ("jsonl", "json", "csv", "parquet")}
    assert [(r["problem"], r["answer"]) for r in read["jsonl"]] == [(r["problem"], r["answer"]) for r in rows]
    assert read["jsonl"] == read["json"] == read["csv"] == read["parquet"]


def test_what_has_no_answer_is_left_out_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"problem": "a", "answer": 1}, {"problem": "b", "answer": None}, {"problem": "c"}, {"answer": 2}]
    path.write_text("\n\n".join(json.dumps(row) for row in [*rows, {"problem": "d", "answer": " "}]))
    with pytest.warns(
        UserWarning, match=r"a\.jsonl: left out 4 rows, kept 1: no text in 'problem' \(line 7\); no answer"
    ):
        assert [record["problem"] for record in HubPrompts(str(path))] == ["a"]
    (tmp_path / "b.jsonl").write_text('{"problem": "a", "answer": null}\n{"problem": "b", "answer": ""}')
    with pytest.raises(ValueError, match=r"b\.jsonl has no usable problem: no answer \(lines 1, 2\)"):
        HubPrompts(str(tmp_path / "b.jsonl"))


def test_a_number_that_is_none_is_no_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"problem": "a", "answer": float("nan")}, {"problem": "b", "answer": 0.0}])
    with pytest.warns(UserWarning, match=r"left out 1 rows, kept 1: no answer \(row 0\)"):
        assert [record["answer"] for record in HubPrompts(path)] == [0.0]


def test_an_id_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"key": "x", "problem": "a"}\n\n{"key": "y", "problem": "b"}\n{"key": "x", "problem": "c"}\n')
    columns = {"prompt": "problem", "id": "key"}
    with pytest.raises(ValueError, match=r"a\.jsonl: the id 'x' stands twice, in line 1 and line 4"):
        HubPrompts(str(path), columns=columns)


def test_further_columns_are_carried(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "a", "a": "A", "tests": ["x", "y"], "rest": 1}])
    [record] = HubPrompts(path, columns={"prompt": "q", "answer": "a", "test_list": "tests"})
    expected = {"prompt": "a", "problem": "a", "source_row": 0, "answer": "A", "test_list": ["x", "y"]}
    assert record == expected


def test_streamed_rows_are_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", [{"problem": str(n), "answer": n} for n in range(9)])
    streamed = HubPrompts(path, num=4, streaming=True)
    assert [record["source_row"] for record in streamed] == [0, 1, 2, 3]
    asked: dict = {}

    def endless(builder: str, **how: object) -> object:
        import datasets

        asked.update(how, builder=builder)

        def rows() -> object:
            yield from ({"problem": str(n), "answer": n if n % 2 else None} for n in itertools.count())

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr("datasets.load_dataset", endless)
    source = HubPrompts("owner/name", config="main", split="dev", num=3, streaming=True)
    assert [record["answer"] for record in source] == [1, 3, 5]
    assert asked == {"builder": "owner/name", "name": "main", "split": "dev", "streaming": True}


# --- examples in front ---


def test_examples_come_from_the_same_data_but_are_never_the_problem_itself(tmp_path: Path) -> None:
    rows = [{"problem": f"{n}+1", "answer": str(n + 1), "how": f"count: {n + 1}"} for n in range(3)]
    path = write(tmp_path / "a.jsonl", rows)
    columns = {"prompt": "problem", "answer": "answer", "solution": "how"}
    source = HubPrompts(path, columns=columns, shots=Shots(num=2), wording=Wording(template="{problem} = ?"))
    for n, record in enumerate(source):
        blocks = record["prompt"].split("\n\n")
        assert blocks[-1] == f"{n}+1 = ?"
        assert sorted(blocks[:-1]) == [f"{k}+1 = ?\ncount: {k + 1}" for k in range(3) if k != n]
    with pytest.raises(ValueError, match=r"shots.num and one to spare: .* has 3 usable problems, fewer than 4"):
        HubPrompts(path, shots=Shots(num=3))
    with pytest.raises(ValueError, match=r"shots\.num must be at least 1"):
        Shots(num=0)


def test_examples_come_from_another_file_and_need_something_to_show(tmp_path: Path) -> None:
    other = write(tmp_path / "train.jsonl", [{"problem": f"t{n}", "answer": n} for n in range(5)])
    path = write(tmp_path / "test.jsonl", [{"problem": "x", "answer": 0}, {"problem": "T1.", "answer": 1}])
    shots = Shots(num=4, path=other, seed=1)
    first, second = (record["prompt"].split("\n\n") for record in HubPrompts(path, shots=shots))
    assert len(first) == len(second) == 5 and {"t1\n1"} & set(first[:-1]) <= {"t1\n1"}
    assert "t1\n1" not in second
    with pytest.raises(ValueError, match="shots: the data set has neither solutions nor answers"):
        HubPrompts(path, columns=BARE, shots=Shots(num=1))


def test_examples_are_turns_of_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        chat_template = "not empty"

        def apply_chat_template(self, chat: list[dict], **_: object) -> str:
            return "".join(f"<{m['role']}>{m['content']}" for m in chat)

    monkeypatch.setattr("rlvr_lightning.policy.load_tokenizer", lambda name: Tokenizer())
    wording = Wording(
        template="{problem}?", chat_tokenizer="any", system="Hm.", examples=[Example(problem="1+1", solution="2")]
    )
    assert wording.prompts(["3", " 1 + 1"]) == ["<system>Hm.<user>1+1?<assistant>2<user>3?", "<system>Hm.<user> 1 + 1?"]
