"""Shares of a sharded model and what is sent for them: real processes, simulated ones and closed forms agree."""

from __future__ import annotations

import json
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

from rlvr_lightning.heap import scratch
from rlvr_lightning.profiling.allocations import AllocationCounter
from rlvr_lightning.profiling.bench_scaling import WIDTH, closed_form, run, traffic_cases
from rlvr_lightning.profiling.scaling_worker import simulate, unit_shapes
from rlvr_lightning.profiling.sharding_counter import received_bytes
from rlvr_lightning.profiling.traffic import Step, padded_entries
from rlvr_lightning.study.bench_tables import scaling_table, traffic_models_table, traffic_table

RECORD = Path(__file__).parent.parent / "results" / "bench_scaling.json"
shapes = cache(unit_shapes)
PERSISTENT = ("weights", "gradients", "reference")


def agree(rows: list[dict], units: list) -> None:
    for row in rows:
        counted = dict(row["traffic_bytes"])
        assert 0 < counted.pop("control") < 4000
        assert counted == closed_form(row, units)
        if row["replicate"] == 1:
            assert row["bytes"] == simulate(row, row["processes"])["bytes"]


def test_two_processes_receive_what_the_closed_form_says_and_hold_what_is_simulated() -> None:
    cases = [
        next(c for c in traffic_cases(2) if (c["optimizer"], c["weights"], c["reduce"], c["rollout"]) == wanted)
        for wanted in [("sgd", "bfloat16", "float32", "layers"), ("adamw", "float32", "bfloat16", "once")]
    ]
    agree(run(cases, 2), unit_shapes("tiny"))


def test_a_simulation_leaves_no_fake_tensors_behind() -> None:
    simulate(traffic_cases(2)[0], 3)
    assert type(scratch("update old", 5, torch.bfloat16)) is torch.Tensor


@pytest.mark.slow
def test_four_processes_with_and_without_replicas() -> None:
    agree(run(traffic_cases(4), 4), unit_shapes("tiny"))


def test_a_step_by_hand() -> None:
    """Two processes; a layer of 5 x 3 (6 rows when filled up) and of 4, a rest of 7 (8): 22 and 8 entries."""
    units = [[(5, 3), (4,)], [(7,)]]
    assert [padded_entries(unit, 2) for unit in units] == [22, 8]
    step = Step(units=units, shards=2, micro_batches=3, reference_passes=1, rollout_passes=4)
    assert step.received_bytes() == {
        "weights, rollout": 4 * 22 + 8,  # half of the entries, 2 bytes each
        "weights, reference": 30,
        "weights, forward": 3 * 30,
        "weights, backward": 3 * 22,
        "gradients": 3 * 2 * 30,
    }
    replicated = Step(units=units, shards=2, replicas=3).received_bytes()
    assert replicated["gradients between replicas"] == 4 * 15 * 2 * 2 // 3
    assert replicated["weights, rollout"] == 30


def test_unknown_collectives_are_not_taken_for_free() -> None:
    with pytest.raises(ValueError, match="c10d::alltoall_ brings is not known"):
        received_bytes("alltoall_", ([torch.zeros(3)],))


def test_resized_storages_are_counted() -> None:
    with AllocationCounter() as counter:
        counter.own("gathered", [weight := torch.zeros(5)])
        weight.untyped_storage().resize_(0)
        assert counter.live() == {}
        weight.untyped_storage().resize_(28)
        assert counter.live() == {"gathered": 28}
    assert counter.peak_bytes == 28
    weight.untyped_storage().resize_(0)  # as before, without being counted
    assert counter.live() == {"gathered": 28}


# ---- the record --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads(RECORD.read_text())


def test_simulation_equals_measurement(record) -> None:
    both = [row for row in record["memory"] if "simulated_bytes" in row]
    assert {(row["model"], row["processes"]) for row in both} == set(product(("tiny", "smollm2"), (1, 2, 4)))
    for row in both:
        assert row["bytes"] == row["simulated_bytes"]


def test_shares_fall_as_one_over_n_but_for_filled_up_rows(record) -> None:
    assert {row["processes"] for row in record["memory"]} == {1, 2, 4, 8, 64, 512}
    for row in record["memory"]:
        units, count, held = shapes(row["model"]), row["processes"], row["bytes"]
        entries = sum(padded_entries(unit, count) for unit in units) // count
        width, tensors = WIDTH[row["weights"]], sum(map(len, units))
        assert [held[owner] for owner in PERSISTENT] == [entries * width] * 3
        state = {"adamw": 2 * entries * width + 4 * tensors, "sgd": 2 * entries if width == 2 else 0}
        assert held["optimizer state"] == state[row["optimizer"]]


def test_what_is_gathered_does_not_fall_and_does_not_grow_but_for_filled_up_rows(record) -> None:
    for row in record["memory"]:
        units, count, held = shapes(row["model"]), row["processes"], row["bytes"]
        *layers, rest = (2 * padded_entries(unit, count) for unit in units)  # computed in bf16
        if count == 1:
            assert held["gathered, training"] == held["gathered, rollout"] == 0
            continue
        assert held["gathered, training"] <= 2 * rest + 3 * max(layers)
        assert sum(layers) + rest <= held["gathered, rollout"] <= sum(layers) + 2 * rest + max(layers)


def test_traffic_equals_the_closed_form_and_no_optimizer_sends_anything(record) -> None:
    assert len(record["traffic"]) == len(traffic_cases(2)) + len(traffic_cases(4))
    for row in record["traffic"]:
        counted = dict(row["traffic_bytes"])
        assert 0 < counted.pop("control") < 4000  # counts, norms, metrics: text of some numbers for each process
        assert counted == row["closed_form_bytes"] == closed_form(row, shapes("tiny"))


def test_tables(record) -> None:
    shares, traffic, models = (f(record) for f in (scaling_table, traffic_table, traffic_models_table))
    assert "| qwen3-8b | weights, fp32" in shares
    assert "| 2 x 2 | bfloat16 | float32 | layers |" in traffic
    assert "| qwen3-8b | 512 | bfloat16 | float32 |" in models
