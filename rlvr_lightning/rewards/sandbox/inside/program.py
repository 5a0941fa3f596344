"""The program's own process in a run of calls: all of it belongs to the program, nothing here protects anything."""

from __future__ import annotations

import sys
from types import ModuleType

from .plain import decode, encode, read_frame, write_frame

TYPE_CHECKING = False  # typing takes longer to import than all the rest
if TYPE_CHECKING:
    from typing import Any

NAME = "program"


def serve(source: str, requests: int, replies: int) -> None:
    """Load a program, then answer the checker's requests until there are no more.

    Args:
        source: Python text.
        requests: file descriptor of frames `[verb, ...]`.
        replies: file descriptor for frames `["ok", value]` or `["error", name of the exception, its text]`.
    """
    module = ModuleType(NAME)
    sys.modules[NAME] = module
    objects: list[Any] = []

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    while (frame := read_frame(requests)) is not None:
        try:
            reply = encode(["ok", answer(source, module, decode(frame, objects.__getitem__))], refer)
        except BaseException as error:
            reply = encode(["error", type(error).__name__, str(error)[:300]])
        write_frame(replies, reply)


def answer(source: str, module: ModuleType, request: list[Any]) -> Any:
    """Do what one request asks."""
    verb, *rest = request
    if verb == "load":
        return exec(compile(source, "program.py", "exec"), module.__dict__)
    if verb == "name":
        return getattr(module, rest[0])
    if verb == "attribute":
        return getattr(rest[0], rest[1])
    if verb == "call":
        return rest[0](*rest[1], **rest[2])
    assert verb == "items"
    return list(rest[0])
