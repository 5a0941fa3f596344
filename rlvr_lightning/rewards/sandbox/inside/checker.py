"""Tests run in one process, the program they test in another: it cannot touch what judges it.

A function of the program is called by sending its arguments and getting back its result as plain data, which this side
rebuilds from bytes. So the program sees the arguments of the calls and nothing else of the tests; its results are
compared here, by code it cannot reach; an object of a class of its own stays there, and equals nothing.
"""

from __future__ import annotations

import builtins

from .plain import decode, encode, read_frame, write_frame

TYPE_CHECKING = False  # typing takes longer to import than all the rest
if TYPE_CHECKING:
    from typing import Any

GONE = "its process ended or exceeded a limit"
# Raised where an iterator asks, these would end a loop over tests early.
NOT_PASSED_ON = ("StopIteration", "StopAsyncIteration")


class ProgramError(Exception):
    """The program raised something that is no built-in exception."""


class ProgramGone(BaseException):
    """The program's process ended, or answered nonsense."""


class Channel:
    """The way to the program's process.

    Args:
        to_program: file descriptor for requests.
        from_program: file descriptor of replies.
        most_bytes: of a reply.
    """

    def __init__(self, to_program: int, from_program: int, most_bytes: int) -> None:
        self.to_program, self.from_program, self.most_bytes = to_program, from_program, most_bytes
        self.gone = False

    def ask(self, *request: Any) -> Any:
        """The value of a reply; raises what the program raised, ProgramGone if there is no reply."""
        message = encode(list(request), _number)
        try:
            write_frame(self.to_program, message)
            frame = read_frame(self.from_program, self.most_bytes)
            verdict, *rest = decode(frame or b"", lambda number: Remote(self, number))
            if verdict == "ok" and len(rest) == 1:
                return rest[0]
            name, text = (str(part) for part in rest)
        except (OSError, ValueError, TypeError, MemoryError):
            self.gone = True
            raise ProgramGone(GONE) from None
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and name not in NOT_PASSED_ON:
            raise _made(kind, name, text)
        raise ProgramError(f"{name}: {text}")


def _made(kind: type[Exception], name: str, text: str) -> Exception:
    try:
        return kind(text)
    except TypeError:  # some want other arguments
        return ProgramError(f"{name}: {text}")


class Remote:
    """An object of the program's."""

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel, self._number = channel, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What it returns."""
        return self._channel.ask("call", self, list(args), kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._channel.ask("attribute", self, name)

    def __iter__(self) -> Any:
        return iter(self._channel.ask("items", self))


def _number(value: Any) -> int:
    if not isinstance(value, Remote):
        raise TypeError(f"a value of type {type(value).__name__} cannot be sent to the program")
    return value._number


class Names(dict):
    """Global names of the tests; those nobody defined are the program's."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(__name__="tests")
        self._channel = channel

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        try:
            return self._channel.ask("name", name)
        except AttributeError:
            raise KeyError(name) from None


def check(tests: dict[str, Any], to_program: int, from_program: int, most_bytes: int) -> dict[str, Any]:
    """Run tests against a program.

    Args:
        tests: `setup`, Python text that comes first; `names` that the program must define, whatever else they mean;
            `tests`, Python texts, each of which passes if it raises nothing; `stop`, to end at the first failure.
        to_program: file descriptor for requests.
        from_program: file descriptor of replies.
        most_bytes: of a reply.

    Returns:
        `passed`, a bool for each test that was run; `why`, of the first failure; `invalid`, why the tests themselves
        cannot run, or "".
    """
    channel = Channel(to_program, from_program, most_bytes)
    names = Names(channel)
    try:
        compiled = [compile(text, "test", "exec") for text in tests["tests"]]
        exec(compile(tests["setup"], "setup", "exec"), names)
    except BaseException as error:
        return {"passed": [], "why": "", "invalid": _text(error)}
    passed: list[bool] = []
    why = ""
    try:
        channel.ask("load")
        names.update({name: channel.ask("name", name) for name in tests["names"]})
    except BaseException as error:
        return {"passed": [], "why": _text(error), "invalid": ""}
    for test, text in zip(compiled, tests["tests"], strict=True):
        reason = _failure(test, text, names)
        if channel.gone:
            reason = GONE
        passed.append(reason is None)
        why = why or (reason or "")
        if channel.gone or (tests["stop"] and not passed[-1]):
            break
    return {"passed": passed, "why": why, "invalid": ""}


def _failure(test: Any, text: str, names: Names) -> str | None:
    try:
        exec(test, names)
    except BaseException as error:
        lines, at, frames = text.splitlines(), 0, error.__traceback__
        while frames is not None:
            at = frames.tb_lineno if frames.tb_frame.f_code.co_filename == "test" else at
            frames = frames.tb_next
        line = lines[at - 1].strip() if 0 < at <= len(lines) else ""
        return f"{line}: {_text(error)}"[:400]
    return None


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
