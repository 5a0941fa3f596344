"""Random tensors and states for the tests of deltas."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn]
INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIAL = {  # both zeros, infinities, NaNs with payloads, least subnormals, all ones
    1: [0x00, 0x80, 0x78, 0x7F, 0xFF, 0x01],
    2: [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 0x7C00, 0x7E01, 0x0001, 0x8001],
    4: [0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x00000001, 0x80000001],
    8: [0, 1 << 63, 0x7FF << 52, 0xFFF << 52, (0x7FF << 52) + 1, (1 << 64) - 1, 1, (1 << 63) + 1],
}
SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (3, 5), (2, 3, 4), (41, 7)]
shapes = st.sampled_from(SHAPES)
dtypes = st.sampled_from(DTYPES)
densities = st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])
seeds = st.integers(0, 2**32 - 1)


def ints(tensor: Tensor) -> list[int]:
    """The bits of a tensor's entries, in row-major order."""
    return tensor.detach().contiguous().reshape(-1).view(INTS[tensor.element_size()]).tolist()


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: np.random.Generator) -> Tensor:
    """Any patterns, a third of them special; of bool 0 and 1."""
    width = torch.empty(0, dtype=dtype).element_size()
    unsigned = np.dtype(f"u{width}")
    if dtype == torch.bool:
        patterns = generator.integers(0, 2, shape, dtype=unsigned)
    else:
        patterns = generator.integers(0, np.iinfo(unsigned).max, shape, dtype=unsigned, endpoint=True)
        special = generator.choice(np.array(SPECIAL[width], dtype=unsigned), shape)
        patterns = np.where(generator.random(shape) < 1 / 3, special, patterns)
    return torch.from_numpy(np.asarray(patterns).reshape(-1).view(np.uint8)).view(dtype).reshape(shape).clone()


def changed(tensor: Tensor, density: float, generator: np.random.Generator) -> Tensor:
    """A copy in which about so many of the entries are others, some by one unit in the last place only."""
    other = random_bits(tuple(tensor.shape), tensor.dtype, generator)
    if tensor.dtype != torch.bool:
        near = tensor.view(INTS[tensor.element_size()]) + 1
        other = torch.where(coin(tensor, 0.5, generator), near, other.view(near.dtype)).view(tensor.dtype)
    mask = coin(tensor, density, generator)
    picked = torch.where(mask, other.view(INTS[tensor.element_size()]), tensor.view(INTS[tensor.element_size()]))
    return picked.view(tensor.dtype)


def coin(tensor: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    """Bool mask of a tensor's shape."""
    return torch.from_numpy(np.asarray(generator.random(tuple(tensor.shape)) < share))


def chain(seed: int, shape: tuple[int, ...], dtype: torch.dtype, density: float, length: int) -> list[Tensor]:
    """A random tensor and what became of it in some steps; now and then an entry comes back."""
    generator = np.random.default_rng(seed)
    states = [random_bits(shape, dtype, generator)]
    while len(states) < length:
        after = changed(states[-1], density, generator)
        back = coin(after, density / 3, generator)
        kind = INTS[after.element_size()]
        states.append(torch.where(back, states[0].view(kind), after.view(kind)).view(dtype))
    return states
