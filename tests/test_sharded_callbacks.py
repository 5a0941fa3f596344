"""Callbacks in 1, 2 and 4 processes: the same counts, whoever holds which part of a weight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from callback_workers import training
from conftest import tiny_causal_lm
from test_grpo import TINY, load_tokenizer

WORKERS = str(Path(__file__).with_name("callback_workers.py"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
WORLDS = {2: ["copies", "adamw", "released", "full disk", "mixed"], 4: ["split", "replicas"]}
RUNS = [(world, case) for world, cases in WORLDS.items() for case in cases if case not in ("full disk", "mixed")]
ROWS = 2003  # of the embedding, so that it is by far the largest tensor
UPDATE, MEMORY = "update/changed_entries", ("optimizer_state", "weights", "gradients")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tied weights and sizes that 4 processes cannot share evenly, trained by 1, 2 and 4 of them."""
    folder, out = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out")
    tokenizer = load_tokenizer(str(TINY))
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 5, "intermediate_size": 7, "num_attention_heads": 2, "num_key_value_heads": 1}
    tiny_causal_lm(
        "qwen3",
        vocab_size=ROWS,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        **sizes,
    ).save_pretrained(folder)
    training(str(folder), str(out), "split", "adamw", "released")
    for world, cases in WORLDS.items():
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command = [*start, WORKERS, "training", str(folder), str(out), *cases]
        subprocess.run(command, env=ENVIRONMENT, check=True, timeout=300)
    return out


def read(out: Path, case: str, world: int, rank: int = 0) -> dict[str, Any]:
    return json.loads((out / f"{case} {world} {rank}.json").read_text())


