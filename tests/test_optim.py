"""SGD's ways of storing weights: what each claims to equal, counted and compared bit for bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from rlvr_lightning.callbacks import optimizer_state_bytes
from rlvr_lightning.optim import SGD
from rlvr_lightning.optim import update as update_room
from rlvr_lightning.optim.bits import dice, join, round_by_dice_into, split


def all_kinds_of_floats(count: int) -> torch.Tensor:
    """Random bits (so: all exponents, both signs, NaN payloads), then edges: zeros, subnormals, ties, inf."""
    bits = torch.randint(-(1 << 31), 1 << 31, (count,), dtype=torch.int64).to(torch.int32)
    edges = [0, -(1 << 31), 1, 0x8000, 0x18000, 0x7FFF, 0x007FFFFF, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, -0x800000]
    return torch.cat([bits, torch.tensor(edges, dtype=torch.int32)]).view(torch.float32)


def test_halves_hold_every_float() -> None:
    whole = all_kinds_of_floats(100_003)
    high, low = split(whole)
    assert torch.equal(join(high, low), whole.view(torch.int32))


def test_high_half_is_the_nearest_bf16_with_ties_away_from_zero() -> None:
    whole = all_kinds_of_floats(100_003)
    whole = whole[~whole.isnan()]
    ties = (whole.view(torch.int32) & 0xFFFF) == 0x8000
    high, ieee = split(whole)[0], whole.bfloat16()
    assert torch.equal(high[~ties].view(torch.int16), ieee[~ties].view(torch.int16))
    assert ties.sum() >= 2
    assert torch.equal(high[ties].view(torch.int16), ((whole[ties].view(torch.int32) >> 16) + 1).to(torch.int16))


def test_canonical_nans_and_infinities_show_in_the_high_half() -> None:
    high, _ = split(torch.tensor([math.nan, -math.nan, math.inf, -math.inf]))
    assert high.isnan().tolist() == [True, True, False, False]
    assert high[2:].tolist() == [math.inf, -math.inf]


def trajectory(steps: int, shapes=((7, 5), (3,), (1,))):
    """Weights that cross zero, sit in subnormals, and gradients of all sizes; the same every time."""
    generator = torch.Generator().manual_seed(3)
    scales = [1.0, 1e-39, 3e-3]
    start = [(torch.randn(s, generator=generator) * k).bfloat16() for s, k in zip(shapes, scales, strict=True)]

    def gradients(step: int):
        generator = torch.Generator().manual_seed(step)
        size = 10.0 ** ((step % 7) - 5)
        return [
            (torch.randn(s, generator=generator) * size * k).bfloat16() for s, k in zip(shapes, scales, strict=True)
        ]

    return start, [gradients(k) for k in range(steps)]


@pytest.mark.parametrize("chunk", [4, 1 << 16])
def test_split_follows_the_fp32_master_bit_for_bit_over_1000_steps(chunk: int, monkeypatch) -> None:
    monkeypatch.setitem(update_room.CHUNK_ENTRIES, "cpu", chunk)
    start, gradients = trajectory(1000)
    halves = [torch.nn.Parameter(w.clone()) for w in start]
    beside = [torch.nn.Parameter(w.clone()) for w in start]
    plain = [torch.nn.Parameter(w.float()) for w in start]  # torch's own SGD on fp32 weights
    ours, anchor, torchs = SGD(halves, lr=0.3), SGD(beside, lr=0.3, master="fp32"), torch.optim.SGD(plain, lr=0.3)
    crossed, subnormal = (torch.zeros((), dtype=torch.bool) for _ in range(2))
    for grads in gradients:
        for h, b, p, g in zip(halves, beside, plain, grads, strict=True):
            h.grad, b.grad, p.grad = g, g, g.float()
        before = plain[0].detach().clone()
        for optimizer in (ours, anchor, torchs):
            optimizer.step()
        crossed |= (before.sign() != plain[0].sign()).any()
        subnormal |= ((plain[1].abs() > 0) & (plain[1].abs() < 1.17e-38)).any()
        for h, b, p in zip(halves, beside, plain, strict=True):
            whole = join(h.detach(), ours.state[h]["low"])
            assert torch.equal(whole, p.detach().view(torch.int32))
            assert torch.equal(anchor.state[b]["master"].view(torch.int32), p.detach().view(torch.int32))
            assert torch.equal(h.detach().view(torch.int16), b.detach().view(torch.int16))
    assert crossed and subnormal


@pytest.mark.parametrize(("master", "state_bytes"), [("split", 2), ("fp32", 4), ("none", 0)])
def test_bytes_a_parameter(master, state_bytes: int) -> None:
    weights = [torch.nn.Parameter(torch.ones(7, 5, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = SGD(weights, lr=0.1, master=master)
    for w in weights:
        w.grad = torch.ones_like(w)
    optimizer.step()
    assert optimizer_state_bytes(optimizer) == state_bytes * 3 * 35


def test_low_halves_on_the_host_change_nothing() -> None:
    start, gradients = trajectory(20)
    here, there = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    optimizers = SGD(here, lr=0.3), SGD(there, lr=0.3, low_on_host=True)
    for grads in gradients:
        for a, b, g in zip(here, there, grads, strict=True):
            a.grad = b.grad = g
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))
        assert optimizers[1].state[b]["low"].device.type == "cpu"


def test_fp32_weights_are_plain_sgd_without_state() -> None:
    mine, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 35).view(7, 5)) for _ in range(2))
    ours, plain = SGD([mine], lr=0.1), torch.optim.SGD([theirs], lr=0.1)
    for step in range(5):
        mine.grad = theirs.grad = torch.randn(7, 5) * 10.0**-step
        ours.step()
        plain.step()
    assert torch.equal(mine, theirs)
    assert not ours.state


def test_nearest_without_a_master_is_torchs_sgd_in_bf16() -> None:
    mine, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 35, dtype=torch.bfloat16)) for _ in range(2))
    ours, plain = SGD([mine], lr=0.1, master="none"), torch.optim.SGD([theirs], lr=0.1)
    for step in range(5):
        mine.grad = theirs.grad = (torch.randn(35) * 10.0**-step).bfloat16()
        ours.step()
        plain.step()
    assert torch.equal(mine, theirs)


def test_dice_are_uniform_and_differ_by_position_and_key() -> None:
    a = dice(0, 1 << 18, 12345, torch.device("cpu")).clone()
    assert int(a.min()) >= 0 and int(a.max()) <= 65535
    expected = len(a) / 256
    chi2 = float(((torch.bincount(a >> 8, minlength=256) - expected).square() / expected).sum())
    chi2_low = float(((torch.bincount(a & 255, minlength=256) - expected).square() / expected).sum())
    assert 160 < chi2 < 370 and 160 < chi2_low < 370  # 255 degrees of freedom: mean 255, sigma 22.6
    assert torch.equal(dice(1000, 7, 12345, a.device), a[1000:1007])
    for other in (dice(0, 1 << 18, 12346, a.device).clone(), a.roll(1), a.roll(64)):
        x, y = a.double() - 32767.5, other.double() - 32767.5
        assert abs(float((x * y).mean() / (x.std() * y.std()))) < 5 / 512  # 5 sigma


def test_dice_equal_naive_integers() -> None:
    def naive(position: int, key: int) -> int:
        x = (position * 0x9E3779B1 % 2**32) ^ key
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return (x ^ (x >> 16)) & 0xFFFF

    for start, key in ((0, 7), ((1 << 31) - 3, 2**32 - 1), ((1 << 32) - 2, 1 << 31), (5 << 32, 12345)):
        got = dice(start, 7, key, torch.device("cpu")).tolist()
        assert got == [naive((start + k) % 2**32, key) for k in range(7)]


def rounded_by_dice(bits: torch.Tensor, throw: torch.Tensor) -> torch.Tensor:
    high = torch.empty(len(bits), dtype=torch.bfloat16)
    round_by_dice_into(high, bits.clone(), throw)
    return high


def test_stochastic_rounding_is_unbiased() -> None:
    """Half a million draws of x with its remainder at 1/8 of the way up: the mean is x to within 5 standard errors."""
    for x in (1.0 + 2**-7 / 8, -1.0 - 2**-7 / 8, 3e-39):
        bits = torch.full((1 << 19,), x, dtype=torch.float32).view(torch.int32)
        draws = rounded_by_dice(bits, dice(0, len(bits), 99, bits.device)).double()
        ulp = float(draws.max() - draws.min())
        exact = float(bits.view(torch.float32)[0].double())
        assert abs(float(draws.mean()) - exact) < 5 * ulp * math.sqrt(1 / 8) / math.sqrt(len(draws))
        assert len(draws.unique()) == 2
    exact = torch.tensor([1.5, -0.0, math.inf, 0.0]).view(torch.int32)
    assert rounded_by_dice(exact, torch.full((4,), 65535, dtype=torch.int32)).tolist() == [1.5, -0.0, math.inf, 0.0]


def test_small_updates_are_lost_by_nearest_and_kept_on_average_by_dice() -> None:
    moved = {}
    for rounding in ("nearest", "stochastic"):
        weight = torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
        sgd = SGD([weight], lr=1.0, master="none", rounding=rounding, seed=5)
        for _ in range(40):
            weight.grad = torch.full_like(weight, 2**-12)  # 1/32 of the distance to the next bf16 below 1, 2**-8 / 2
            sgd.step()
        moved[rounding] = 1 - float(weight.detach().double().mean())
    assert moved["nearest"] == 0.0
    assert moved["stochastic"] == pytest.approx(40 * 2**-12, rel=0.05)


def test_stochastic_is_seeded_and_independent_of_chunks(monkeypatch) -> None:
    def run(seed: int, chunk: int) -> torch.Tensor:
        monkeypatch.setitem(update_room.CHUNK_ENTRIES, "cpu", chunk)
        weights = [torch.nn.Parameter(torch.ones(50, dtype=torch.bfloat16)) for _ in range(2)]
        sgd = SGD(weights, lr=1.0, master="none", rounding="stochastic", seed=seed)
        for _ in range(3):
            for w in weights:
                w.grad = torch.full_like(w, 2**-10)
            sgd.step()
        return torch.stack([w.detach() for w in weights])

    assert torch.equal(run(0, 7), run(0, 1 << 16))
    assert not torch.equal(run(0, 7), run(1, 7))
    first, second = run(0, 7)
    assert not torch.equal(first, second)  # each parameter has dice of its own


@pytest.mark.parametrize("settings", [{}, {"master": "fp32"}, {"master": "none", "rounding": "stochastic"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("share", [0.5, 0.05])
@pytest.mark.parametrize("chunk", [3, 1 << 16])
def test_counts_and_deltas_are_those_of_comparing(settings, dtype, chunk: int, share: float, monkeypatch) -> None:
    monkeypatch.setitem(update_room.CHUNK_ENTRIES, "cpu", chunk)
    weights = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in ((7, 5), (11,), (0,))]
    sgd = SGD(weights, lr=0.01, **settings)
    undone = {}
    sgd.listen(lambda p, undo: undone.setdefault(p, undo))
    for _ in range(3):
        undone.clear()
        before = [w.detach().clone() for w in weights]
        for w in weights[:2]:
            w.grad = torch.randn_like(w) * (torch.rand(w.shape) < share)
        sgd.step()
        for w, old in zip(weights[:2], before, strict=False):
            differ = int((w.detach() != old).sum())
            assert int(sgd.changed_entries[w]) == differ
            back = w.detach().clone()
            if isinstance(undone[w], torch.Tensor):
                assert differ > update_room.DENSE * w.numel()
                back = undone[w].view(w.shape)
            else:
                assert len(undone[w]) == differ <= update_room.DENSE * w.numel()
                undone[w].apply_(back)
            assert torch.equal(back, old)
    assert set(sgd.changed_entries) == set(weights[:2])  # without a gradient nothing happens


def test_state_comes_back_in_its_own_dtype_and_continues_bit_for_bit() -> None:
    for settings in ({}, {"master": "fp32"}, {"master": "none", "rounding": "stochastic"}):
        start, gradients = trajectory(6)
        whole, halted = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
        run, first = SGD(whole, lr=0.3, **settings), SGD(halted, lr=0.3, **settings)
        resumed = first
        for step, grads in enumerate(gradients):
            if step == 3:
                saved = copy.deepcopy(first.state_dict())
                resumed = SGD(halted, lr=99.0, **settings)
                resumed.load_state_dict(saved)
            for w, h, g in zip(whole, halted, grads, strict=True):
                w.grad = h.grad = g
            run.step()
            resumed.step()
        for w, h in zip(whole, halted, strict=True):
            assert torch.equal(w.view(torch.int16), h.view(torch.int16))
            for key, value in run.state[w].items():
                assert value.dtype == resumed.state[h][key].dtype
                assert torch.equal(value, resumed.state[h][key])


def test_listeners_survive_loading_and_copies_work_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    sgd, heard = SGD([weight], lr=1.0), []
    sgd.listen(lambda p, undo: heard.append("listener"))
    sgd.register_begin_hook(lambda: heard.append("begin"))
    weight.grad = torch.ones_like(weight)
    sgd.step()
    sgd.load_state_dict(sgd.state_dict())
    twin = copy.deepcopy(sgd)
    sgd.step()
    assert heard == ["begin", "listener"] * 2
    (other,) = twin.param_groups[0]["params"]
    other.grad = torch.ones_like(other)
    twin.step()
    assert heard == ["begin", "listener"] * 2
    assert torch.equal(other, weight)


def test_a_schedule_changes_the_rate() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    sgd = SGD([{"params": [weight], "lr": 1.0}], lr=5.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 0.5**step)
    for _ in range(3):
        weight.grad = -torch.ones(3)
        sgd.step()
        schedule.step()
    assert weight.tolist() == [1.75] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounding": "stochastic"}, "rounding: stochastic needs master: none"),
        ({"low_on_host": True, "master": "fp32"}, "low_on_host needs master: split; master is 'fp32'"),
        ({"master": "half"}, "master must be split, fp32 or none, got 'half'"),
        ({"rounding": "up"}, "rounding must be nearest or stochastic, got 'up'"),
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
    ],
)
def test_settings_that_cannot_work(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGD([torch.nn.Parameter(torch.zeros(3))], **{"lr": 0.1, **settings})


def test_state_of_another_mode_is_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    split_sgd = SGD([weight], lr=0.1)
    split_sgd.step()
    with pytest.raises(ValueError, match="holds 'low', which master: none does not use"):
        SGD([weight], lr=0.1, master="none").load_state_dict(split_sgd.state_dict())


def test_parameters_it_cannot_step() -> None:
    with pytest.raises(ValueError, match=r"shape \(5, 7\) is not contiguous"):
        SGD([torch.nn.Parameter(torch.zeros(7, 5).t())], lr=0.1)
    table = torch.nn.Embedding(5, 3, sparse=True)
    sgd = SGD(table.parameters(), lr=0.1)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        sgd.step()
