"""What is taken out of training problems, and what is said of it."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from rlvr_lightning.data.cleaning import Cleaning, Difficulty, pass_rates
from rlvr_lightning.data.contamination import overlaps
from rlvr_lightning.data.identity import problem_id
from rlvr_lightning.data.prompts import JsonlPrompts, PromptData

LONG = "A train leaves at nine and drives forty miles an hour for three hours; how far does it get?"  # 18 words


def records(*problems: str, **fields: list) -> list[dict]:
    made = [{"prompt": f"Solve: {p}", "problem": p, "index": i} for i, p in enumerate(problems)]
    return [r | {name: values[i] for name, values in fields.items()} for i, r in enumerate(made)]


def kept(cleaning: Cleaning, training: list[dict], benchmarks: dict | None = None) -> list[int]:
    return [record["index"] for record in cleaning(training, benchmarks or {})]


def rates_file(path: Path, rates: dict[str, float]) -> str:
    rows = [
        {"id": problem_id(prompt), "benchmark": "b", "index": i, "pass_rate": r}
        for i, (prompt, r) in enumerate(rates.items())
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- repetitions ---


def test_repetitions_are_dropped_and_those_with_another_answer_are_shown() -> None:
    training = records("Is $x = 1$?", "2+3", "is x=1", "2-3", "Is $x=1$", answer=[1, 5, 1, -1, 2])
    message = (
        r"dropped 2 of 5 problems that repeat .* 1 of them with another answer \(such as train\[4\] of train\[0\]\)"
    )
    with pytest.warns(UserWarning, match=message):
        assert kept(Cleaning(), training) == [0, 1, 3]
    assert kept(Cleaning(duplicates="keep"), training) == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_where_nothing_is_dropped() -> None:
    assert kept(Cleaning(), records("a", "b"), {"b": records("c")}) == [0, 1]


# --- overlap ---


def test_overlap_needs_that_many_words_in_a_row() -> None:
    words = [f"w{i}" for i in range(40)]
    training = " ".join(words)
    for shared, found in ((13, 1), (12, 0)):
        other = " ".join(["x", *words[5 : 5 + shared], "y"])
        assert len(overlaps([training], {"b": [other]})) == found
        assert len(overlaps([other], {"b": [training]})) == found
    assert len(overlaps([training], {"b": [" ".join(words[5:10])]}, ngram=5)) == 1


def test_short_texts_overlap_only_as_a_whole() -> None:
    others = {"b": ["What is 2 + 3?", "1-2"]}
    found = overlaps(["what is 2+3", "What is 2 + 3 + 4?", "1+2", "What is 2+3 in words"], others)
    assert [(o.row, o.benchmark, o.other) for o in found] == [(0, "b", 0)]


def test_overlap_is_what_a_naive_search_finds() -> None:
    rng = random.Random(0)
    texts, others = ([" ".join(rng.choices("abc", k=rng.randint(2, 9))) for _ in range(60)] for _ in range(2))

    def naive(text: str, other: str) -> bool:
        a, b = text.split(), other.split()
        runs = [a[i : i + 5] for i in range(len(a) - 4)]
        return a == b or any(run == b[i : i + 5] for run in runs for i in range(len(b) - 4))

    expected = [i for i, text in enumerate(texts) if any(naive(text, other) for other in others)]
    assert 5 < len(expected) < 55
    assert [o.row for o in overlaps(texts, {"b": others}, ngram=5)] == expected


def test_overlap_is_dropped_or_told_with_examples() -> None:
    training = records("1+1", LONG, "2+2", f"Think. {LONG.upper()} Answer in miles.")
    benchmarks = {"val.a": records("3+3"), "test.b": records("0", LONG), "test.c": records("1 + 1")}
    message = r"dropped 3 of 4 problems that share 13 words in a row, or all, .*\(test\.c 1, test\.b 2\)"
    message += r", such as train\[0\] and test\.c\[0\]: '1\+1'"
    with pytest.warns(UserWarning, match=message):
        assert kept(Cleaning(), training, benchmarks) == [2]
    with pytest.warns(UserWarning, match=r"data\.train: 3 of 4 problems that share"):
        assert kept(Cleaning(contaminated="warn"), training, benchmarks) == [0, 1, 2, 3]


def test_the_words_of_the_template_are_no_overlap() -> None:
    instruction = "Please reason step by step, and put your final answer within a box at the very end of it."
    training, other = ([{"prompt": f"{p} {instruction}", "problem": p, "index": 0}] for p in ("1+2", "3+4"))
    assert kept(Cleaning(), training, {"b": other}) == [0]


def test_overlap_of_a_training_set_is_found_in_seconds() -> None:
    """35,000 problems of 60 words against 5,000."""
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(3000)]
    texts = [" ".join(rng.choices(vocabulary, k=60)) for _ in range(40_000)]
    training, others = texts[:35_000], texts[35_000:]
    training[17] = f"begin {' '.join(others[4000].split()[20:40])} end"
    started = time.monotonic()
    found = overlaps(training, {"b": others})
    assert [(o.row, o.other) for o in found] == [(17, 4000)]
    assert time.monotonic() - started < 30


# --- measured difficulty ---


def test_problems_inside_the_band_are_kept(tmp_path: Path) -> None:
    training = records(*"abcdef")
    measured = {"a": 0.0, "b": 0.1, "c": 0.5, "d": 0.9, "e": 1.0}
    path = rates_file(tmp_path / "rates.jsonl", {f"Solve: {p}": rate for p, rate in measured.items()})
    message = "dropped 3 of 6 problems: pass rate of 1 below 0.1, of 1 above 0.9, 1 not measured"
    with pytest.warns(UserWarning, match=message):
        cleaned = Cleaning(difficulty=Difficulty(path=path, band=[0.1, 0.9]))(training, {})
    assert [(record["problem"], record["pass_rate"]) for record in cleaned] == [("b", 0.1), ("c", 0.5), ("d", 0.9)]
    with pytest.warns(UserWarning, match="1 above 0.9, 0 not measured"):
        assert kept(Cleaning(difficulty=Difficulty(path=path, band=[0, 0.9], unmeasured="keep")), training) == [
            0,
            1,
            2,
            3,
            5,
        ]


def test_a_problem_measured_twice_has_the_mean(tmp_path: Path) -> None:
    path = tmp_path / "rates.jsonl"
    path.write_text('{"id": "x", "pass_rate": 0}\n{"id": "x", "pass_rate": 0.5}\n{"id": "y", "pass_rate": 1}\n')
    assert pass_rates(str(path)) == {"x": 0.25, "y": 1.0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"pass_rate": 1}', r"rates\.jsonl: line 2 has no text under 'id'"),
        ('{"id": "x"}', r"rates\.jsonl: line 2 has the pass_rate None"),
        ('{"id": "x", "pass_rate": 1.5}', "has the pass_rate 1.5, not a number from 0 to 1"),
        ('{"id": "x", "pass_rate": true}', "has the pass_rate True"),
        ('{"id": "x", "pass_rate": NaN}', r"rates\.jsonl:2: NaN is not JSON"),
        ('{"id": "x", "pass_ra', r"rates\.jsonl:2: "),
    ],
)
def test_damaged_rates_are_named_with_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rates.jsonl"
    path.write_text('{"id": "x", "pass_rate": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        pass_rates(str(path))


def test_rates_of_other_prompts_are_refused(tmp_path: Path) -> None:
    path = rates_file(tmp_path / "rates.jsonl", {"a": 0.5})  # asked without "Solve: "
    cleaning = Cleaning(difficulty=Difficulty(path=path, band=[0, 1]))
    with pytest.raises(ValueError, match="has none of the 2 training problems; they are known by their prompts"):
        cleaning(records("a", "b"), {})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"band": [0.9, 0.1]}, r"cleaning\.difficulty\.band must be two numbers from 0 to 1, the lower one first"),
        ({"band": [0.5]}, r"cleaning\.difficulty\.band must be two numbers"),
        ({"band": [0, 2]}, r"cleaning\.difficulty\.band must be two numbers"),
        ({"band": [0, 1], "path": "none.jsonl"}, r"cleaning\.difficulty\.path: there is no file 'none\.jsonl'"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Difficulty(**{"path": rates_file(tmp_path / "rates.jsonl", {"a": 1.0})} | kwargs)
    with pytest.raises(ValueError, match=r"cleaning\.ngram must be at least 2, got 1"):
        Cleaning(ngram=1)


# --- in the data module ---


def jsonl(path: Path, *prompts: str) -> JsonlPrompts:
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": 1}) + "\n" for prompt in prompts))
    return JsonlPrompts(str(path))


def test_training_problems_are_compared_with_those_of_val_and_test(tmp_path: Path) -> None:
    data = PromptData(
        "tiny",
        train=jsonl(tmp_path / "a.jsonl", "1+1=", "1+2=", "1+3=", "1+1=", "1+4="),
        val={"v": jsonl(tmp_path / "b.jsonl", "1+2=")},
        test={"t": jsonl(tmp_path / "c.jsonl", "1+4=", "5+5=")},
        prompts_per_step=2,
        cleaning=Cleaning(),
    )
    with pytest.warns(UserWarning, match=r"dropped 2 of 4 .*\(val\.v 1, test\.t 1\)"):
        data.setup("fit")
    assert sorted(record["index"] for record in data.train_dataloader().records) == [0, 2]
    assert [record["prompt"] for batch in data.val_dataloader() for record in batch] == ["1+2="]
    data.prompts_per_step, data._loaders = 3, {}
    with pytest.raises(ValueError, match=r"data\.train has 2 prompts, fewer than data\.prompts_per_step=3"):
        data.setup("fit")