def lines(out: Path, case: str, world: int, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{case} {world}" / file).read_text().splitlines()]


def alone(case: str) -> str:
    """The case that is the same in one process."""
    return "split" if case in ("replicas", "copies") else case


@pytest.mark.parametrize(("world", "case"), [run for run in RUNS if run[1] != "released"])
def test_counts_of_changes_are_those_of_one_process(out: Path, world: int, case: str) -> None:
    records, expected = (lines(out, *run, "sparsity.jsonl") for run in ((case, world), (alone(case), 1)))
    for record in (*records, *expected):
        del record["measure_s"]
    assert records == expected
    assert [r["step"] for r in records] == [1, 2, 3]
    entries = read(out, case, world)["entries"]
    assert all(r["last_step"]["entries"] == r["module_entries"] == entries for r in records)
    assert all(0 < r["last_step"]["changed"]["bf16"] < entries for r in records)


@pytest.mark.parametrize(("world", "case"), [*RUNS, (1, "split")])
def test_counts_are_those_of_whole_tensors_and_our_sgd_agrees(out: Path, world: int, case: str) -> None:
    found = read(out, case, world)
    changed = [r["last_step"]["changed"]["bf16"] for r in lines(out, case, world, "sparsity.jsonl")]
    assert changed == found["truly_changed"]
    assert found["metrics"].get(UPDATE) == (None if case == "adamw" else changed)


@pytest.mark.parametrize(("world", "case"), RUNS)
def test_bytes_in_all_are_those_of_one_process_and_a_rank_has_its_share(out: Path, world: int, case: str) -> None:
    found, expected = read(out, case, world)["metrics"], read(out, alone(case), 1)["metrics"]
    width = {"optimizer_state": {"adamw": 4}.get(case, 2), "weights": 2, "gradients": 0 if case == "released" else 2}
    most = max(sum(read(out, case, world, rank)["entries_here"]) for rank in range(world))
    for name in MEMORY:
        assert found[f"memory/{name}_bytes"] == expected[f"memory/{name}_bytes"]
        counters = (
            4 * len(read(out, case, world)["entries_here"]) if (name, case) == ("optimizer_state", "adamw") else 0
        )
        assert found[f"memory/{name}_rank_bytes"] == [width[name] * most + counters] * 3
    assert not any(name.endswith("_rank_bytes") for name in expected)


@pytest.mark.parametrize(("world", "case"), [run for run in RUNS if run[1] != "copies"])
def test_no_full_tensor_is_built_and_nothing_gathered(out: Path, world: int, case: str) -> None:
    for rank in range(world):
        found = read(out, case, world, rank)
        assert 0 < found["largest_allocation"] < 0.6 * found["largest_weight"]
        assert "c10d::allreduce_" in found["collectives"]
        assert set(found["collectives"]) <= {"c10d::allreduce_", "c10d::broadcast_", "c10d::barrier"}


def numbers(record: Any) -> list[Any]:
    """All of a nested record, in order."""
    if isinstance(record, dict):
        return [part for key in sorted(record) for part in [key, *numbers(record[key])]]
    return [record]


@pytest.mark.parametrize(("world", "case"), [run for run in RUNS if run[1] != "released"])
def test_a_sample_of_all_entries_is_watched_as_in_one_process(out: Path, world: int, case: str) -> None:
    records, expected = (lines(out, *run, "why_sparse.jsonl") for run in ((case, world), (alone(case), 1)))
    assert [record["step"] for record in records] == [1, 2, 3]
    for record, one in zip(records, expected, strict=True):
        del record["sample_bytes"], one["sample_bytes"]
        assert record["sample_entries"] == read(out, case, world)["entries"]
        for mine, alone_ in zip(numbers(record), numbers(one), strict=True):
            assert mine == (pytest.approx(alone_, rel=1e-5) if isinstance(alone_, float) else alone_)


def test_a_full_disk_of_one_process_ends_the_measuring_in_all_and_not_the_run(out: Path) -> None:
    for rank in range(2):
        found = read(out, "full disk", 2, rank)
        assert len(found["truly_changed"]) == 3
        assert not any(name.startswith("update/changed_frac") for name in found["metrics"])
    assert not (out / "full disk 2" / "sparsity.jsonl").exists()


def test_sharded_replicated_and_plain_tensors_count_once_each(out: Path) -> None:
    results = [json.loads((out / f"mixed {rank}.json").read_text()) for rank in range(2)]
    for result in results:
        assert result["counts"] == [[[[35, 0], [35, 0]], [[3, 0], [3, 0]], [[2, 0], [2, 0]]]]
        assert result["owned"] == (35 + 3 + 2) * 4
    assert [result["local"] for result in results] == [(20 + 3 + 2) * 4, (15 + 3 + 2) * 4]


def test_shards_are_uneven_and_some_are_empty(out: Path) -> None:
    shares = [read(out, "split", 4, rank)["entries_here"] for rank in range(4)]
    assert any(0 in share for share in shares)
    assert len({sum(share) for share in shares}) > 1


@pytest.mark.parametrize(("world", "case"), [run for run in RUNS if run[1] != "released"])
def test_completions_of_all_ranks_are_in_one_file(out: Path, world: int, case: str) -> None:
    samples, expected = (lines(out, *run, "completions.jsonl") for run in ((case, world), (alone(case), 1)))
    assert Counter(sample.pop("rank") for sample in samples) == dict.fromkeys(range(world), len(samples) // world)
    assert [(s["step"], s["prompt"], s["completion"]) for s in by_prompt(samples)] == [
        (s["step"], s["prompt"], s["completion"]) for s in by_prompt(expected)
    ]
    assert not list(out.glob(f"{case} {world}/completions.rank*"))


def by_prompt(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda s: (s["step"], s["prompt"]))


@pytest.mark.parametrize(("world", "case"), RUNS)
def test_memory_is_that_of_the_process_with_most(out: Path, world: int, case: str) -> None:
    report = json.loads((out / f"{case} {world}" / "memory.json").read_text())
    peaks = [read(out, case, world, rank)["metrics"]["memory/peak_bytes"] for rank in range(world)]
    assert all(rank == peaks[0] for rank in peaks)
    assert report["ranks"] == world
    assert report["peak_bytes"] >= max(peaks[0]) > 50 << 20
    state = report["optimizer_state"]
    assert state["global_bytes"] == read(out, case, world)["metrics"]["memory/optimizer_state_bytes"][-1]
