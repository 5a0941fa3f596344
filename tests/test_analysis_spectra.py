"""`rank`, `spectrum`, `overlap`: against full decompositions, sorting, and enumeration."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_analysis import SHAPES, record, refused, save, states
from torch import Tensor

from rlvr_lightning.__main__ import main
from rlvr_lightning.analysis import rank
from rlvr_lightning.analysis.overlap import Counts, Tally, chance_interval, hypergeometric, moments, summarise
from rlvr_lightning.analysis.rank import ranks
from rlvr_lightning.analysis.spectrum import analyse_matrix, leading, principal_angles, top_mask


def naive_ranks(matrix: Tensor) -> tuple[int, int, float]:
    """Matrix rank as torch has it, effective and stable rank from the full decomposition."""
    values = torch.linalg.svdvals(matrix.double())
    energy, k = 0.0, 0
    while energy < 0.99 * float(values.square().sum()):
        energy += float(values[k] ** 2)
        k += 1
    return int(torch.linalg.matrix_rank(matrix)), k, float(values.square().sum() / values[0] ** 2)


def with_spectrum(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64)).Q
        for n in (rows, columns)
    )
    return ((left * values.double()) @ right.T).float()


SPECTRA = {
    "one": torch.tensor([2.0]),
    "three": torch.tensor([5.0, 3.0, 1.0]),
    "flat": torch.ones(37),
    "falling": 0.8 ** torch.arange(37),
    "power law": 1 / torch.arange(1, 38),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(37, 101), (101, 37)])
def test_exact_ranks(name: str, shape: tuple[int, int]) -> None:
    matrix = with_spectrum(*shape, SPECTRA[name])
    found, (full, effective, stable) = ranks(matrix), naive_ranks(matrix)
    assert found.sketch == 0 and found.full == 37
    assert (found.matrix.low, found.matrix.high) == (full, full)
    assert (found.effective.low, found.effective.high) == (effective, effective)
    assert found.stable.low == found.stable.high == pytest.approx(stable, 1e-5)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("seed", range(3))
def test_a_sketch_bounds_what_is_true(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlvr_lightning.analysis.rank.SMALL", 16)
    monkeypatch.setattr("rlvr_lightning.analysis.rank.FIRST_SKETCH", 5)
    matrix = with_spectrum(411, 397, SPECTRA[name], seed)
    found, (full, effective, stable) = ranks(matrix, torch.Generator().manual_seed(seed)), naive_ranks(matrix)
    assert (found.sketch > 0) == (name in ("one", "three", "falling"))  # of the others it would be no use
    assert found.matrix.low <= full <= found.matrix.high
    assert found.effective.low <= effective <= found.effective.high
    assert found.effective.high - found.effective.low <= 0.05 * found.effective.high
    assert found.stable.low * (1 - 1e-5) <= stable <= found.stable.high * (1 + 1e-5)


def test_a_sketch_that_sees_little_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds hold whatever the sketch: here of 3 directions, without a second look."""
    for name, values in SPECTRA.items():
        matrix = with_spectrum(101, 53, values)
        found = rank.bounds(*rank.sketch(matrix, 3, torch.Generator().manual_seed(1)), matrix.shape, 3)
        expected = naive_ranks(matrix)
        for (low, high), true in zip((found.matrix, found.effective, found.stable), expected, strict=True):
            assert low * (1 - 1e-5) <= true <= high * (1 + 1e-5), name
    assert (found.effective.low, found.effective.high) != (expected[1], expected[1])


def test_bounds_worked_by_hand() -> None:
    """Squares 60 and 40 of which a sketch saw 50 and 30: 99 % may be had from 2 values, and not from 1."""
    found = rank.bounds(torch.tensor([50.0, 30.0]), 20.0, 100.0, torch.Size([9, 5]), 2)
    assert found.effective == (2, 5)
    assert found.stable == (100 / 70, 100 / 50)
    assert found.matrix == (2, 5)


