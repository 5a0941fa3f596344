"""Counting changed entries, against a loop over scalars; the files that old values wait in."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import nn

from rlvr_lightning.callbacks import snapshots
from rlvr_lightning.callbacks.change_counts import DEFINITIONS, count_changed, kind_of
from rlvr_lightning.callbacks.change_meter import ChangeMeter
from rlvr_lightning.callbacks.tensors import distinct, total_bytes

ALL = list(DEFINITIONS)


def naive_changed(old: float, new: float, old_bits: int, new_bits: int, name: str) -> bool:
    """One entry of float32, by the words of the definitions."""
    as16 = [torch.tensor(x).to(torch.bfloat16) for x in (old, new)]
    bits16 = [int(x.view(torch.int16)) for x in as16]
    if name == "fp32":
        return old_bits != new_bits
    if name == "bf16":
        return bits16[0] != bits16[1]
    if name == "tol1e-5":
        a, b = (float(x) for x in as16)
        return bits16[0] != bits16[1] and not abs(b - a) <= 1e-5
    if old_bits == new_bits:
        return False
    near = abs(new - old) <= 1e-3 * max(abs(old), abs(new))
    return not near or float("inf") in (abs(old), abs(new))


AWKWARD = [0.0, -0.0, 1.0, 1.0001, 1.004, 1.01, -1.0, 1e-6, 5e-6, 1.2e-5, 3e38, -3e38, 1e-40]
AWKWARD += [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("repeat", [1, 40])
def test_counts_equal_a_loop_over_scalars(repeat):
    """All pairs of awkward values; repeated unchanged entries make the sparse way of counting be taken too."""
    pairs = [(a, b) for a in AWKWARD for b in AWKWARD] + [(1.0, 1.0)] * (len(AWKWARD) ** 2 * (repeat - 1))
    old, new = (torch.tensor(side) for side in zip(*pairs, strict=True))
    raw = [[struct.unpack("i", struct.pack("f", x))[0] for x in side.tolist()] for side in (old, new)]
    expected = [[len(pairs), sum(a == 0 for a, _ in pairs)]]
    for name in ALL:
        hits = [naive_changed(a, b, i, j, name) for a, b, i, j in zip(old.tolist(), new.tolist(), *raw, strict=True)]
        expected.append([sum(hits), sum(h for h, (a, _) in zip(hits, pairs, strict=True) if a == 0)])
    assert count_changed(old, new, ALL).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_count_by_hand(dtype):
    old = torch.tensor([0.0, 1.0, 2.0, 3.0, float("nan")], dtype=dtype)
    new = old.clone()
    new[1] = 1.5
    new[3] = float("nan")
    counts = count_changed(old, new, ALL).tolist()
    assert counts == [[5, 1], [2, 0], [2, 0], [2, 0], [2, 0]]


def test_a_nan_that_stays_is_unchanged_and_nothing_changed_is_zero():
    values = torch.tensor([float("nan"), float("inf"), 0.0, 1.0])
    assert count_changed(values, values.clone(), ALL).tolist() == [[4, 1]] + [[0, 0]] * 4


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("transformer.h.3.mlp.c_fc.weight", "mlp"),
        ("transformer.h.3.ln_1.weight", "norm"),
        ("transformer.wte.weight", "embedding"),
        ("model.embed_tokens.weight", "embedding"),
        ("policy.model.lm_head.weight", "lm_head"),
        ("value.weight", "other"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize("chunk_bytes", [8, 24, 1 << 20])
def test_meter_counts_hand_changed_entries_whatever_the_chunk(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setitem(snapshots.CHUNK_BYTES, "cpu", chunk_bytes)
    matrix = nn.Parameter(torch.ones(3, 5).t())  # not contiguous
    half = nn.Parameter(torch.ones(7, dtype=torch.bfloat16))
    zeros = nn.Parameter(torch.zeros(4))
    still = nn.Parameter(torch.ones(9), requires_grad=False)
    optimizer = torch.optim.SGD([matrix, half, zeros, still], lr=1.0)
    meter = ChangeMeter(optimizer, {id(matrix): "m"}, ["bf16", "fp32"], tmp_path)
    with torch.no_grad():
        half[6] = 2.0
    meter.before_step()
    with torch.no_grad():
        matrix[4, 2], matrix[0, 1] = 5.0, 1.0001  # the second is lost in bf16
        zeros[3] = 1e-9
        half[6] = 1.0  # back to where it started
        half[0] = 3.0
    step, start = meter.counts().tolist()
    assert step[:3] == [[[15, 0], [1, 0], [2, 0]], [[7, 0], [2, 0], [2, 0]], [[4, 4], [1, 1], [1, 1]]]
    assert start[:3] == [[[15, 0], [1, 0], [2, 0]], [[7, 0], [1, 0], [1, 0]], [[4, 4], [1, 1], [1, 1]]]
    assert meter.frozen == {3: 9}
    assert list(tmp_path.iterdir()) == []  # the files have no names, nothing to clean up
    meter.close()


def test_tied_parameters_count_once():
    one = nn.Parameter(torch.zeros(3, 5))
    alias = nn.Parameter(one.data)
    assert len(distinct([one, one, alias, nn.Parameter(torch.zeros(3, 5))])) == 2
    assert total_bytes([one, alias]) == 60
