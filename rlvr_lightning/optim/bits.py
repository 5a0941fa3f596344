"""Arithmetic on the bits of floats: an fp32 number in two halves, and rounding with dice.

An fp32 number's upper 16 bits are a bf16 number. Rounded to nearest (exact ties away from zero), the fp32 bits u are

    u = (high << 16) + low,    high = (u + 0x8000) >> 16,    low in [-0x8000, 0x7FFF],

so the bf16 weight that the model computes with, and a signed 16-bit remainder, hold the fp32 master exactly. IEEE's
rule for ties (to even) would need a 17th bit: u = (high << 16) +- 0x8000 would both have the same even `high`.
Infinities and the NaNs that arithmetic makes keep their class in `high`; a NaN whose payload is all ones above bit 15
shows as -0.0 there, and is whole again when joined.
"""

from __future__ import annotations

import torch
from torch import Tensor

_C1, _C2, _GOLDEN = 0x85EBCA6B - (1 << 32), 0xC2B2AE35 - (1 << 32), 0x9E3779B1 - (1 << 32)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers whose halves these are.

    Args:
        high: bfloat16, any shape, contiguous.
        low: int16, the same shape.

    Returns:
        float32, a new tensor.
    """
    bits = high.view(torch.int16).to(torch.int32)
    bits <<= 16
    bits += low
    return bits.view(torch.float32)


def split(whole: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 nearest to each fp32 number (ties away from zero), and the int16 remainder of the bits.

    Example:
        >>> whole = torch.tensor([1.0, 1.00390625, -3.14159, 1e-41])  # the second is a tie
        >>> high, low = split(whole)
        >>> high.tolist()[:3], torch.equal(join(high, low), whole)
        ([1.0, 1.0078125, -3.140625], True)
    """
    bits = whole.view(torch.int32)
    return rounded(bits), bits.to(torch.int16)


def rounded(bits: Tensor) -> Tensor:
    """The bfloat16 nearest to fp32 numbers given by their int32 bits, ties away from zero."""
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def dice(start: int, count: int, key: int, device: torch.device) -> Tensor:
    """Numbers in [0, 65535], as int32, for `count` entries from position `start` on.

    Each depends on the position and the key alone (a multiplicative hash, then murmur3's 32-bit finalizer), so that
    neither chunks, shards nor the order of updates change what is drawn, and no generator has a state to keep.

    Args:
        start: position of the first entry in its tensor.
        count: entries.
        key: 32 bits that differ from tensor to tensor and step to step.
        device: where.
    """
    x = torch.arange(start, start + count, dtype=torch.int64, device=device).to(torch.int32)
    x = x.mul_(_GOLDEN).bitwise_xor_(key - (1 << 32) if key >= 1 << 31 else key)
    for shift, factor in ((16, _C1), (13, _C2)):
        x ^= (x >> shift) & ((1 << (32 - shift)) - 1)  # `>>` copies the sign: mask it for a logical shift
        x *= factor
    return (x ^ ((x >> 16) & 0xFFFF)) & 0xFFFF


def rounded_by_dice(bits: Tensor, throw: Tensor) -> Tensor:
    """fp32 numbers as one of their two bfloat16 neighbours: up (in magnitude) with the probability of the remainder.

    Unbiased: the expected value is the number itself. One that is a bfloat16 stays what it is.

    Args:
        bits: int32, the bits of fp32 numbers.
        throw: int32 in [0, 65535].
    """
    return ((bits + throw) >> 16).to(torch.int16).view(torch.bfloat16)
