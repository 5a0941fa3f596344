"""Prompts from data sets: local files with the columns of NuminaMath-CoT, written here; no network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from rlvr_lightning.data import hub
from rlvr_lightning.data.hub import HubPrompts, Wording

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
    assert list(HubPrompts(path, answer_column="solution", answers="boxed")) == [
        {"prompt": f"What is {n} + 1?", "source_row": n, "answer": str(n + 1)} for n in range(3)
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
    with pytest.warns(UserWarning, match="left out 5 problems .* kept 3"):
        records = list(HubPrompts(path, answer_column="solution", answers="boxed"))
    assert [(record["source_row"], record["answer"]) for record in records] == [(0, "1"), (5, "6"), (6, "6")]


@needs_math_verify
def test_a_plain_answer_column_is_checked_as_math(tmp_path: Path) -> None:
    rows = [{"problem": f"p{i}", "answer": a} for i, a in enumerate(["7", None, "$8$", "", r"\frac{1}{2}"])]
    records = list(HubPrompts(write(tmp_path / "a.jsonl", rows), answers="math"))
    assert [record["answer"] for record in records] == ["7", "8", r"\frac{1}{2}"]


def test_any_answer_is_kept_as_it_is(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "final": i} for i in range(3)]
    source = HubPrompts(write(tmp_path / "a.jsonl", rows), prompt_column="question", answer_column="final")
    assert [record["answer"] for record in source] == [0, 1, 2]
    bare = HubPrompts(write(tmp_path / "b.jsonl", rows), prompt_column="question", answer_column=None)
    assert bare[0] == {"prompt": "q0", "source_row": 0}


def test_a_subset_is_random_seeded_and_without_repetition(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [numina(n) for n in range(50)])
    rows = [
        [record["source_row"] for record in HubPrompts(path, answer_column=None, num=20, seed=seed)]
        for seed in (0, 0, 1)
    ]
    assert rows[0] == rows[1] != rows[2]
    assert len(set(rows[0])) == 20 and rows[0] != sorted(rows[0])
    nested = [record["source_row"] for record in HubPrompts(path, answer_column=None, num=7, seed=0)]
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
    source = HubPrompts(write(tmp_path / "a.jsonl", [numina(1)]), answer_column=None, wording=wording)
    assert source[0]["prompt"] == "<system>Be brief.<user>What is 1 + 1? Use {braces}.<assistant>"
    monkeypatch.setattr(Tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match=r"wording\.chat_tokenizer: 'any' has no chat template"):
        wording("x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_column": "question"}, "no column 'question'; the columns are source, problem, solution, messages"),
        ({}, "no column 'answer'; the columns are source"),
        ({"answer_column": "solution", "num": 4}, r"num: .* has 3 usable problems, fewer than 4"),
        ({"answer_column": "solution", "num": 0}, "num must be at least 1"),
        ({"answer_column": None, "answers": "math"}, "answers: math needs an answer_column"),
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
    (tmp_path / "bad.jsonl").write_text('{"problem": \nnot json')
    with pytest.raises(ValueError, match="path: cannot load") as caught:
        HubPrompts(str(tmp_path / "bad.jsonl"))
    assert "\n" not in str(caught.value)


def test_what_the_hub_does_not_have_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)\nmore")

    monkeypatch.setattr("datasets.load_dataset", absent)
    with pytest.raises(ValueError, match=r"path: cannot load 'owner/name': Couldn't reach .*\)$"):
        hub.load_table("owner/name", None, "train")


@pytest.mark.parametrize("arguments", [{"template": "solve it"}, {"system": "Be brief."}, {"template_args": {"a": 1}}])
def test_wordings_that_cannot_work_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"wording\."):
        Wording(**arguments)