def test_angles_shift_and_masks() -> None:
    angle = math.radians(20)
    old = torch.eye(5, 2, dtype=torch.float64)
    new = old.clone()
    new[:, 1] = torch.tensor([0, math.cos(angle), math.sin(angle), 0, 0], dtype=torch.float64)
    assert principal_angles(old, new).tolist() == pytest.approx([0, 20], abs=1e-10)
    tiny = torch.tensor([[1.0], [1e-9]], dtype=torch.float64)  # a cosine alone would say 0
    assert float(principal_angles(torch.eye(2, 1, dtype=torch.float64), tiny)) == pytest.approx(math.degrees(1e-9))
    matrix = torch.randn(7, 5)
    for side in (matrix, matrix.T):
        found = leading(side, 3)
        left, values, right = torch.linalg.svd(side.double(), full_matrices=False)
        torch.testing.assert_close(found.values, values)
        assert float(principal_angles(found.left, left[:, :3]).max()) < 1e-6
        assert float(principal_angles(found.right, right[:3].T).max()) < 1e-6
    assert analyse_matrix(matrix, 1.5 * matrix, 2, 0.3).shift == pytest.approx(0.5)
    scores = torch.randint(0, 4, (7, 5)).float()
    for count in (0, 1, 9, 35):
        ranked = sorted(range(35), key=lambda i: (-scores.view(-1)[i].item(), i))[:count]
        assert top_mask(scores, count).view(-1).nonzero().view(-1).tolist() == sorted(ranked)


@pytest.mark.parametrize("shape", [(13, 7), (7, 13), (5, 5)])
@pytest.mark.parametrize("seed", range(5))
def test_the_leading_part_is_that_of_the_singular_value_decomposition(shape: tuple[int, int], seed: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    found = leading(matrix, 3)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close(found.values, values)
    part = (left[:, :3] * values[:3]) @ right[:3]
    torch.testing.assert_close((found.left * found.values[:3]) @ found.right.T, part)


@pytest.mark.parametrize("seed", range(5))
def test_where_changes_lie(seed: int) -> None:
    """Against masks made by sorting, for a change of the least entries alone."""
    old = torch.randn(13, 7, generator=torch.Generator().manual_seed(seed))
    order = old.abs().view(-1).argsort()
    new = old.clone()
    new.view(-1)[order[:20]] *= 1.5
    found = analyse_matrix(old, new, 2, 0.3)
    left, values, right = torch.linalg.svd(old, full_matrices=False)
    principal = ((left[:, :2] * values[:2]) @ right[:2]).abs().view(-1).argsort(descending=True)[:27]
    assert (found.k, found.entries, found.changed, found.chosen, found.low) == (2, 91, 20, 27, 20)
    assert found.principal == len(set(order[:20].tolist()) & set(principal.tolist()))
    assert analyse_matrix(old, old, None, 0.3)[:4] == (1, 0.0, pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))


def enumerated(counts: list[Counts]) -> dict[int, float]:
    """The law of the summed overlap: every choice of B's entries in every tensor."""
    total = Counter({0: 1})
    for n, a, b, *_ in counts:
        one = Counter(len(set(chosen) & set(range(a))) for chosen in itertools.combinations(range(n), b))
        total = sum_of(total, one)
    everything = sum(total.values())
    return {k: total[k] / everything for k in sorted(total)}


def sum_of(first: Counter, second: Counter) -> Counter:
    found: Counter = Counter()
    for (x, p), (y, q) in itertools.product(first.items(), second.items()):
        found[x + y] += p * q
    return found


@pytest.mark.parametrize(("n", "a", "b"), [(7, 3, 4), (9, 9, 2), (5, 0, 3), (11, 8, 7), (1, 1, 1), (3, 0, 0)])
def test_the_law_of_one_tensor(n: int, a: int, b: int) -> None:
    low, law = hypergeometric(Counts(n, a, b, 0))
    expected = enumerated([Counts(n, a, b, 0)])
    assert dict(enumerate(law.tolist(), low)) == pytest.approx(expected)
    mean, variance = moments(Counts(n, a, b, 0))
    assert mean == pytest.approx(sum(k * p for k, p in expected.items()))
    assert variance == pytest.approx(sum((k - mean) ** 2 * p for k, p in expected.items()))


