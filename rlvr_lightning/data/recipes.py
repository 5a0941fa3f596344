"""Well-known data sets by name: where each is, how its columns are read, how its problems are asked."""

from __future__ import annotations

import argparse
import difflib
import sys
from dataclasses import dataclass
from typing import Literal

from rlvr_lightning.data import recipe_shapes as shapes
from rlvr_lightning.data.hub import Shots, worded
from rlvr_lightning.data.prompts import ListedPrompts
from rlvr_lightning.data.reading import Answers, Reading, Shape
from rlvr_lightning.data.wording import Wording

BOXED = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
LETTER = '{problem}\n\nThink step by step. End with a line "Answer: LETTER", where LETTER is one of A, B, C and D.'
PROGRAM = "{problem}\n\nWrite the program in Python, in one ```python code block."
FUNCTION = (
    "Complete this Python function:\n```python\n{problem}\n```\nGive the whole function in one ```python code block."
)
EXPRESSION = (
    "{problem}\nThink first, then give the expression alone in <answer> tags, as in <answer>(1 + 2) * 3</answer>."
)
Reward = Literal["MathAnswer", "Choice", "CodeAnswer", "Countdown"]
MODULES: dict[Reward, str] = {
    "MathAnswer": "math_answer",
    "Choice": "choice",
    "CodeAnswer": "code_answer",
    "Countdown": "countdown",
}
"""Where each reward is, in `rlvr_lightning.rewards`."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A data set, as its page documents it."""

    what: str
    path: str
    config: str | None = None
    split: str
    """Which split is taken if none is asked for."""
    columns: tuple[str, ...]
    """Those that `shape` looks at; the data set may have more."""
    shape: Shape
    template: str = BOXED
    answers: Answers = "math"
    reward: Reward = "MathAnswer"
    license: str
    """As far as its page says."""


NUMINA, AIME = ("problem", "solution"), ("problem", "answer")
RECIPES: dict[str, Known] = {
    "numina_cot": Known(
        what="NuminaMath-CoT: 860,000 problems with worked solutions; the papers train on 35,000 (num: 35000)",
        path="AI-MO/NuminaMath-CoT",
        split="train",
        columns=NUMINA,
        shape=shapes.worked,
        answers="boxed",
        license="Apache-2.0",
    ),
    "numina_1.5": Known(
        what="NuminaMath-1.5: 900,000 problems with answers; proofs and invalid ones are left out",
        path="AI-MO/NuminaMath-1.5",
        split="train",
        columns=("problem", "solution", "answer", "problem_is_valid", "solution_is_valid", "source"),
        shape=shapes.numina_1_5,
        license="Apache-2.0",
    ),
    "math": Known(
        what="MATH (Hendrycks et al. 2021): 7,500 problems to train on, 5,000 to test",
        path="DigitalLearningGmbH/MATH-lighteval",
        split="train",
        columns=("problem", "solution"),
        shape=shapes.worked,
        answers="boxed",
        license="MIT",
    ),
    "math500": Known(
        what="500 of MATH's test problems (Lightman et al. 2023)",
        path="HuggingFaceH4/MATH-500",
        split="test",
        columns=AIME,
        shape=shapes.plain,
        license="not stated; MATH's is MIT",
    ),
    "gsm8k": Known(
        what="grade-school word problems: 7,473 to train on, 1,319 to test",
        path="openai/gsm8k",
        config="main",
        split="train",
        columns=("question", "answer"),
        shape=shapes.gsm8k,
        license="MIT",
    ),
    "aime24": Known(
        what="AIME 2024, both papers: 30 problems",
        path="HuggingFaceH4/aime_2024",
        split="train",
        columns=AIME,
        shape=shapes.plain,
        license="not stated",
    ),
    "aime25": Known(
        what="AIME 2025, both papers: 30 problems",
        path="math-ai/aime25",
        split="test",
        columns=AIME,
        shape=shapes.plain,
        license="not stated",
    ),
    "amc": Known(
        what="AMC 12 of 2022 and 2023, as in AI-MO's validation set: 83 problems with a whole number for an answer",
        path="AI-MO/aimo-validation-amc",
        split="train",
        columns=AIME,
        shape=shapes.amc,
        license="Apache-2.0",
    ),
    "olympiadbench": Known(
        what="OlympiadBench, English mathematics without pictures and proofs: 674 problems",
        path="Hothan/OlympiadBench",
        config="OE_TO_maths_en_COMP",
        split="train",
        columns=("question", "final_answer", "context"),
        shape=shapes.olympiad,
        license="Apache-2.0",
    ),
    "gpqa_diamond": Known(
        what="GPQA, the diamond subset: 198 questions; options in an order drawn from seed and row; access on request",
        path="Idavidrein/gpqa",
        config="gpqa_diamond",
        split="train",
        columns=("Question", "Correct Answer", *(f"Incorrect Answer {k}" for k in (1, 2, 3))),
        shape=shapes.gpqa,
        template=LETTER,
        answers="any",
        reward="Choice",
        license="CC-BY-4.0; do not publish its questions",
    ),
    "deepscaler": Known(
        what="DeepScaleR: 40,000 competition problems (AIME before 2024, AMC, Omni-MATH, STILL)",
        path="agentica-org/DeepScaleR-Preview-Dataset",
        split="train",
        columns=AIME,
        shape=shapes.plain,
        license="MIT",
    ),
    "polaris": Known(
        what="POLARIS: 53,000 problems, graded by how often a model solved them",
        path="POLARIS-Project/Polaris-Dataset-53K",
        split="train",
        columns=("problem", "answer", "difficulty"),
        shape=shapes.graded,
        license="Apache-2.0",
    ),
    "dapo": Known(
        what="DAPO-Math-17k without its repetitions, the English part: 14,000 problems",
        path="open-r1/DAPO-Math-17k-Processed",
        config="en",
        split="train",
        columns=("prompt", "solution"),
        shape=shapes.dapo,
        license="Apache-2.0",
    ),
    "apps": Known(
        what="APPS: programs from introductory to competition level, 5,000 to train on, 5,000 to test",
        path="hf://datasets/codeparrot/apps@refs/convert/parquet/all/{split}/*.parquet",
        split="train",
        columns=("question", "input_output", "starter_code"),
        shape=shapes.apps,
        template=PROGRAM,
        answers="tests",
        reward="CodeAnswer",
        license="MIT",
    ),
    "code_contests": Known(
        what="CodeContests (AlphaCode): 13,000 problems to train on, also valid and test",
        path="deepmind/code_contests",
        split="train",
        columns=("description", "public_tests", "private_tests", "generated_tests", "input_file", "output_file"),
        shape=shapes.code_contests,
        template=PROGRAM,
        answers="tests",
        reward="CodeAnswer",
        license="CC-BY-4.0",
    ),
    "humaneval": Known(
        what="HumanEval: 164 functions to complete",
        path="openai/openai_humaneval",
        split="test",
        columns=("prompt", "test", "entry_point", "canonical_solution"),
        shape=shapes.humaneval,
        template=FUNCTION,
        answers="tests",
        reward="CodeAnswer",
        license="MIT",
    ),
    "mbpp": Known(
        what="MBPP: 374 small functions to train on, 500 to test, 90 to validate; the tests are shown",
        path="google-research-datasets/mbpp",
        config="full",
        split="train",
        columns=("text", "code", "test_list", "test_setup_code"),
        shape=shapes.mbpp,
        template=PROGRAM,
        answers="tests",
        reward="CodeAnswer",
        license="CC-BY-4.0",
    ),
    "countdown": Known(
        what="Countdown: 490,000 tasks of three or four numbers and a target",
        path="Jiayi-Pan/Countdown-Tasks-3to4",
        split="train",
        columns=("nums", "target"),
        shape=shapes.countdown,
        template=EXPRESSION,
        answers="any",
        reward="Countdown",
        license="not stated",
    ),
}


