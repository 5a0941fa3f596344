"""Arithmetic on the bits of floats: an fp32 number in two halves, and rounding with dice.

An fp32 number's upper 16 bits are a bf16 number. Rounded to nearest (exact ties away from zero), the fp32 bits u are

    u = (high << 16) + low,    high = (u + 0x8000) >> 16,    low in [-0x8000, 0x7FFF],

so the bf16 weight that the model computes with, and a signed 16-bit remainder, hold the fp32 master exactly. IEEE's
rule for ties (to even) would need a 17th bit: u = (high << 16) +- 0x8000 would both have the same even `high`.
Infinities and the NaNs that a CPU's arithmetic makes keep their class in `high`. NVIDIA's makes the NaN 0x7FFFFFFF,
which rounding up would turn into -0.0: on a GPU NaNs become 0x7FC00000 first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlvr_lightning.heap import scratch

_C1, _C2, _GOLDEN = 0x85EBCA6B - (1 << 32), 0xC2B2AE35 - (1 << 32), 0x9E3779B1 - (1 << 32)


def join(high: Tensor, low: Tensor, out: Tensor | None = None) -> Tensor:
    """The bits of the fp32 numbers whose halves these are.

    Args:
        high: bfloat16, any shape, contiguous.
        low: int16, the same shape.
        out: int32, the same shape, to write to.

    Returns:
        int32; `.view(torch.float32)` are the numbers.
    """
    bits = torch.empty(high.shape, dtype=torch.int32, device=high.device) if out is None else out
    bits.copy_(high.view(torch.int16))
    bits <<= 16
    bits += low
    return bits


def split(whole: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 nearest to each fp32 number (ties away from zero), and the int16 remainder of the bits.

    Example:
        >>> whole = torch.tensor([1.0, 1.00390625, -3.14159, 1e-41])  # the second is a tie
        >>> high, low = split(whole)
        >>> high.tolist()[:3], torch.equal(join(high, low).view(torch.float32), whole)
        ([1.0, 1.0078125, -3.140625], True)
    """
    bits = whole.view(torch.int32)
    high = torch.empty(whole.shape, dtype=torch.bfloat16, device=whole.device)
    round_into(high, bits.clone())
    return high, bits.to(torch.int16)


def round_into(high: Tensor, bits: Tensor) -> None:
    """Write the bfloat16 nearest to each fp32 number, ties away from zero.

    Args:
        high: bfloat16, written to.
        bits: int32, the bits of the numbers; overwritten.
    """
    _plain_nans(bits)
    high.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))


def _plain_nans(bits: Tensor) -> None:
    """Give every NaN the payload that survives rounding."""
    if bits.is_cuda:
        bits.masked_fill_(bits.view(torch.float32).isnan(), 0x7FC00000)


def dice(start: int, count: int, key: int, device: torch.device) -> Tensor:
    """Numbers in [0, 65535], as int32, for `count` entries from position `start` on; on a CPU until the next call.

    Each depends on the position and the key alone (a multiplicative hash, then murmur3's 32-bit finalizer), so that
    neither chunks nor the order of updates change what is drawn, and no generator has a state to keep.

    Args:
        start: position of the first entry in its tensor.
        count: entries.
        key: 32 bits that differ from tensor to tensor and step to step.
        device: where.
    """
    signed = (start + (1 << 31)) % (1 << 32) - (1 << 31)  # positions wrap around, as 32-bit numbers do
    x, y = (scratch(use, count, torch.int32) if device.type == "cpu" else _int32(count, device) for use in "xy")
    torch.arange(count, out=x)
    x.add_(signed).mul_(_GOLDEN).bitwise_xor_(key - (1 << 32) if key >= 1 << 31 else key)
    for shift, factor in ((16, _C1), (13, _C2), (16, 1)):
        torch.bitwise_right_shift(x, shift, out=y)
        y &= (1 << (32 - shift)) - 1  # the shift copied the sign
        x.bitwise_xor_(y).mul_(factor)
    return x.bitwise_and_(0xFFFF)


def _int32(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.int32, device=device)


def round_by_dice_into(high: Tensor, bits: Tensor, throw: Tensor) -> None:
    """Write one of the two bfloat16 neighbours of each number: up (in magnitude) with the remainder's probability.

    Unbiased: the expected value is the number itself. One that is a bfloat16 stays what it is.

    Args:
        high: bfloat16, written to.
        bits: int32, the bits of fp32 numbers; overwritten.
        throw: int32 in [0, 65535].
    """
    _plain_nans(bits)
    high.view(torch.int16).copy_(bits.add_(throw).bitwise_right_shift_(16))
