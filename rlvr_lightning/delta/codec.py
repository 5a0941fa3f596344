"""The bytes of a segment of a delta, a run of at most 2**20 entries of one tensor. Numpy and zlib only.

Two things that a reader who has the base knows make a file small. First, how large each entry of the base is: what an
update can change in 16 bits depends on that more than on anything else, so positions are counted among the entries of
equal exponent, of which either many or very few changed. Second, the old value: a new one is stored as its distance in
units of the last place (between neighbouring floats it is 1, across zero too), zigzag, wrapping around, so that every
bit pattern survives. Both are varints, coded by deflate's Huffman codes, in order of exponent, then position.

Layout of a segment, integers little-endian: kind (1 byte); then, unless the kind is UNCHANGED,
count, bytes of positions, bytes of values (4 bytes each), positions, values:

    UNCHANGED     nothing follows
    BY_EXPONENT   positions: number of exponents, (exponent, count) each, then gaps; values: distances
    PLAIN         needs no base. positions: gaps; values: one byte of each, then the next byte of each, ...
    RAW           no positions; values: all entries of the segment as they are, because nothing else was smaller
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import torch

SEGMENT = 1 << 20
"""Entries of a segment: bounds the memory of coding (about 25 MB at 1 %, 100 MB if all changed) for any model."""
UNCHANGED, BY_EXPONENT, PLAIN, RAW = range(4)
HEAD = struct.Struct("<III")
SIGNED: dict[int, np.dtype[Any]] = {1: np.dtype("<i1"), 2: np.dtype("<i2"), 4: np.dtype("<i4"), 8: np.dtype("<i8")}
EXPONENT = {torch.bfloat16: (7, 0xFF), torch.float16: (10, 0x1F), torch.float32: (23, 0xFF), torch.float64: (55, 0xFF)}
"""How far to shift an entry and what to keep of it; of float64 the highest 8 bits of 11."""


def encode(
    positions: np.ndarray, values: np.ndarray, base: np.ndarray | None, entries: int, dtype: torch.dtype
) -> bytes:
    """One segment in the smallest of the kinds that apply.

    Args:
        positions: integers [K], strictly ascending, 0 <= position < entries.
        values: signed integers as wide as an entry [K]: the bits after.
        base: signed integers [entries]: the bits before; None stores something that can be read without a base.
        entries: of the segment, at most SEGMENT.
        dtype: of the tensor.
    """
    if not len(positions):
        return bytes([UNCHANGED])
    if base is None:
        kind, where, what = PLAIN, gaps(positions), values.reshape(-1, 1).view(np.uint8).T.tobytes()
    else:
        kind = BY_EXPONENT
        where, order = _by_exponent(positions, base, dtype)
        what = to_varints(_zigzag(ordered(values[order], dtype) - ordered(base[positions[order]], dtype)))
    where, what = _deflate(where), _deflate(what)
    if base is None or len(where) + len(what) < entries * values.itemsize:
        return bytes([kind]) + HEAD.pack(len(positions), len(where), len(what)) + where + what
    after = base.copy()
    after[positions] = values
    return bytes([RAW]) + HEAD.pack(len(positions), 0, after.nbytes) + after.tobytes()


def length(head: bytes) -> int:
    """Bytes of a segment, from its first 13 (or all, if fewer are left)."""
    if head[:1] == bytes([UNCHANGED]):
        return 1
    if len(head) < 1 + HEAD.size or head[0] > RAW:
        raise ValueError("delta: a segment of the file is malformed")
    _, where, what = HEAD.unpack_from(head, 1)
    return 1 + HEAD.size + where + what


def decode(blob: bytes, base: np.ndarray | None, entries: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Positions (int64, ascending) and bits (signed integers) of a segment; the arguments are those of `encode`.

    Raises:
        ValueError: the bytes are no segment, or not one of this base.
    """
    width = dtype.itemsize
    if blob[:1] == bytes([UNCHANGED]):
        return np.empty(0, np.int64), np.empty(0, SIGNED[width])
    if length(blob) != len(blob):
        raise ValueError("delta: a segment of the file is malformed")
    count, n_where, _ = HEAD.unpack_from(blob, 1)
    body = memoryview(blob)[1 + HEAD.size :]
    if count > entries or (base is None and blob[0] != PLAIN):
        raise ValueError("delta: a segment needs its base" if base is None else "delta: a segment is too long")
    if blob[0] == RAW:
        return _decode_raw(body, base, entries, width)
    if blob[0] == PLAIN:
        where = from_varints(_inflate(body[:n_where], 5 * count), count)
        planes = np.frombuffer(_inflate(body[n_where:], width * count), np.uint8)
        if len(planes) != width * count:
            raise ValueError("delta: a segment's values are malformed")
        positions = _within(np.cumsum(where + 1) - 1, entries)
        return positions, np.array(planes.reshape(width, count).T, order="C").view(SIGNED[width]).reshape(-1)
    assert base is not None
    positions = _from_exponents(_inflate(body[:n_where], 5 * (count + 513)), count, base, dtype)
    steps = from_varints(_inflate(body[n_where:], 10 * count), count, 10)
    values = ordered(ordered(base[positions], dtype) + _unzigzag(steps, width), dtype)
    order = np.argsort(positions)
    return positions[order], values[order]


