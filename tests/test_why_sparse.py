"""WhySparse against updates worked out by hand, against whole tensors, and against itself in other modes."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from callback_module import Tiny, fit, lines, rows_of
from precision_modes import MODES, WHOLE
from test_grpo import fit as train
from test_grpo import folder, module  # noqa: F401 (a fixture)
from torch import nn

from rlvr_lightning.callbacks import WhySparse
from rlvr_lightning.callbacks.entry_sample import EntrySample
from rlvr_lightning.callbacks.update_scale import half_unit_log2, log2_histogram, octaves, quantiles, update_counts
from rlvr_lightning.callbacks.update_watch import UpdateWatch, as_record
from rlvr_lightning.optim import GradientRelease

ALL = 10**6  # more entries than there are: the sample is everything


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(("lr", "octave", "absorbed"), [(1.0, "8", 0.0), (1e-3, "-2", 1.0)])
def test_updates_worked_out_by_hand(tmp_path, manual, lr, octave, absorbed):
    """Weights are 1, half a unit is 2**-8: an update of 1 is 2**8 of them, one of 0.001 is 0.256, in [2**-2, 2**-1)."""
    fit(Tiny(manual, lr=lr), [[1, 3]], tmp_path, [WhySparse(entries=ALL)])
    (record,) = lines(tmp_path / "why_sparse.jsonl")
    assert record["sample_entries"] == 35 + 5  # the frozen three are not watched
    assert record["sample_bytes"] == 40 * 24
    update = record["kinds"]["embedding"]["update"]
    assert update["octaves"] == {octave: 10}
    assert (update["entries"], update["no_gradient"], update["no_update"]) == (35, 25, 25)
    assert update["changed_bf16"] == (10 if lr == 1.0 else 0)
    assert update["absorbed_frac"] == absorbed
    assert record["kinds"]["norm"]["update"]["absorbed_frac"] is None  # nothing moves it
    assert record["layers"]["none"]["grad_norm"] == pytest.approx(math.sqrt(10))
    (row,) = rows_of(tmp_path)
    assert float(row["update/absorbed_frac"]) == absorbed


def test_averages_worked_out_by_hand(tmp_path):
    """Row 1, then rows 1 and 2: the average of before has row 1 alone, so the cosine is 1 / sqrt(2) on 2 of 7 rows.

    v after two steps: (0.999 * 0.001 + 0.001) / (1 - 0.999**2) = 1 in row 1, and 0.001 / 0.001999 in row 2.
    """
    fit(Tiny(lr=0.1), [[1], [1, 2]], tmp_path, [WhySparse(1, ALL)])
    first, second = lines(tmp_path / "why_sparse.jsonl")
    assert (first["step"], first["observed"], second["observed"]) == (1, 1, 2)
    assert first["kinds"]["embedding"]["momentum_cosine"] is None
    assert second["kinds"]["embedding"]["momentum_cosine"] == pytest.approx(math.sqrt(0.5))
    root = [1.0] * 5 + [math.sqrt(0.001 / 0.001999)] * 5 + [0.0] * 25
    mean = sum(root) / 35
    expected = math.sqrt(sum((x - mean) ** 2 for x in root) / 35)
    found = second["kinds"]["embedding"]["sqrt_v"]
    assert (found["mean"], found["std"], found["zeros"]) == (pytest.approx(mean), pytest.approx(expected), 25)
    assert found["quantiles"]["0.99"] == pytest.approx(1.0, rel=0.09)


def test_every_n_counts_optimizer_steps_and_averages_see_them_all(tmp_path):
    fit(Tiny(manual=True, steps=3), [[1]] * 3, tmp_path, [WhySparse(4, ALL)])
    records = lines(tmp_path / "why_sparse.jsonl")
    assert [(r["step"], r["observed"]) for r in records] == [(1, 1), (5, 5), (9, 9)]
    assert records[-1]["all"]["momentum_cosine"] == pytest.approx(1.0)


def test_adamw_s_own_state_is_what_is_kept_beside_it(folder, tmp_path):  # noqa: F811
    adamw = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
    train(module(folder, optimizer=adamw, max_grad_norm=0.01), tmp_path, callbacks=[WhySparse(1, ALL)])
    records = lines(tmp_path / "why_sparse.jsonl")
    for record in records:  # clipped gradients went into both
        for kind in record["kinds"].values():
            assert kind["sqrt_v"]["std"] == pytest.approx(kind["sqrt_v_own"]["std"], rel=1e-4)
    assert records[0]["all"]["grad_norm"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("release", ["two_pass", "delayed"])
def test_released_gradients_are_seen_as_kept_ones(folder, tmp_path, release):  # noqa: F811
    found = []
    for name, how in (("kept", None), ("released", GradientRelease(clip=release))):
        model = module(folder, dtype="bfloat16", optimizer=MODES["split"], gradient_release=how, batching=WHOLE)
        train(model, tmp_path / name, 1 if release == "delayed" else 3, callbacks=[WhySparse(1, ALL)])
        found.append(lines(tmp_path / name / "why_sparse.jsonl"))
    assert found[0] == found[1]


def test_a_split_master_is_watched_as_a_whole_one_and_bf16_alone_by_its_rule(folder, tmp_path):  # noqa: F811
    found = {}
    for mode in MODES:
        model = module(folder, dtype="bfloat16", optimizer=MODES[mode], batching=WHOLE)
        train(model, tmp_path / mode, 1, callbacks=[WhySparse(1, ALL)])
        (found[mode],) = lines(tmp_path / mode / "why_sparse.jsonl")
    assert found["split"] == found["fp32"]
    master, alone = (found[mode]["all"]["update"] for mode in ("split", "nearest"))
    assert alone["absorbed_frac"] == pytest.approx(master["absorbed_frac"], abs=0.01)  # fp32 rounds lr * gradient
    assert 0 < alone["absorbed_frac"] < 1
    assert found["stochastic"]["all"]["update"]["over_half_unit"] == alone["over_half_unit"]


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), [0.1 * 2, 0.1 * (1.8 + 4)]),
        (partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0, eps=0.0), [0.1, None]),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.5, nesterov=True), [0.1 * (2 + 1), 0.1 * (4 + 2.5)]),
        (partial(torch.optim.RMSprop, lr=0.1, alpha=0.75, eps=0.0), [0.1 * 2, None]),
        (
            partial(torch.optim.RMSprop, lr=0.1, alpha=0.75, eps=0.0, momentum=0.5),
            [0.1 * 2, 0.1 * (1 + 4 / 19**0.5 * 2)],
        ),
    ],
)
def test_what_a_rule_wanted_of_16_bit_weights(make, wanted):
    """Gradients 2, then 4, of weights that are too large to move: what was wanted is known from the state alone."""
    weight = nn.Parameter(torch.full((3, 5), 1e6, dtype=torch.bfloat16))
    optimizer = make([weight])
    watch = UpdateWatch(optimizer, {id(weight): "mlp.up_proj.weight"}, ALL)
    for grad, step in zip((2.0, 4.0), wanted, strict=True):
        weight.grad = torch.full_like(weight, grad)
        watch.before_step()
        optimizer.step()
        watch._take(0, weight.grad)
        if step is not None:
            assert watch._intended(0).abs().tolist() == pytest.approx([step] * 15, rel=1e-2)
        watch.after_step()
    assert watch.sums()[0, 3] == 15  # below half a unit
    assert torch.equal(weight, torch.full_like(weight, 1e6))


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.Adagrad,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        partial(torch.optim.AdamW, amsgrad=True),
        partial(torch.optim.RMSprop, centered=True),
    ],
)
def test_what_other_rules_wanted_is_not_known_and_counted(make):
    weights = [nn.Parameter(torch.full((5,), 1e6, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    watch = UpdateWatch(make(weights, lr=0.1), {}, ALL)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    watch.before_step()
    watch.optimizer.step()
    watch.after_step()
    update = as_record(watch.kinds, watch.layers, watch.sums())["all"]["update"]
    assert (update["entries"], update["unknown_update"], sum(update["octaves"].values())) == (10, 5, 5)
    assert update["absorbed_frac"] == 1.0, "of the weights that are known"


def test_nothing_known_is_no_share():
    weight = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    watch = UpdateWatch(torch.optim.Adagrad([weight]), {}, ALL)
    watch.before_step()
    watch.optimizer.step()
    watch.after_step()
    assert as_record(watch.kinds, watch.layers, watch.sums())["all"]["update"]["absorbed_frac"] is None


def test_a_step_without_a_finite_gradient_is_counted_and_left_out():
    weight = nn.Parameter(torch.ones(7))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    watch = UpdateWatch(optimizer, {}, ALL)
    for grad in (None, torch.full((7,), math.nan), torch.ones(7)):
        weight.grad = grad
        watch.before_step()
        watch.after_step()
    assert (watch.skipped, watch.observed) == (2, 1)
    assert bool(watch.momentum.isfinite().all())


def test_half_a_unit_is_where_rounding_to_nearest_turns():
    """For weights of every exponent and mantissa: just under it nothing changes, just over it the weight does."""
    weight = torch.randn(1001).mul(torch.logspace(-20, 20, 1001)).bfloat16().double().abs()
    half = 2.0 ** half_unit_log2(weight.float()).double()
    for factor, changes in ((0.999, False), (1.001, True)):
        moved = (weight + factor * half).bfloat16().double() != weight  # away from 0: below a power of two is closer
        assert bool((moved == changes).all())


def test_quantiles_and_counts_against_naive_ones():
    values = torch.randn(5000).exp()
    found = quantiles(log2_histogram(values.log2()))
    for q, value in found.items():
        assert value == pytest.approx(float(values.quantile(float(q))), rel=0.1)
    assert sum(octaves(log2_histogram(values.log2())).values()) == 5000
    old, update = torch.randn(999), torch.randn(999) * 1e-3
    counts = update_counts(old, old + update, update, update).tolist()
    half = [2.0 ** (math.frexp(float(w.bfloat16()))[1] - 9) for w in old]
    below = sum(abs(float(u)) < h for u, h in zip(update, half, strict=True))
    assert counts[:4] == [999, 0, 0, below]


def test_the_sample_is_seeded_spread_and_without_repetition():
    tensors = [torch.arange(3.0), torch.arange(70000.0).view(700, 100), torch.arange(500.0)]
    first, again, other = (EntrySample(tensors, 1000, seed) for seed in (0, 0, 1))
    assert [len(p) for p in first.positions] == [3, 992, 64]
    assert all(len(p.unique()) == len(p) for p in first.positions)
    assert all(torch.equal(a, b) for a, b in zip(first.positions, again.positions, strict=True))
    assert not torch.equal(first.positions[1], other.positions[1])
    assert torch.equal(first.of(1, tensors[1]), first.positions[1].float())


def test_hooks_are_gone_after_the_run_and_bad_settings_are_one_line(folder, tmp_path):  # noqa: F811
    settings = {"dtype": "bfloat16", "optimizer": MODES["split"], "batching": WHOLE}
    model = module(folder, **settings, gradient_release=GradientRelease())
    train(model, tmp_path, 1, callbacks=[WhySparse()])
    assert {len(p._post_accumulate_grad_hooks) for p in model.policy.parameters()} == {1}  # the release's own
    with pytest.raises(ValueError, match=r"WhySparse\.every_n_steps must be at least 1, got 0"):
        WhySparse(every_n_steps=0)
    with pytest.raises(ValueError, match=r"WhySparse\.entries must be at least 1, got -3"):
        WhySparse(entries=-3)
