"""Simulated steps against real ones, byte by byte; what they cost; what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlvr_lightning.heap import scratch
from rlvr_lightning.optim import update
from rlvr_lightning.profiling.command import main
from rlvr_lightning.profiling.errors import counted
from rlvr_lightning.profiling.ledger import Ledger
from rlvr_lightning.profiling.predict import CUDA_OVERHEAD, predict
from rlvr_lightning.profiling.settings import Run
from rlvr_lightning.profiling.simulate import simulate
from rlvr_lightning.profiling.simulate_numbers import REAL_BYTES, WithoutNumbers

RECORD = Path(__file__).parents[1] / "results" / "simulate.json"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 1301,
    "tie_word_embeddings": True,
}
QWEN = LLAMA | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False}
MIXTURE = QWEN | {
    "model_type": "qwen3_moe",
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
SIZES: dict[str, Any] = {
    "compute_dtype": "float32",
    "group_size": 5,
    "micro_batch": 5,
    "step_completions": 10,
    "rollout_batch": 7,
    "prompt_tokens": 19,
    "max_tokens": 71,  # room for own tokens is made twice
    "device": "cpu",
}
RELEASED = {"optimizer": "sgd_split", "dtype": "bfloat16", "gradient_release": True, "micro_batch": 10}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SGD, two micro-batches": (LLAMA, {"optimizer": "sgd"}),
    "split, released, recomputed": (QWEN, RELEASED | {"activation_checkpointing": True}),
    "AdamW, recomputed, a reference, part of a group at a time": (
        LLAMA,
        {"optimizer": "adamw", "micro_batch": 1, "activation_checkpointing": True, "reference": "copy"},
    ),
}


def by_phase(ledger: Ledger) -> dict[str, int]:
    return {instant.name: instant.held.total for instant in ledger.instants}


@pytest.mark.parametrize("case", CASES)
def test_a_real_step(case: str) -> None:
    """Every phase, and every owner at the peak."""
    config, settings = CASES[case]
    run = Run(**{**SIZES, **settings})
    made, real = simulate(config, run), counted(config, run)[1]
    assert made.peak.name == real.peak.name
    assert by_phase(made) == pytest.approx(by_phase(real), rel=0.01)
    assert made.peak_bytes == pytest.approx(real.peak_bytes, rel=0.002)
    for owner, size in real.peak.held.owners().items():
        assert getattr(made.peak.held, owner) == pytest.approx(size, abs=0.01 * real.peak_bytes), owner


@pytest.mark.parametrize(
    "settings",
    [
        {"shard": 3, "reference": "copy"},
        {"shard": 2, "replicate": 2, "tensor": 2, "rollout": "layers"},
        {"optimizer": "sgd_stochastic", "dtype": "bfloat16", "reference": "delta", "changed_frac": 0.1},
        {"lora_rank": 3, "optimizer": "momentum"},
    ],
    ids=str,
)
def test_what_a_process_keeps_is_what_the_closed_form_says(settings: dict[str, Any]) -> None:
    run = Run(**{**SIZES, "max_tokens": 7, "micro_batch": 10, **settings})
    made, predicted = simulate(QWEN, run).peak.held, predict(QWEN, run).peak.held
    for owner in ("weights", "optimizer_state"):
        assert getattr(made, owner) == getattr(predicted, owner), owner
    assert made.reference == pytest.approx(predicted.reference, rel=0.01)  # entries are rounded down in each tensor
    assert (made.gathered > 0) == (predicted.gathered > 0)


def test_a_gpu_has_an_overhead_and_our_kernel_no_temporaries() -> None:
    run = Run(**{**SIZES, **RELEASED, "device": "cuda"})
    made = simulate(QWEN, run)
    assert {instant.held.overhead for instant in made.instants} == {CUDA_OVERHEAD}
    assert made.peak.held.optimizer_workspace < 4000  # counts of what changed


def test_nothing_is_left_behind() -> None:
    chunk = dict(update.CHUNK_ENTRIES)
    simulate(LLAMA, Run(**{**SIZES, "max_tokens": 1, "shard": 2, "device": "cuda"}))
    assert not dist.is_initialized()
    assert chunk == update.CHUNK_ENTRIES
    assert type(scratch("update old", 5, torch.bfloat16)) is torch.Tensor
    assert torch.nn.Linear(2, 3).to(torch.float64).weight.dtype == torch.float64


def test_small_masks_are_real_and_large_ones_are_not() -> None:
    with WithoutNumbers():
        lengths = torch.tensor([3, 5])
        mask = torch.arange(7) < lengths[:, None]
        assert mask.sum(1).tolist() == [3, 5]
        assert torch.zeros(2, 7).masked_scatter(mask, torch.ones(8)).sum().item() == 1.0  # there is no number to tell
        side = int(REAL_BYTES**0.5) + 1
        large = torch.arange(side)[:, None] >= torch.arange(side)
        assert type(large) is not torch.Tensor
        assert large.shape == (side, side)


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        (LLAMA, {"optimizer": "adamw8bit"}, "--simulate: adamw8bit cannot step here; one of sgd, momentum, "),
        (LLAMA, {"cpu_offload": True}, "leave out cpu_offload and low_on_host"),
        (LLAMA, {"step_completions": 7}, "completions of a step .7. must be whole groups of 5"),
        (MIXTURE, {}, "cannot be traced without numbers .Expected inputs of BF16 type .*; leave it out"),
    ],
)
def test_what_only_the_closed_form_can_say(config: dict[str, Any], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        simulate(config, Run(**{**SIZES, "max_tokens": 3, **settings}))


def test_the_command_prints_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    out = tmp_path / "table.json"
    assert main(["--model", str(tmp_path), "--simulate", "--format", "json", "--out", str(out)]) == 0
    _, rollout, training = json.loads(out.read_text())
    for table in (rollout, training):
        together = next(row for row in table["rows"] if "together" in row.values())
        assert together["simulated"] == pytest.approx(together["predicted"], rel=0.05)
    assert main(["--model", "qwen3-8b", "--compare", "sgd,adamw", "--simulate"]) == 2
    assert main(["--simulate"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "error: --simulate is of one run; leave out --compare, or call it for each",
        "error: these options are of one run: add --config or --model",
    ]


# ---- the record --------------------------------------------------------------------------------------------------


def test_large_models_take_minutes_and_little_memory() -> None:
    rows = json.loads(RECORD.read_text())["rows"]
    assert rows[0]["model"] == "qwen3-8b"
    for row in rows:
        assert row["resident_bytes"] < 4 << 30
        assert row["processor_s"] < 180  # of one core; the clock's seconds depend on who else is at work
        ratio = row["peak_bytes"]["predicted"] / row["peak_bytes"]["simulated"]
        assert 0.9 < ratio < (1.25 if row["run"]["shard"] > 1 else 1.1)  # of several processes it is an upper bound
