"""The fused kernel, run by triton's interpreter on this CPU (or on a GPU), against the plain version bit for bit."""

from __future__ import annotations

import pytest
import torch

from rlvr_lightning.optim.update import Storage, update_chunk

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def fused():
    from rlvr_lightning.optim import triton_update  # `conftest` has chosen the interpreter where there is no GPU

    return triton_update.fused_chunk


def storage(mode: str, n: int, device: str) -> Storage:
    weight = (torch.randn(n) * 10.0 ** torch.randint(-4, 2, (n,))).bfloat16().to(device)
    if mode == "split":
        return Storage(weight, low=torch.randint(-(1 << 15), 1 << 15, (n,)).to(torch.int16).to(device))
    if mode == "fp32":
        return Storage(weight, master=(weight.float() * (1 + 1e-3 * torch.randn(n, device=device))))
    return Storage(weight, key=(1 << 31) + 77 if mode == "stochastic" else None)


@pytest.mark.parametrize("mode", ["split", "fp32", "nearest", "stochastic"])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [1, 1023, 2500])
def test_fused_equals_plain_bit_for_bit(fused, mode: str, grad_dtype, n: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = storage(mode, n, device)
    copy = Storage(*(x.clone() if isinstance(x, torch.Tensor) else x for x in vars(plain).values()))
    # 7 and 8 significant bits: the product is exact, so that the interpreter, which does not fuse, rounds once as well
    grad, step_size, start = (torch.randn(n) * 0.01).bfloat16().to(grad_dtype).to(device), 0.3125, 4096
    mask, old = (x.clone() for x in update_chunk(plain, grad, step_size, start))
    weight, low, master, key = copy.weight, copy.low, copy.master, copy.key
    count, where, values = fused(weight, low, master, key, grad, step_size, start, True)
    assert torch.equal(weight.view(torch.int16), plain.weight.view(torch.int16))
    if low is not None:
        assert torch.equal(low, plain.low)
    if master is not None:
        assert torch.equal(master.view(torch.int32), plain.master.view(torch.int32))
    assert int(count) == int(mask.sum())
    assert n < 100 or 0 < int(count) < n
    assert torch.equal(where, mask.nonzero()[:, 0])
    assert torch.equal(values.view(torch.int16), old[mask].view(torch.int16))


def test_counting_alone_emits_nothing(fused) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    at = storage("split", 300, device)
    grad = torch.randn(300, device=device)
    count, where, values = fused(at.weight, at.low, None, None, grad, 0.25, 0, False)
    assert int(count) > 0
    assert where is None and values is None
