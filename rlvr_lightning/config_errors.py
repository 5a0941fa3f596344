"""One line for a mistake in a config, out of the many that the argument parser prints."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
import time
from argparse import Action, ArgumentError
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from rlvr_lightning import watch

BOILERPLATE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Validation failed"
    r"|Expected a path but|Problem with given class_path|Parser key \"|^$"
)


class Parser(LightningArgumentParser):
    """Lightning's parser without a page of usage in front of each error."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave with one line and status 2; inner parsers hand their message to the outer one."""
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        after_the_first()
        self.exit(2, f"error: {condense(message)}\n")
        raise AssertionError("exit returned")

    def _check_value_key(self, action: Action, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Also accept what is an interpolation still.

        Settings that another class takes over are checked before they are interpolated: `${seed_everything}` is no
        number then, and would be dropped without a word.
        """
        if isinstance(value, str) and "${" in value:
            return value
        return super()._check_value_key(action, value, *args, **kwargs)


def report(error: Exception) -> int | None:
    """Say an exception once, though many processes raise it; which of them is the story where they differ.

    Returns:
        the exit status, or None for an exception whose traceback is to be shown: only what a user can mend is one line.
    """
    one_line = isinstance(error, ValueError | FloatingPointError) and not os.environ.get("RLVR_TRACEBACK")
    watching = watch.current()
    if watching is None:
        if not one_line:
            return None
        after_the_first()
        print(f"error: {condense(str(error))}", file=sys.stderr)
        return 2
    watching.failed(error)  # unless the trainer has told it already
    if not watching.is_first:
        same = watching.cause is not None and watching.cause.how == watch.what_happened(error)
        if not same:
            watching.tell()
        return 2 if same and one_line else 1
    if watch.timed_out(error):
        watching.tell()
        return 1
    if not one_line:
        return None
    place = "" if watching.on_all(error) else f"rank {watching.rank} (host {watching.host}, pid {os.getpid()}): "
    watching.tell(place + condense(str(error)))
    return 2


def after_the_first() -> None:
    """Leave it to the first process of this machine to say what all of them find in the same config.

    Where it does, its end ends the others; where nothing does, this one says it too.
    """
    if int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))) > 0:
        time.sleep(3)


def condense(message: str) -> str:
    """The place and the reason of a parser's nested message, with a near name where one is unknown.

    Example:
        >>> condense('''Parser key "model":
        ...   Does not validate against any of the Union subtypes
        ...   Errors:
        ...     - Problem with given class_path 'rlvr_lightning.schema.Sampling':
        ...         Option 'max_token' is not accepted
        ...     - Expected a <class 'NoneType'>''')
        "model: unknown option 'max_token' of Sampling; did you mean 'max_tokens'?"
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    place = ".".join(key for line in lines for key in re.findall(r'^Parser key "([^"]+)"', line))
    class_paths = [path for line in lines for path in re.findall(r"given class_path '([^']+)'", line)]
    reasons = [line for line in lines if not BOILERPLATE.search(line)] or [lines[0]]
    reason = plainer(" ".join(reasons) if "parsing config" in reasons[0] else reasons[0])
    class_paths += re.findall(r"class_path='([^']+)'", reason)
    if (unknown := re.match(r"Option '([^']+)' is not accepted", reason)) and class_paths:
        reason = unknown_option(unknown[1], class_paths[-1])
    return f"{place}: {reason}" if place else reason


def plainer(reason: str) -> str:
    """A parser's sentence in a user's words.

    Example:
        >>> plainer("Expected a typing.Literal['mean', 'mean_std']. Got value: median")
        "expected one of ['mean', 'mean_std'], got median"
    """
    reason = re.sub(r"Type typing\.Callable\[.*?\] expects a function or a callable class: ", "", reason)
    reason = re.sub(r"<class '(\w+)'>", r"\1", reason)
    return reason.replace("Expected a typing.Literal", "expected one of ").replace(". Got value:", ", got")


def unknown_option(option: str, class_path: str) -> str:
    """Says which class does not know the option, and which options come near or exist."""
    module, _, name = class_path.rpartition(".")
    known = parameters_of(getattr(importlib.import_module(module), name))
    if option.split(".")[0] in known:  # by a base class, and not from outside
        return f"unknown option {option!r} of {name}; {name} sets it itself"
    near = difflib.get_close_matches(option.split(".")[0], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
    return f"unknown option {option!r} of {name}; {hint}"


def parameters_of(kind: Any) -> list[str]:
    """Names of what a class or function takes; with `**kwargs` also what its base classes take.

    Example:
        >>> from rlvr_lightning.policy_module import PolicyModule
        >>> class Own(PolicyModule):
        ...     def __init__(self, model: str, mine: int, **kwargs):
        ...         super().__init__(model, **kwargs)
        >>> parameters_of(Own)[:4]
        ['model', 'mine', 'optimizer', 'scheduler']
    """
    found: dict[str, None] = {}
    classes = inspect.getmro(kind) if inspect.isclass(kind) else ()
    for maker in [vars(k)["__init__"] for k in classes if "__init__" in vars(k)] or [kind]:
        parameters = inspect.signature(maker).parameters.values()
        found |= dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in found if name != "self"]