def gaps(positions: np.ndarray) -> bytes:
    """Varints of the unchanged entries before each changed one."""
    return to_varints(np.diff(positions, prepend=-1) - 1)


def to_varints(numbers: np.ndarray) -> bytes:
    """Seven bits a byte, lowest first, the eighth bit set on all but the last byte.

    >>> to_varints(np.array([1, 128, 0])).hex()
    '01800100'
    """
    rest = numbers.astype(np.uint64)
    sizes = np.ones(len(rest), np.int64)
    for bits in range(7, 64, 7):
        sizes += rest >= np.uint64(1 << bits)
    ends = np.cumsum(sizes)
    out = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    at, which = ends - sizes, np.arange(len(rest))
    while len(which):
        more = sizes[which] > 1
        out[at[which]] = (rest[which] & np.uint64(127)) | (more.astype(np.uint64) << np.uint64(7))
        which = which[more]
        rest[which] >>= np.uint64(7)
        sizes[which] -= 1
        at[which] += 1
    return out.tobytes()


def from_varints(data: bytes, count: int, longest: int = 5) -> np.ndarray:
    """Back to `count` numbers: int64, or uint64 if they may be longer than 5 bytes.

    >>> from_varints(bytes.fromhex("01800100"), 3).tolist()
    [1, 128, 0]
    """
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 128) + 1
    sizes = np.diff(ends, prepend=0)
    if len(ends) != count or (count and (ends[-1] != len(raw) or sizes.max() > longest)) or (not count and len(raw)):
        raise ValueError("delta: a segment's numbers are malformed")
    out, at, which = np.zeros(count, np.uint64), ends - sizes, np.arange(count)
    for byte in range(longest):
        which = which[sizes[which] > byte]
        out[which] |= (raw[at[which] + byte] & 127).astype(np.uint64) << np.uint64(7 * byte)
    return out if longest > 5 else out.astype(np.int64)


