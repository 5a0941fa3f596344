"""Any Python function as a reward."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.schema import Sample

Scored = Sequence[float] | Awaitable[Sequence[float]]


class Function(Reward):
    """What a function of yours gives: `def score(samples, **arguments) -> list[float]`, or the same with `async def`.

    `samples` is a list of `Sample`: prompt, text, token_ids, record (the fields of the data set), truncated. Return one
    finite number for each. It runs beside the other rewards in a thread of its own.

    Args:
        path: `package.module.name` of an importable module, or `file.py:name`, relative to the working directory.
        arguments: passed on by name.

    Raises:
        ValueError: it cannot be imported, is not callable, or does not take these arguments.

    Example:
        >>> sample = Sample(prompt="", text="abc", token_ids=[], record={"answer": "b"})
        >>> Function("rlvr_lightning.rewards.function.contains", {"field": "answer"})([sample])
        [1.0]
    """

    def __init__(self, path: str, arguments: dict[str, Any] | None = None) -> None:
        self.path, self.arguments = path, arguments or {}
        self._function: Callable[..., Scored] | None = None
        signature = inspect.signature(self.function)
        try:
            signature.bind([], **self.arguments)
        except TypeError as error:
            raise ValueError(
                f"path: {path} takes {signature}, not (samples, {', '.join(self.arguments)}): {error}"
            ) from None

    @property
    def function(self) -> Callable[..., Scored]:
        """Imported when first needed: a process that this reward is sent to imports its own."""
        if self._function is None:
            self._function = load(self.path)
        return self._function

    def __call__(self, samples: Sequence[Sample]) -> Scored:
        """See `Reward`."""
        return self.function(list(samples), **self.arguments)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_function": None}


def load(path: str) -> Callable[..., Scored]:
    """The function that a path names."""
    file, colon, name = path.rpartition(":")
    module_name, dot, last = (str(Path(file).resolve()), colon, name) if colon else path.rpartition(".")
    if not dot:
        raise ValueError(f"path: {path!r} must be package.module.name, or file.py:name")
    try:
        module = _from_file(Path(module_name)) if colon else importlib.import_module(module_name)
        found = getattr(module, last)
    except (ImportError, OSError, AttributeError, SyntaxError) as error:
        raise ValueError(f"path: cannot load {path!r}: {error}") from None
    if not callable(found):
        raise ValueError(f"path: {path!r} is {type(found).__name__}, not a function")
    return found


def _from_file(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise OSError(f"there is no Python file {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def contains(samples: Sequence[Sample], field: str = "answer") -> list[float]:
    """1 where the completion contains the right answer: an example of a function, and easily gamed as a reward."""
    return [float(str(sample.record[field]) in sample.text) for sample in samples]
