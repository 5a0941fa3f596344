"""Tensors that cannot be a delta, in as few bytes as cheap coding gives: byte planes, Huffman-coded where it pays.

An fp32 number's highest byte (sign and most of the exponent) takes about a third of its room; bytes of the mantissa,
and the low halves of a split master, are noise, which is recognised by its entropy and stored as it is. Rows that never
moved are zeros and nearly vanish. Coded in segments of at most 2**20 entries, each plane of which is

    coding (1 byte: STORED or DEFLATED), bytes (4, little-endian), the bytes
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

STORED, DEFLATED = range(2)
HEAD = struct.Struct("<BI")
NOISE_BITS = 7.9
"""Entropy of a byte above which coding would save less than 2 %."""


def pack(values: np.ndarray) -> bytes:
    """One segment.

    Args:
        values: integers [n], any width.

    Example:
        >>> len(pack(np.zeros(1 << 20, np.int16))) < 4000
        True
        >>> unpack(pack(np.arange(300, dtype=np.int32)), 300, 4).view(np.int32)[299]
        np.int32(299)
    """
    parts = []
    for plane in np.ascontiguousarray(values.view(np.uint8).reshape(len(values), -1).T):
        coding, data = _pack_plane(plane)
        parts += [HEAD.pack(coding, len(data)), data]
    return b"".join(parts)


def _pack_plane(plane: np.ndarray) -> tuple[int, bytes]:
    counts = np.bincount(plane, minlength=256)
    share = counts[counts > 0] / max(1, len(plane))
    if -(share * np.log2(share)).sum() < NOISE_BITS:
        packer = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_RLE)  # Huffman codes, and runs of one byte
        data = packer.compress(plane.tobytes()) + packer.flush()
        if len(data) < len(plane):
            return DEFLATED, data
    return STORED, plane.tobytes()


def unpack(blob: bytes, entries: int, width: int) -> np.ndarray:
    """uint8 [entries * width], the bytes of a segment's values; never more, whatever the blob claims.

    Raises:
        ValueError: it is no segment of so many entries.
    """
    planes = np.empty((width, entries), np.uint8)
    at = 0
    for plane in planes:
        if at + HEAD.size > len(blob):
            raise ValueError("a segment is cut")
        coding, size = HEAD.unpack_from(blob, at)
        data = blob[at + HEAD.size : at + HEAD.size + size]
        at += HEAD.size + size
        found = np.frombuffer(_inflate(data, entries) if coding == DEFLATED else data, np.uint8)
        if len(found) != entries or coding > DEFLATED:
            raise ValueError("a segment is malformed")
        plane[:] = found
    if at != len(blob):
        raise ValueError("a segment is too long")
    return np.ascontiguousarray(planes.T).reshape(-1)


def _inflate(data: bytes, most_bytes: int) -> bytes:
    unpacker = zlib.decompressobj(-15)
    try:
        return unpacker.decompress(data, most_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"a segment is damaged: {error}") from None