def exponents_of(base: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """uint8 [entries]; all 0 for dtypes without a known exponent."""
    if dtype not in EXPONENT:
        return np.zeros(len(base), np.uint8)
    shift, mask = EXPONENT[dtype]
    return ((base >> shift) & mask).astype(np.uint8)


def _by_exponent(positions: np.ndarray, base: np.ndarray, dtype: torch.dtype) -> tuple[bytes, np.ndarray]:
    """Varints that say which positions, and the order (indices into them) in which they are said."""
    exponents = exponents_of(base, dtype)
    changed = np.zeros(len(base), bool)
    changed[positions] = True
    by_exponent = np.argsort(exponents, kind="stable")
    places = np.flatnonzero(changed[by_exponent])  # ascending: by exponent, then by position
    found = by_exponent[places]
    sizes = np.bincount(exponents, minlength=256)
    counts = np.bincount(exponents[found], minlength=256)
    ranks = places - (np.cumsum(sizes) - sizes)[exponents[found]]
    steps = np.diff(ranks, prepend=-1) - 1
    present = np.flatnonzero(counts)
    firsts = (np.cumsum(counts) - counts)[present]
    steps[firsts] = ranks[firsts]
    table = np.stack([present, counts[present]], 1).reshape(-1)
    order = np.searchsorted(positions, found)
    return to_varints(np.concatenate([[len(present)], table, steps])), order


def _from_exponents(data: bytes, count: int, base: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Positions in the order of `_by_exponent`."""
    exponents = exponents_of(base, dtype)
    numbers = from_varints(data, int((np.frombuffer(data, np.uint8) < 128).sum()))
    kinds = int(numbers[0]) if len(numbers) else 0
    if not 0 < kinds <= 256 or len(numbers) != 1 + 2 * kinds + count:
        raise ValueError("delta: a segment's positions are malformed")
    present, counts = numbers[1 : 1 + 2 * kinds].reshape(-1, 2).T
    if counts.sum() != count or counts.min() < 1 or present.max() > 255 or (np.diff(present) <= 0).any():
        raise ValueError("delta: a segment's positions are malformed")
    sizes = np.bincount(exponents, minlength=256)
    total = np.cumsum(numbers[1 + 2 * kinds :] + 1)
    before = np.concatenate([[0], total[np.cumsum(counts)[:-1] - 1]])
    ranks = total - np.repeat(before, counts) - 1
    if (ranks >= np.repeat(sizes[present], counts)).any():
        raise ValueError("delta: a segment does not fit the base; it was made from other weights")
    places = ranks + np.repeat((np.cumsum(sizes) - sizes)[present], counts)
    return np.argsort(exponents, kind="stable")[places]


def ordered(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Integers in the order of the floats they are the bits of, neighbours 1 apart; its own inverse."""
    if not dtype.is_floating_point:
        return bits
    lowest = np.iinfo(bits.dtype).min
    return np.where(bits < 0, ~(bits ^ lowest), bits)


def _zigzag(steps: np.ndarray) -> np.ndarray:
    """0, -1, 1, -2, ... to 0, 1, 2, 3, ..., unsigned of the same width."""
    width = steps.dtype.itemsize
    return ((steps << 1) ^ (steps >> (8 * width - 1))).view(f"<u{width}")


def _unzigzag(numbers: np.ndarray, width: int) -> np.ndarray:
    if len(numbers) and int(numbers.max()) >> (8 * width):
        raise ValueError("delta: a segment's values are malformed")
    small = numbers.astype(f"<u{width}")
    return ((small >> 1) ^ (~(small & 1) + 1)).view(SIGNED[width])


def _decode_raw(body: memoryview, base: np.ndarray | None, entries: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    if len(body) != entries * width or base is None:
        raise ValueError("delta: a segment's values are malformed")
    after = np.frombuffer(body, SIGNED[width])
    positions = np.flatnonzero(after != base)
    return positions, after[positions]


def _within(positions: np.ndarray, entries: int) -> np.ndarray:
    if len(positions) and positions[-1] >= entries:
        raise ValueError("delta: a segment's positions are malformed")
    return positions


def _deflate(data: bytes) -> bytes:
    """Huffman codes that adapt every 2048 bytes (memLevel 5): the exponents differ in their statistics."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -15, 5, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(data) + packer.flush()


def _inflate(data: memoryview, most_bytes: int) -> bytes:
    """Never more than `most_bytes`, whatever the data claims to be."""
    unpacker = zlib.decompressobj(-15)
    try:
        found = unpacker.decompress(data, most_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"delta: a segment of the file is damaged: {error}") from None
    if len(found) > most_bytes or not unpacker.eof or unpacker.unused_data:
        raise ValueError("delta: a segment of the file is malformed")
    return found
