"""Prompts from a Hugging Face data set, by name or from local files, as text or as a chat."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from rlvr_lightning.data.prompts import PromptSource, Record
from rlvr_lightning.rewards.math_answer import as_list, usable_golds
from rlvr_lightning.rewards.math_text import last_boxed
from rlvr_lightning.rewards.math_verifier import Verifier, require_math_verify

Answers = Literal["any", "math", "boxed"]
FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
CHECKED_AT_ONCE, SHOWN = 1000, 20


@dataclass(frozen=True, kw_only=True)
class Wording:
    r"""How a problem becomes a prompt.

    Example:
        >>> Wording(template="{problem}\nAnswer in one word.")("Is 7 prime?")
        'Is 7 prime?\nAnswer in one word.'
    """

    template: str = "{problem}"
    """The text, with `{problem}` where the problem stands; other braces stay as they are."""
    chat_tokenizer: str | None = None
    """Put the text through the chat template of this tokenizer (`smollm2`, a folder or a hub name); None: raw text."""
    system: str | None = None
    """System message of the chat."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Passed on to the chat template, such as `enable_thinking: false` for Qwen3."""

    def __post_init__(self) -> None:
        if "{problem}" not in self.template:
            raise ValueError(f"wording.template must contain {{problem}}, got {self.template!r}")
        if self.chat_tokenizer is None and (self.system is not None or self.template_args):
            raise ValueError("wording.system and wording.template_args need wording.chat_tokenizer")

    def __call__(self, problem: str) -> str:
        """The prompt for one problem."""
        return self.prompts([problem])[0]

    def prompts(self, problems: Sequence[str]) -> list[str]:
        """The prompts for many problems; the tokenizer is loaded once.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        texts = [self.template.replace("{problem}", problem) for problem in problems]
        if self.chat_tokenizer is None:
            return texts
        from rlvr_lightning.policy import load_tokenizer

        tokenizer = load_tokenizer(self.chat_tokenizer)
        if tokenizer.chat_template is None:
            raise ValueError(f"wording.chat_tokenizer: {self.chat_tokenizer!r} has no chat template; leave it out")
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        chats = [[*opening, {"role": "user", "content": text}] for text in texts]
        settings = {"tokenize": False, "add_generation_prompt": True} | self.template_args
        return [str(tokenizer.apply_chat_template(chat, **settings)) for chat in chats]


class HubPrompts(PromptSource):
    r"""Records with `prompt`, `answer` and `source_row`, from the data sets of the model hub or from files.

    Args:
        path: name on the hub (`owner/name`), or a local .jsonl, .json or .parquet file.
        prompt_column: column with the problem.
        answer_column: column with the right answer; None if the reward needs none.
        config: which configuration of a data set on the hub.
        split: which split of a data set on the hub.
        wording: how a problem becomes a prompt.
        num: keep this many, drawn at random without repetition; None keeps all, in order.
        seed: of the drawing.
        answers: `math` leaves out problems whose answer `MathAnswer` cannot parse, and reports how many; `boxed` does
            so too, for a column of worked solutions: the answer is what the last \boxed{} of the solution holds.

    Raises:
        ValueError: no such file, a missing column (the message lists those found), or too few problems for `num`.
    """

    def __init__(  # noqa: PLR0913 (a block of the YAML, flat on purpose)
        self,
        path: str,
        prompt_column: str = "problem",
        answer_column: str | None = "answer",
        config: str | None = None,
        split: str = "train",
        wording: Wording = Wording(),
        num: int | None = None,
        seed: int = 0,
        answers: Answers = "any",
    ) -> None:
        if num is not None and num < 1:
            raise ValueError(f"num must be at least 1, or null for all, got {num}")
        if answers != "any" and answer_column is None:
            raise ValueError(f"answers: {answers} needs an answer_column")
        table = load_table(path, config, split)
        wanted = [column for column in (prompt_column, answer_column) if column is not None]
        if missing := [column for column in wanted if column not in table.column_names]:
            raise ValueError(f"{path}: no column {missing[0]!r}; the columns are {', '.join(table.column_names)}")
        order = list(range(len(table)))
        if num is not None:
            random.Random(f"hub/{seed}").shuffle(order)
        found = _usable(((row, table[row]) for row in order), prompt_column, Gold(answer_column, answers), num)
        if num is not None and len(found) < num:
            raise ValueError(f"num: {path} has {len(found)} usable problems, fewer than {num}")
        prompts = wording.prompts([problem for _, problem, _ in found])
        self._records: list[Record] = [
            {"prompt": prompt, "source_row": row} | ({} if answer_column is None else {"answer": answer})
            for prompt, (row, _, answer) in zip(prompts, found, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return self._records[index]


def load_table(path: str, config: str | None, split: str) -> Any:
    """A `datasets.Dataset` from the hub or a local file; ValueError with one line if it cannot be had."""
    file, kind = Path(path).expanduser(), FILE_TYPES.get(Path(path).suffix.lower())
    if kind is not None and not file.is_file():
        raise ValueError(f"path: there is no file {path!r}")
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        if kind is not None:
            return load_dataset(kind, data_files=str(file), split="train")
        return load_dataset(path, config, split=split)
    except (OSError, ValueError, DatasetsError) as error:  # not on the hub, no such split, no network, a damaged file
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(f"path: cannot load {path!r}: {reason or type(error).__name__}") from None


class Gold:
    """The right answers of rows, or None where they cannot be used; a context that ends the checking processes."""

    def __init__(self, column: str | None, kind: Answers) -> None:
        self.column, self.kind = column, kind
        if kind != "any":
            require_math_verify()
        self.verifier = Verifier()

    def __enter__(self) -> Gold:
        return self

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Their answers; True where there is no column."""
        golds = [True if self.column is None else row[self.column] for row in rows]
        if self.kind == "any":
            return golds
        texts = [as_list(gold) if gold is not None else [] for gold in golds]
        if self.kind == "boxed":
            texts = [[last_boxed(each) or "" for each in several] for several in texts]
        flat = [each for several in texts for each in several]
        usable = dict(zip(flat, usable_golds(flat, self.verifier), strict=True))
        kept = [[usable[each] for each in several] for several in texts]
        return [
            _as_given(gold, mine) if mine and None not in mine else None for gold, mine in zip(golds, kept, strict=True)
        ]

    def __exit__(self, *_: object) -> None:
        self.verifier.close()