class Recipe(ListedPrompts):
    r"""Problems of a well-known data set; `python -m rlvr_lightning recipes` lists them, their columns and rewards.

    Records hold `prompt`, `problem` (the bare text), `source_row` and what the reward looks at. What cannot be used is
    left out, counted and listed.

    Args:
        name: of the recipe, such as `gsm8k`.
        split: which split; None is the recipe's own.
        num: keep this many, drawn at random without repetition, or the first if streamed; None keeps all, in order.
        seed: of the drawing, and of the order of options.
        wording: chat, system message, examples; its template, if it has one, takes the place of the recipe's.
        shots: solved problems of the data set in front.
        path: a local file or another data set with the same columns.
        columns: names of columns that differ there, as in `{question: problem}`.
        streaming: read rows as they are needed, without fetching the whole data set first.

    Raises:
        ValueError: no such recipe; no such data, or other columns than documented (names both); too few for `num`.
    """

    def __init__(  # noqa: PLR0913 (a block of the YAML, flat on purpose)
        self,
        name: str,
        split: str | None = None,
        num: int | None = None,
        seed: int = 0,
        wording: Wording = Wording(),  # noqa: B008 (frozen)
        shots: Shots | None = None,
        path: str | None = None,
        columns: dict[str, str] | None = None,
        streaming: bool = False,
    ) -> None:
        known = find_recipe(name)
        columns = columns or {}
        if strange := [column for column in columns if column not in known.columns]:
            raise ValueError(f"columns: {name} looks at no column {strange[0]!r}, only at {', '.join(known.columns)}")
        reading = Reading(
            path=path or known.path,
            shape=known.shape,
            expected=known.columns,
            renamed=columns,
            config=known.config if path is None else None,
            split=split or known.split,
            answers=known.answers,
            streaming=streaming,
        )
        super().__init__(worded(reading, num, seed, wording, shots, known.template))


def find_recipe(name: str) -> Known:
    """The recipe of a name; ValueError with a near one if there is none."""
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name.lower(), RECIPES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(RECIPES)}"
    raise ValueError(f"name: there is no recipe {name!r}; {hint}")


def describe(name: str) -> str:
    """All that a recipe says, a line each."""
    known = RECIPES[name]
    lines = {
        "what": known.what,
        "data set": known.path + (f", {known.config}" if known.config else "") + f", split {known.split}",
        "columns": ", ".join(known.columns),
        "reward": f"class_path: rlvr_lightning.rewards.{MODULES[known.reward]}.{known.reward}",
        "license": known.license,
        "prompt": known.template.replace("\n", "\\n"),
        "use": f"class_path: rlvr_lightning.data.recipes.Recipe, init_args: {{name: {name}}}",
    }
    return "\n".join([name, *(f"  {key:<9} {value}" for key, value in lines.items())])


def main(argv: list[str]) -> int:
    """List the recipes, or all of one."""
    parser = argparse.ArgumentParser(
        prog="python -m rlvr_lightning recipes", description="The data sets known by name: name, reward, what it is."
    )
    parser.add_argument("name", nargs="?", help="all about one: where it is, its columns, its prompt")
    name = parser.parse_args(argv).name
    if name:
        try:
            find_recipe(name)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(describe(name))
        return 0
    width = max(map(len, RECIPES))
    print("\n".join(f"{each:<{width}}  {known.reward:<10}  {known.what}" for each, known in RECIPES.items()))
    print("\nTasks of reasoning-gym: class_path: rlvr_lightning.data.gym.GymPrompts")
    return 0
