"""How a problem becomes a prompt: a template, solved examples, a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlvr_lightning.data.identity import normal_text


@dataclass(frozen=True, kw_only=True)
class Example:
    """A problem and how it is answered."""

    problem: str
    solution: str


@dataclass(frozen=True, kw_only=True)
class Wording:
    r"""How a problem becomes a prompt.

    Example:
        >>> wording = Wording(template="{problem}\nAnswer in one word.")
        >>> wording.prompts(["Is 7 prime?"])
        ['Is 7 prime?\nAnswer in one word.']
        >>> sums = Wording(template="{problem} =", examples=[Example(problem="1+1", solution="2")])
        >>> sums.prompts(["1+2", "1+1"])
        ['1+1 =\n2\n\n1+2 =', '1+1 =']
    """

    template: str | None = None
    """The text, with `{problem}` where the problem stands; other braces stay as they are. None: as the data set has
    it, which is the problem alone where it says nothing."""
    chat_tokenizer: str | None = None
    """Put the text through the chat template of this tokenizer (`smollm2`, a folder or a hub name); None: raw text."""
    system: str | None = None
    """System message of the chat."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Passed on to the chat template, such as `enable_thinking: false` for Qwen3."""
    examples: list[Example] = field(default_factory=list)
    """Solved problems in front, in a chat as earlier turns; none stands in front of itself."""

    def __post_init__(self) -> None:
        if self.template is not None and "{problem}" not in self.template:
            raise ValueError(f"wording.template must contain {{problem}}, got {self.template!r}")
        if self.chat_tokenizer is None and (self.system is not None or self.template_args):
            raise ValueError("wording.system and wording.template_args need wording.chat_tokenizer")

    def prompts(
        self, problems: Sequence[str], template: str = "{problem}", drawn: Sequence[Example] = (), num: int = 0
    ) -> list[str]:
        """The prompts for many problems; the tokenizer is loaded once.

        Args:
            problems: texts.
            template: what to use where `self.template` is None.
            drawn: solved problems to put in front, after `examples`: the first `num` that are not the problem itself.
            num: how many of them.

        Raises:
            ValueError: the tokenizer has no chat template, or refuses the chat.
        """
        template = self.template or template
        named = [(normal_text(each.problem), each) for each in self.examples]
        pool = [(normal_text(each.problem), each) for each in drawn]
        chats = []
        for problem in problems:
            own = normal_text(problem) if named or pool else ""
            before = [each for name, each in named if name != own]
            before += [each for name, each in pool if name != own][:num]
            turns = [(template.replace("{problem}", each.problem), each.solution) for each in before]
            chats.append((turns, template.replace("{problem}", problem)))
        return [as_text(*chat) for chat in chats] if self.chat_tokenizer is None else self._as_chats(chats)

    def _as_chats(self, chats: Sequence[tuple[list[tuple[str, str]], str]]) -> list[str]:
        from rlvr_lightning.policy import load_tokenizer

        tokenizer = load_tokenizer(str(self.chat_tokenizer))
        if tokenizer.chat_template is None:
            raise ValueError(f"wording.chat_tokenizer: {self.chat_tokenizer!r} has no chat template; leave it out")
        settings = {"tokenize": False, "add_generation_prompt": True} | self.template_args
        return [str(tokenizer.apply_chat_template(self._messages(*chat), **settings)) for chat in chats]

    def _messages(self, turns: list[tuple[str, str]], text: str) -> list[dict[str, str]]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for asked, answered in turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*messages, {"role": "user", "content": text}]


def as_text(turns: list[tuple[str, str]], text: str) -> str:
    """Solved problems, blank lines between them, and the unsolved one."""
    return "\n\n".join([*(f"{asked}\n{answered}" for asked, answered in turns), text])