def _as_given(gold: Any, answers: list[Any]) -> Any:
    """One answer, or the list of them that the row had."""
    return answers if isinstance(gold, list | tuple) else answers[0]


def _usable(
    rows: Iterable[tuple[int, Mapping[str, Any]]], prompt_column: str, gold: Gold, num: int | None
) -> list[tuple[int, str, Any]]:
    """(row, problem, answer) of the first `num` rows that have both; the others are counted and the first are shown."""
    found: list[tuple[int, str, Any]] = []
    dropped: list[int] = []
    remaining = iter(rows)
    with gold:
        while batch := list(
            islice(remaining, CHECKED_AT_ONCE if num is None else min(CHECKED_AT_ONCE, num - len(found)))
        ):
            for (number, row), answer in zip(batch, gold([row for _, row in batch]), strict=True):
                problem = row[prompt_column]
                if not isinstance(problem, str) or not problem.strip() or answer is None:
                    dropped.append(number)
                else:
                    found.append((number, problem, answer))
    if dropped:
        shown = ", ".join(map(str, dropped[:SHOWN])) + (", ..." if len(dropped) > SHOWN else "")
        rank_zero_warn(
            f"left out {len(dropped)} problems that are empty or have no usable answer (rows {shown}); "
            f"kept {len(found)}"
        )
    return found
