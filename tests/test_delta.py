from __future__ import annotations

import numpy as np
import pytest
import torch
from delta_strategies import chain, densities, dtypes, ints, random_bits, seeds, shapes
from hypothesis import given, settings
from torch import Tensor, nn

from rlvr_lightning.delta import SparseDelta, TensorDelta, digest_state
from rlvr_lightning.delta import tensor as delta_tensor

tensors = given(seed=seeds, shape=shapes, dtype=dtypes, density=densities)
quick = settings(max_examples=60, deadline=None)


def naive(old: Tensor, new: Tensor) -> dict[int, int]:
    """Position: new bits, of entries whose bits differ."""
    return {i: b for i, (a, b) in enumerate(zip(ints(old), ints(new), strict=True)) if a != b}


def entries(delta: TensorDelta) -> dict[int, int]:
    positions = delta.indices.tolist()
    assert positions == sorted(set(positions))
    return dict(zip(positions, ints(delta.values), strict=True))


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and ints(a) == ints(b)


@quick
@tensors
def test_between_finds_what_a_loop_finds(seed: int, shape: tuple, dtype: torch.dtype, density: float) -> None:
    old, new = chain(seed, shape, dtype, density, 2)
    delta = TensorDelta.between(old, new)
    assert entries(delta) == naive(old, new)
    assert (delta.numel, delta.values.dtype, delta.indices.dtype) == (old.numel(), dtype, torch.int32)
    assert delta.nbytes == len(naive(old, new)) * (4 + old.element_size())


@quick
@tensors
def test_apply_swap_and_invert(seed: int, shape: tuple, dtype: torch.dtype, density: float) -> None:
    old, new = chain(seed, shape, dtype, density, 2)
    delta, state = TensorDelta.between(old, new), old.clone()
    back = delta.invert(old)
    delta.apply_(state)
    assert same(state, new)
    back.apply_(state)
    assert same(state, old)
    held = entries(delta)
    delta.swap_(state)
    assert same(state, new) and entries(delta) == entries(back)
    delta.swap_(state)
    assert same(state, old) and entries(delta) == held


@quick
@tensors
def test_deltas_compose_in_any_grouping(seed: int, shape: tuple, dtype: torch.dtype, density: float) -> None:
    a, b, c, d = chain(seed, shape, dtype, density, 4)
    ab, bc, cd = TensorDelta.between(a, b), TensorDelta.between(b, c), TensorDelta.between(c, d)
    left, right = ab.then(bc).then(cd), ab.then(bc.then(cd))
    assert entries(left) == entries(right) == {**naive(a, b), **naive(b, c), **naive(c, d)}
    state = a.clone()
    left.apply_(state)
    assert same(state, d)
    assert entries(left.without_returned(a)) == naive(a, d)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, dtype=dtypes, density=densities)
def test_strided_tensors(seed: int, dtype: torch.dtype, density: float) -> None:
    old, new = chain(seed, (5, 7), dtype, density, 2)
    delta, transposed = TensorDelta.between(old, new), old.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert entries(TensorDelta.between(transposed, new)) == naive(old, new)
    assert entries(delta.invert(transposed)) == entries(delta.invert(old))
    delta.swap_(transposed)
    delta.swap_(transposed)
    assert same(transposed, old)
    delta.apply_(transposed)
    assert same(transposed, new)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("share", [0.0, 1e-4, 1e-2, 0.3, 1.0])
def test_chunks_and_both_ways_to_compare(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, share: float) -> None:
    monkeypatch.setattr(delta_tensor, "CPU_CHUNK", 1 << 10)
    monkeypatch.setattr(delta_tensor, "DEVICE_CHUNK", 1001)
    generator = np.random.default_rng(3)
    old = random_bits((20_011,), dtype, generator)
    new, mask = old.clone(), torch.from_numpy(generator.random(20_011) < share)
    mask[4096:9000] = False
    raw = delta_tensor.bits(new)
    raw[mask] ^= 1
    expected = mask.nonzero().squeeze(1)
    assert torch.equal(TensorDelta.between(old, new).indices.long(), expected)
    assert torch.equal(delta_tensor._positions(delta_tensor.bits(old), raw).long(), expected)
    assert torch.equal(TensorDelta.between(old[1:], new[1:]).indices.long() + 1, expected[expected > 0])  # unaligned