@pytest.mark.parametrize(
    "counts", [[(7, 3, 4), (9, 5, 2)], [(11, 5, 5)], [(5, 5, 5), (3, 0, 2)], [(9, 4, 4), (7, 1, 3), (5, 2, 3)]]
)
def test_the_interval_is_that_of_all_permutations(counts: list[tuple[int, int, int]]) -> None:
    some = [Counts(*one, both=0) for one in counts]
    low, high = chance_interval(some)
    law = enumerated(some)
    below = np.cumsum(list(law.values()))
    assert (low, high) == (list(law)[np.searchsorted(below, 0.025)], list(law)[np.searchsorted(below, 0.975)])


def test_the_interval_of_large_tensors_is_that_of_draws() -> None:
    sizes = [(600_000_000, 30_000_000, 6_000_000), (1_000_003, 10_007, 500_009), (4096, 5, 4000)]
    low, high = chance_interval([Counts(*one, both=0) for one in sizes])
    draws = np.random.default_rng(0)
    total = sum(draws.hypergeometric(a, n - a, b, 40_000) for n, a, b in sizes)
    spread = total.std()
    assert np.quantile(total, [0.025, 0.975]) == pytest.approx([low, high], abs=0.05 * spread)


def test_overlap_worked_by_hand() -> None:
    found = summarise([Counts(10, 4, 2, 2), Counts(30, 1, 6, 0)])
    assert (found["both"], found["changed_a"], found["changed_b"], found["entries"]) == (2, 5, 8, 40)
    assert (found["a_in_b"], found["b_in_a"], found["jaccard"]) == (2 / 5, 2 / 8, 2 / 11)
    assert (found["density_b"], found["expected"]) == (8 / 40, pytest.approx(4 * 2 / 10 + 6 / 30))
    assert found["a_in_b_by_chance"][1] == pytest.approx((0.8 + 0.2) / 5)
    assert found["interval"][0] == 0 and found["jaccard_by_chance"][1] == pytest.approx(1 / 12)
    nothing = summarise([Counts(10, 0, 3, 0)])
    assert nothing["a_in_b"] is None and nothing["b_in_a"] == 0 and nothing["interval"] == [0, 0]


