"""Plain data as bytes, for two sides of which one may lie: decoding makes plain values and nothing else.

A message is a frame: its length (4 bytes, little endian), then one value. A value is a letter and what it needs:
`N`one `T`rue `F`alse `i`nt `f`loat `c`omplex `s`tr `b`ytes `l`ist `t`uple `S`et fro`Z`enset `d`ict, and `r`, the number
of an object that stays on the side where it was made.
"""

from __future__ import annotations

import os
import struct

TYPE_CHECKING = False  # typing takes longer to import than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

_SIZE = struct.Struct("<I")
_FLOAT = struct.Struct("<d")
_COMPLEX = struct.Struct("<dd")
_MANY: dict[bytes, Callable[[Iterable[Any]], Any]] = {b"l": list, b"t": tuple, b"S": set, b"Z": frozenset}


def encode(value: Any, refer: Callable[[Any], int] | None = None) -> bytes:
    """A value as bytes.

    Args:
        value: None, a number, text, bytes, or lists, tuples, sets and dicts of these; subclasses become what they are.
        refer: numbers any other object; without it those raise.

    Raises:
        TypeError: an object that is not plain, and no `refer`.

    Example:
        >>> decode(encode({"a": [1, -2.5, (None, True)], 10**30: b"x"}))
        {'a': [1, -2.5, (None, True)], 1000000000000000000000000000000: b'x'}
    """
    out: list[bytes] = []
    _put(value, out, refer)
    return b"".join(out)


def _put(value: Any, out: list[bytes], refer: Callable[[Any], int] | None) -> None:
    if value is None or value is True or value is False:
        out.append({None: b"N", True: b"T", False: b"F"}[value])
    elif isinstance(value, (int, float, complex, str, bytes, bytearray)):
        out.append(_scalar(value))
    elif isinstance(value, (list, tuple, set, frozenset, dict)):
        kinds = {list: b"l", tuple: b"t", set: b"S", frozenset: b"Z", dict: b"d"}
        letter = next(letter for kind, letter in kinds.items() if isinstance(value, kind))
        items = [part for pair in value.items() for part in pair] if isinstance(value, dict) else list(value)
        out.append(letter + _SIZE.pack(len(items)))
        for item in items:
            _put(item, out, refer)
    elif refer is not None:
        out.append(b"r" + _SIZE.pack(refer(value)))
    else:
        raise TypeError(f"a value of type {type(value).__name__} cannot be sent to the program")


def _scalar(value: int | float | complex | str | bytes | bytearray) -> bytes:
    if isinstance(value, int):
        return _sized(b"i", int.to_bytes(value, value.bit_length() // 8 + 1, "little", signed=True))
    if isinstance(value, float):
        return b"f" + _FLOAT.pack(value)
    if isinstance(value, complex):
        return b"c" + _COMPLEX.pack(value.real, value.imag)
    if isinstance(value, str):
        return _sized(b"s", value.encode("utf-8", "surrogatepass"))
    return _sized(b"b", bytes(value))


def _sized(letter: bytes, data: bytes) -> bytes:
    return letter + _SIZE.pack(len(data)) + data


def decode(data: bytes, referred: Callable[[int], Any] | None = None) -> Any:
    """The value that some bytes stand for.

    Args:
        data: of `encode`, or of somebody who lies.
        referred: makes what stands for a numbered object; without it those raise.

    Raises:
        ValueError: the bytes are not those of one value.

    Example:
        >>> decode(b"l" + bytes([255] * 4))
        Traceback (most recent call last):
        ValueError: not a value: it ends early
    """
    try:
        value, end = _get(data, 0, referred)
    except (IndexError, struct.error):
        raise ValueError("not a value: it ends early") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a value: {error}") from None
    if end != len(data):
        raise ValueError("not a value: it goes on after its end")
    return value


def _get(data: bytes, at: int, referred: Callable[[int], Any] | None) -> tuple[Any, int]:
    letter, at = data[at : at + 1], at + 1
    if letter in (b"N", b"T", b"F"):
        return {b"N": None, b"T": True, b"F": False}[letter], at
    if letter == b"f":
        return _FLOAT.unpack_from(data, at)[0], at + _FLOAT.size
    if letter == b"c":
        return complex(*_COMPLEX.unpack_from(data, at)), at + _COMPLEX.size
    [size], at = _SIZE.unpack_from(data, at), at + _SIZE.size
    if letter == b"r" and referred is not None:
        return referred(size), at
    if letter in (b"i", b"s", b"b"):
        return _sized_scalar(letter, data[at : at + size], size), at + size
    items = []
    for _ in range(size):
        item, at = _get(data, at, referred)
        items.append(item)
    if letter == b"d":
        return dict(zip(items[::2], items[1::2], strict=True)), at
    if letter not in _MANY:
        raise TypeError(f"no kind {letter!r}")
    return _MANY[letter](items), at


def _sized_scalar(letter: bytes, part: bytes, size: int) -> int | str | bytes:
    if len(part) != size:
        raise IndexError
    if letter == b"i":
        return int.from_bytes(part, "little", signed=True)
    return part.decode("utf-8", "surrogatepass") if letter == b"s" else part


def framed(data: bytes) -> bytes:
    """A message with its length in front."""
    return _SIZE.pack(len(data)) + data


def frame_size(head: bytes) -> int:
    """The length that the first 4 bytes of a frame announce."""
    return int(_SIZE.unpack(head)[0])


def write_frame(file: int, data: bytes) -> None:
    """Write a message to a file descriptor, all of it."""
    rest = memoryview(framed(data))
    while rest:
        rest = rest[os.write(file, rest) :]


def read_frame(file: int, most: int = 1 << 31) -> bytes | None:
    """Read a message of at most `most` bytes from a file descriptor, and not a byte more; None if there is none."""
    head = _exactly(file, _SIZE.size)
    if head is None or frame_size(head) > most:
        return None
    return _exactly(file, frame_size(head))


def _exactly(file: int, size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(file, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