def test_writes_into_parameters_without_autograd() -> None:
    weight = nn.Parameter(torch.zeros(3, 5))
    TensorDelta.between(weight, torch.ones(3, 5)).apply_(weight)
    assert weight.requires_grad and weight.is_leaf and weight.detach().eq(1).all()


def test_refuses_what_does_not_fit() -> None:
    delta = TensorDelta.between(torch.zeros(6), torch.ones(6))
    with pytest.raises(ValueError, match=r"expanded tensor .float32 \[6\]"):
        delta.apply_(torch.zeros(1).expand(6))
    with pytest.raises(ValueError, match=r"of 6 entries of torch.float32, given float64"):
        delta.apply_(torch.zeros(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="cannot follow a delta of 6 entries"):
        delta.then(TensorDelta.between(torch.zeros(7), torch.ones(7)))
    with pytest.raises(ValueError, match=r"cannot compare float32 \[6\] on cpu with float32 \[2, 3\]"):
        TensorDelta.between(torch.zeros(6), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="complex64 are not supported"):
        TensorDelta.between(torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"indices must be torch.int32"):
        TensorDelta(torch.zeros(1, dtype=torch.int64), torch.zeros(1), 3)


def states(seed: int = 0, length: int = 2, density: float = 0.2) -> list[dict[str, Tensor]]:
    shapes = {"embed": ((5, 3), torch.bfloat16), "norm": ((3,), torch.float32), "empty": ((0, 3), torch.float16)}
    chains = {n: chain(seed + i, s, t, density, length) for i, (n, (s, t)) in enumerate(shapes.items())}
    found = [{name: chains[name][step] for name in shapes} for step in range(length)]
    return [{**state, "head": state["embed"]} for state in found]


def copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy with the same ties."""
    made = {id(tensor): tensor.clone() for tensor in state.values()}
    return {name: made[id(tensor)] for name, tensor in state.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, density=densities)
def test_states(seed: int, density: float) -> None:
    a, b, c = states(seed, 3, density)
    ab, bc = SparseDelta.capture(a, b, digests=True), SparseDelta.capture(b, c, digests=True)
    assert ab.aliases == {"head": "embed"} and list(ab) == ["embed", "norm", "empty"]
    assert ab.counts() == {name: len(naive(a[name], b[name])) for name in ab}
    assert ab.density == sum(ab.counts().values()) / 18
    assert ab.nbytes == ab.counts()["embed"] * 6 + ab.counts()["norm"] * 8
    state = copies(a)
    ab.apply_(state, check_digest=True)
    assert equal(state, b)
    ab.invert(a).apply_(state, check_digest=True)
    assert equal(state, a)
    ac = ab.then(bc)
    ac.apply_(state, check_digest=True)
    assert equal(state, c) and ac.result_digest == digest_state(c)
    direct = SparseDelta.capture(a, c)
    assert {n: entries(d) for n, d in ac.without_returned(a).items()} == {n: entries(d) for n, d in direct.items()}
    ac.invert(a).apply_(state)
    ac.swap_(state)
    assert equal(state, c) and ac.base_digest == digest_state(c)
    ac.swap_(state)
    assert equal(state, a) and ac.base_digest == digest_state(a)


def test_ties_in_one_state_only() -> None:
    a, b = states(1)
    untied = {name: tensor.clone() for name, tensor in a.items()}
    absent = {name: tensor for name, tensor in a.items() if name != "head"}
    assert SparseDelta.capture(untied, b).aliases == {"head": "embed"}
    delta = SparseDelta.capture(absent, b)
    assert delta.aliases == {"head": "embed"}
    for base in (untied, absent, copies(a)):  # both names are written, whether or not they share memory
        delta.apply_(base)
        assert all(same(base[name], b[name]) for name in base)
    reverse = SparseDelta.capture({n: a[n] for n in ("head", "norm", "empty")}, b)
    assert reverse.aliases == {"embed": "head"}
    assert delta.then(SparseDelta.capture({n: b[n] for n in reversed(b)}, a)).aliases == {"head": "embed"}
    parted = {**a, "head": a["head"] + 1}
    delta = SparseDelta.capture(a, parted)
    assert not delta.aliases
    with pytest.raises(ValueError, match="'head' and 'embed' share memory"):
        delta.apply_(a)
    delta = delta.then(SparseDelta.capture(parted, b))
    assert set(delta) == {"embed", "norm", "empty", "head"}
    state = {name: tensor.clone() for name, tensor in a.items()}
    delta.apply_(state)
    assert equal(state, b)


def spoil(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    if how == "value":
        state["norm"][1] = 7.0
    elif how == "alias":
        state["head"] = state["head"] + 1
    elif how == "missing":
        del state["norm"]
    elif how == "extra":
        state["more"] = torch.zeros(2)
    elif how == "shape":
        state["norm"] = state["norm"].reshape(3, 1)
    elif how == "dtype":
        state["norm"] = state["norm"].double()
    elif how == "device":
        state["norm"] = state["norm"].to("meta")
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("value", "it starts from [0-9a-f]{12}, not from the given [0-9a-f]{12}"),
        ("alias", "'head' and 'embed' are one tensor in its base, but differ"),
        ("missing", "no tensor 'norm'"),
        ("extra", "no tensor 'more'"),
        ("shape", r"'norm' has shape \[3, 1\], not \[3\]"),
        ("dtype", r"'norm' is float64 \[3\] on cpu, not torch.float32"),
        ("device", r"'norm' is float32 \[3\] on meta, the delta on cpu"),
    ],
)
def test_a_wrong_base_is_left_untouched(how: str, message: str) -> None:
    a, b = states(2, density=1.0)
    delta, state = SparseDelta.capture(a, b, digests=True), spoil(copies(a), how)
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(ValueError, match=message):
        delta.apply_(state, check_digest=True)
    if how != "device":
        assert equal(state, before)


@pytest.mark.parametrize("how", ["missing", "extra", "shape", "dtype", "device"])
def test_capture_refuses_other_models(how: str) -> None:
    a, b = states(3)
    with pytest.raises(ValueError, match="'more'" if how == "extra" else "'norm'"):
        SparseDelta.capture(a, spoil(b, how))


def test_composing_needs_the_state_in_between() -> None:
    a, b, c = states(4, 3, 0.5)
    ab, bc = SparseDelta.capture(a, b, digests=True), SparseDelta.capture(b, c, digests=True)
    with pytest.raises(ValueError, match="compose deltas in the order they were made"):
        bc.then(ab)
    with pytest.raises(ValueError, match="'norm' is in only one of the two"):
        ab.then(SparseDelta.capture({n: b[n] for n in ("embed", "empty", "head")}, {n: c[n] for n in c if n != "norm"}))
    with pytest.raises(ValueError, match="does not know its base's digest"):
        SparseDelta.capture(a, b).apply_(a, check_digest=True)


def test_digests_of_states() -> None:
    a, b = states(5)
    untied = {name: tensor.clone() for name, tensor in a.items()}
    assert digest_state(a) == digest_state({n: a[n] for n in ("norm", "empty", "embed")})
    assert digest_state(a) == digest_state((n, a[n]) for n in ("norm", "empty", "embed"))
    assert digest_state(a) != digest_state(untied)
    variants = [a, b, untied, spoil(copies(a), "value"), spoil(copies(a), "shape"), spoil(copies(a), "extra")]
    variants.append({**a, "empty": torch.zeros(0, 4, dtype=torch.float16)})
    assert len({digest_state(state) for state in variants}) == len(variants)
    odd = torch.arange(6.0).reshape(2, 3).t()
    assert digest_state({"x": odd}) == digest_state({"x": odd.contiguous()})


def test_empty_tensors_are_not_tied() -> None:
    state = {"x": torch.zeros(0, 3), "y": torch.zeros(0, 3)}
    assert list(SparseDelta.capture(state, state)) == ["x", "y"]


def test_inputs_are_not_written_to() -> None:
    a, b = states(6, density=0.5)
    held_a, held_b = copies(a), copies(b)
    delta = SparseDelta.capture(a, b, digests=True)
    back = delta.invert(a)
    delta.then(back).without_returned(a)
    assert equal(a, held_a) and equal(b, held_b)


def test_dtensors_by_their_local_shard(tmp_path: object) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        (a, b) = ({n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in s.items()} for s in states(7, density=0.5))
        a["head"], b["head"] = a["embed"], b["embed"]
        delta = SparseDelta.capture(a, b, digests=True)
        delta.apply_(a, check_digest=True)
        assert delta.aliases == {"head": "embed"}
        assert all(same(a[n].to_local(), b[n].to_local()) for n in a)
    finally:
        dist.destroy_process_group()