def test_rounding_alone_makes_masks_alike() -> None:
    """Two independent random updates overlap above chance, and just as much as chance at equal exponents says."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(200_003, generator=generator) * 0.02
    a, b = (base.bfloat16().float() + 1e-5 * torch.randn(len(base), generator=generator) for _ in range(2))
    tally = Tally()
    views = [x.bfloat16().view(torch.int16).numpy() for x in (base, a, b)]
    for piece in (slice(0, 70_001), slice(70_001, None)):
        tally.add(*(view[piece] for view in views))
    found = summarise([one := tally.total()])
    masks = [view != views[0] for view in views[1:]]
    assert one[:4] == (len(base), masks[0].sum(), masks[1].sum(), (masks[0] & masks[1]).sum())
    of = base.bfloat16().double().abs().log2().floor()
    strata = [(of == e).numpy() for e in of.unique()]
    expected = sum(float(masks[0][s].sum()) * float(masks[1][s].sum()) / s.sum() for s in strata)
    assert one.expected_equal == pytest.approx(expected)
    assert found["both"] > 1.2 * found["interval"][1]
    assert found["both"] == pytest.approx(found["expected_equal"], rel=0.02)


def test_rank_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = states()
    name = "model.layers.0.mlp.up_proj.weight"
    b["model.layers.1.mlp.up_proj.weight"] = a["model.layers.1.mlp.up_proj.weight"]
    experts = "model.layers.1.mlp.experts.up_proj"
    a[experts], b[experts] = torch.zeros(2, 3, 5), torch.stack([torch.zeros(3, 5), torch.ones(3, 5)])
    paths = [save(tmp_path / "a", a), save(tmp_path / "b", b)]
    found = record(capsys, "rank", *paths)
    full, effective, stable = naive_ranks(b[name].float() - a[name].float())
    row = found["by_tensor"][name]
    assert (row["full"], row["matrix"], row["effective"]) == (3, [full] * 2, [effective] * 2)
    assert row["stable"][0] == pytest.approx(stable, 1e-5)
    assert found["by_tensor"][f"{experts}[1]"]["effective"] == [1, 1]
    matrices = {name for name in SHAPES if len(SHAPES[name]) == 2} - {"model.layers.1.mlp.up_proj.weight"}
    assert set(found["by_tensor"]) == matrices | {f"{experts}[1]"} and found["unchanged_tensors"] == 1
    assert main(["rank", *paths, "--plot", str(tmp_path / "x.png")]) == 0
    assert "5 matrices changed, 1 tensors did not" in capsys.readouterr().out
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    b[name][0, 0] = float("nan")
    assert f"{name!r} has entries that are infinite or NaN" in refused(
        capsys, "rank", paths[0], save(tmp_path / "nan", b)
    )


def test_spectrum_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = states()
    paths = [save(tmp_path / "a", a), save(tmp_path / "b", b)]
    found = record(capsys, "spectrum", *paths, "--k", 2)
    rows = found["by_tensor"]
    assert set(rows) == {name for name in SHAPES if len(SHAPES[name]) == 2} and found["k"] == [2]
    name = "model.embed_tokens.weight"
    old, new = (torch.linalg.svdvals(state[name].double()) for state in (a, b))
    assert rows[name]["shift"] == pytest.approx(float((new - old).norm() / old.norm()))
    assert rows[name]["changed"] == int((a[name] != b[name]).sum())
    everything = found["groups"]["all"]["all"]
    for key in ("entries", "changed", "principal", "low"):
        assert everything[key] == sum(row[key] for row in rows.values())
    assert everything["low_frac"] == everything["low"] / everything["changed"]
    assert everything["chance_frac"] == pytest.approx(0.3, abs=0.03)
    assert main(["spectrum", *paths, "--plot", str(tmp_path / "x.png")]) == 0
    assert "k: 1 leading" in capsys.readouterr().out
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert "--k must be at least 1, got 0" in refused(capsys, "spectrum", *paths, "--k", 0)


def test_overlap_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, a = states()
    b = {name: torch.where(torch.rand(x.shape) < 0.3, -x, x) for name, x in base.items()}
    paths = [save(tmp_path / "a", a), save(tmp_path / "b", b, shards=2), "--base", save(tmp_path / "base", base)]
    found = record(capsys, "overlap", *paths)
    masks = [torch.cat([(state[n] != base[n]).view(-1) for n in SHAPES]) for state in (a, b)]
    both = int((masks[0] & masks[1]).sum())
    row = found["parts"]["all"]
    assert (row["changed_a"], row["changed_b"], row["both"]) == (int(masks[0].sum()), int(masks[1].sum()), both)
    assert row["a_in_b"] == both / int(masks[0].sum())
    assert row["interval"][0] < row["expected"] < row["interval"][1]
    assert sum(one["both"] for one in found["layers"].values()) == both
    counts = [Counts(**one) for one in found["by_tensor"].values()]
    assert row == json.loads(json.dumps(summarise(counts)))
    assert main(["delta", "diff", paths[3], paths[0], "--out", str(tmp_path / "x")]) == 0
    again = record(capsys, "overlap", tmp_path / "x", *paths[1:])
    assert again["by_tensor"] == found["by_tensor"]
    assert main(["overlap", *paths, "--plot", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    wrong = save(tmp_path / "wrong", states(seed=3)[0])
    message = refused(capsys, "overlap", tmp_path / "x", paths[1], "--base", wrong)
    assert f"A: {tmp_path / 'x'} is a delta from another model than {wrong}" in message
