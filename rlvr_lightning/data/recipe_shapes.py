r"""Rows of well-known data sets to problems: what each column means, and what is done to it.

A shape returns `problem` and what the reward looks at; `solution` is what an example in front shows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from rlvr_lightning.data.reading import Problem, Unusable, text_in

Row = Mapping[str, Any]
LETTERS = "ABCD"
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def worked(row: Row, _: random.Random) -> Problem:
    r"""`solution` ends in a \boxed{} answer (NuminaMath-CoT, MATH)."""
    solution = text_in(row, "solution")
    return {"problem": text_in(row, "problem"), "answer": solution, "solution": solution}


def plain(row: Row, _: random.Random) -> Problem:
    """`answer` is the answer (MATH-500, AIME, DeepScaleR)."""
    return boxed(text_in(row, "problem"), row["answer"])


def boxed(problem: str, answer: Any) -> Problem:
    """A problem whose answer is known and not how it is found."""
    return {"problem": problem, "answer": answer, "solution": f"\\boxed{{{answer}}}"}


def graded(row: Row, rng: random.Random) -> Problem:
    """As `plain`; `difficulty` is how many of eight answers of a model were right, such as "3/8" (POLARIS)."""
    return plain(row, rng) | {"difficulty": row["difficulty"]}


def numina_1_5(row: Row, rng: random.Random) -> Problem:
    """`answer` is the answer, or says that there is none."""
    if row["answer"] in ("proof", "notfound"):
        raise Unusable(f"the answer is {row['answer']!r}")
    for column in ("problem_is_valid", "solution_is_valid"):
        if row[column] != "Yes":
            raise Unusable(f"{column} is not 'Yes'")
    return plain(row, rng) | {"solution": row["solution"], "source": row["source"]}


def gsm8k(row: Row, _: random.Random) -> Problem:
    """`answer` is worked out, with notes for a calculator, and ends in "#### 72"."""
    steps, mark, last = text_in(row, "answer").rpartition("####")
    if not mark:
        raise Unusable("no '####' in 'answer'")
    answer = last.strip().replace(",", "")
    solution = f"{_CALCULATOR.sub('', steps).strip()}\nThe answer is \\boxed{{{answer}}}."
    return {"problem": text_in(row, "question"), "answer": answer, "solution": solution}


def amc(row: Row, _: random.Random) -> Problem:
    """`answer` is a number with a decimal point, such as 142.0."""
    answer = row["answer"]
    whole = isinstance(answer, float) and answer.is_integer()
    return boxed(text_in(row, "problem"), str(int(answer)) if whole else answer)


def olympiad(row: Row, _: random.Random) -> Problem:
    """`final_answer` is a list; where it has several texts all of them are the answer."""
    answers = row["final_answer"] or []
    context = row["context"] or ""
    question = text_in(row, "question")
    answer = ", ".join(str(each).replace("$", "").strip() for each in answers)
    return boxed(f"{context}\n{question}".strip(), answer or None)


def dapo(row: Row, _: random.Random) -> Problem:
    """`prompt` is the bare problem, `solution` the answer."""
    return boxed(text_in(row, "prompt"), row["solution"])


def gpqa(row: Row, rng: random.Random) -> Problem:
    """One right and three wrong options, shown in an order drawn for the row."""
    right = text_in(row, "Correct Answer").strip()
    choices = [right, *(text_in(row, f"Incorrect Answer {k}").strip() for k in (1, 2, 3))]
    if len(set(choices)) < len(choices):
        raise Unusable("two options are the same")
    rng.shuffle(choices)
    shown = "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    answer = LETTERS[choices.index(right)]
    problem = f"{text_in(row, 'Question').strip()}\n\n{shown}"
    return {"problem": problem, "answer": answer, "choices": choices, "solution": f"Answer: {answer}"}


def apps(row: Row, _: random.Random) -> Problem:
    """`input_output` is JSON text: inputs and outputs, and the name of a function if calls are tested."""
    tests, begun = text_in(row, "input_output"), row["starter_code"] or ""
    calls = '"fn_name"' in tests
    how = "Write the function that it asks for." if calls else "Read standard input, write to standard output."
    start = f"Begin with this code:\n```python\n{begun.rstrip()}\n```\n\n" if begun.strip() else ""
    return {
        "problem": f"{text_in(row, 'question').strip()}\n\n{start}{how}",
        "input_output": tests,
        "starter_code": begun,
    }


def code_contests(row: Row, _: random.Random) -> Problem:
    """Tests are given as {input: [...], output: [...]}; problems that read or write files are left out."""
    for column in ("input_file", "output_file"):
        if row[column]:
            raise Unusable(f"it has an {column}")
    tests = {f"{kind}_tests": row[f"{kind}_tests"] for kind in ("public", "private", "generated")}
    return {
        "problem": f"{text_in(row, 'description').strip()}\n\nRead standard input, write to standard output."
    } | tests


def humaneval(row: Row, _: random.Random) -> Problem:
    """`prompt` is the beginning of a function, `test` defines `check`."""
    begun = text_in(row, "prompt")
    fields = {name: row[name] for name in ("test", "entry_point")}
    solution = f"```python\n{begun}{row['canonical_solution']}\n```"
    return {"problem": begun, "code_prompt": begun, "solution": solution} | fields


def mbpp(row: Row, _: random.Random) -> Problem:
    """`test_list` holds asserts; they are shown, because they alone say what the function is called."""
    tests = list(row["test_list"] or [])
    shown = "\n".join(map(str, tests))
    return {
        "problem": f"{text_in(row, 'text').strip()}\nYour code should pass these tests:\n```python\n{shown}\n```",
        "test_list": tests,
        "test_setup_code": row["test_setup_code"] or "",
        "code": row["code"],
        "solution": f"```python\n{row['code']}\n```",
    }


def countdown(row: Row, _: random.Random) -> Problem:
    """`nums` are to be combined to `target`; many answers are right."""
    nums, target = list(row["nums"] or []), row["target"]
    if not nums or target is None:
        raise Unusable("no numbers or no target")
    problem = (
        f"Using each of the numbers {', '.join(map(str, nums))} exactly once, with +, -, *, / and brackets, "
        f"write an expression that equals {target}."
    )
    return {"problem": problem, "nums": nums, "target": target}
