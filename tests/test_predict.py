"""Bytes in closed form: equal to what real modules, optimizers and shards hold, and near the counted peaks."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlvr_lightning import compute, logprobs
from rlvr_lightning.callbacks.optimizer_state import count_state
from rlvr_lightning.optim import SGD, update
from rlvr_lightning.packing import completions_per_row
from rlvr_lightning.policy import TINY, LoRA, Policy
from rlvr_lightning.profiling import activations, optimizer_bytes
from rlvr_lightning.profiling.allocations import AllocationCounter
from rlvr_lightning.profiling.parameters import named
from rlvr_lightning.profiling.predict import passes, predict
from rlvr_lightning.profiling.settings import Run
from rlvr_lightning.profiling.shares import gathered_bytes, reducing_bytes, sizes
from rlvr_lightning.rollout import cache, hf, sampling
from rlvr_lightning.schema import Rollouts

RESULTS = Path(__file__).parent.parent / "results"
TINY_CONFIG = json.loads((TINY / "config.json").read_text())
CONFIGS = {"tiny": TINY_CONFIG, "smollm2": named()["smollm2-135m"]} | named()
REAL = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "adafactor": partial(torch.optim.Adafactor, lr=0.1),
    "sgd_split": partial(SGD, lr=0.1),
    "sgd_fp32": partial(SGD, lr=0.1, master="fp32"),
    "sgd_bf16": partial(SGD, lr=0.1, master="none"),
    "sgd_stochastic": partial(SGD, lr=0.1, master="none", rounding="stochastic"),
}


def bare(config: dict[str, Any], dtype: str = "float32", layers: int | None = None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {name: value for name, value in config.items() if name != "model_type"}
    settings |= {"num_hidden_layers": layers} if layers else {}
    shape = AutoConfig.for_model(config["model_type"], **settings)
    return AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype))


def held_by_key(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    return {entry.key: entry.local_bytes for entry in count_state(optimizer)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", REAL)
def test_state_is_what_the_optimizer_holds(name: str, dtype: str) -> None:
    model = bare(TINY_CONFIG, dtype)
    optimizer = REAL[name](model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = sizes(TINY_CONFIG, Run(optimizer=name, dtype=dtype, reference="copy"))
    assert dict(found.state) == held_by_key(optimizer)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert found.reference == found.weights


@pytest.mark.parametrize("name", ["adamw", "sgd_split"])
def test_state_of_a_larger_shape(name: str) -> None:
    """SmolLM2's, without numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = bare(CONFIGS["smollm2"], "bfloat16")
        optimizer = REAL[name](model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        held = sum(
            v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)
        )
        found = sizes(CONFIGS["smollm2"], Run(optimizer=name, dtype="bfloat16"))
        assert sum(found.state.values()) == held


def test_muon_with_adamw_for_the_rest() -> None:
    model = bare(TINY_CONFIG)
    inner = [p for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in inner)]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    held: dict[str, int] = {}
    for optimizer in (torch.optim.Muon(inner), torch.optim.AdamW(rest)):
        optimizer.step()
        held |= held_by_key(optimizer)
    assert dict(sizes(TINY_CONFIG, Run(optimizer="muon")).state) == held


@pytest.mark.parametrize("rank", [1, 3])
def test_adapters(rank: int) -> None:
    model = LoRA(rank=rank).adapt(bare(TINY_CONFIG, "bfloat16"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = sizes(TINY_CONFIG, Run(optimizer="adamw", dtype="bfloat16", lora_rank=rank, reference="copy"))
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.nbytes for p in trained)
    assert (dict(found.state), found.reference) == (held_by_key(optimizer), 0)


MODES = {
    "SGD, fp32 weights": ("sgd", "float32"),
    "SGD, split master": ("sgd_split", "bfloat16"),
    "AdamW, fp32 weights": ("adamw", "float32"),
    "AdamW, bf16 weights": ("adamw", "bfloat16"),
}
RECORDED = json.loads((RESULTS / "bench_scaling.json").read_text())["memory"]


def test_shares_and_buffers_of_every_recorded_process() -> None:
    """1 to 512 processes, measured and simulated: every byte of every owner."""
    assert len(RECORDED) >= 60
    for row in RECORDED:
        optimizer, dtype = MODES[row["mode"]]
        run = Run(optimizer=optimizer, dtype=dtype, shard=row["processes"], reference="copy")
        found = sizes(CONFIGS[row["model"]], run)
        mine = {
            "weights": found.weights,
            "gradients": found.gradients,
            "optimizer state": sum(found.state.values()),
            "reference": found.reference,
            "gathered, training": gathered_bytes(found, run, "training"),
            "gathered, rollout": gathered_bytes(found, run, "rollout"),
            "gradients before reduction": reducing_bytes(found, run),
        }
        assert mine == row["bytes"], (row["model"], row["mode"], row["processes"])


@pytest.mark.parametrize("packed", [1, 4], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_what_a_layer_keeps(kind: str, dtype: str, packed: int) -> None:
    config = {
        "model_type": kind,
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 301,
        "tie_word_embeddings": True,
    }
    kept = []
    for layers in (1, 3):
        policy = Policy(bare(config | {"num_hidden_layers": layers}, dtype).train())
        with AllocationCounter() as counter:
            counter.own("weights", policy.parameters())
            output = policy(rollouts(prompts=2, group=4, prompt=35, completion=21), 1.0, packed)
            kept.append(counter.live()["other"])
            del output
    one = passes(config | {"num_hidden_layers": 3}, run(packed, dtype))
    one = activations.Pass(**{**vars(one), "packed": packed > 1, "rows": 8 // packed, "length": 35 + packed * 21})
    assert (kept[1] - kept[0]) // 2 == one.layer()
    assert abs(kept[0] - one.layer() - one.rest()) < 0.03 * kept[0]


def run(packed: int, dtype: str) -> Run:
    return Run(dtype=dtype, compute_dtype=dtype, group_size=4, micro_batch=8, prompt_tokens=35, max_tokens=21)


def rollouts(prompts: int, group: int, prompt: int, completion: int) -> Rollouts:
    ids = torch.ones(prompts * group, completion, dtype=torch.long)
    return Rollouts(
        prompt_ids=[[1] * prompt] * prompts,
        completion_ids=ids,
        completion_mask=ids > 0,
        rollout_logprobs=ids.float(),
        truncated=torch.zeros(len(ids), dtype=torch.bool),
    )


COUNTED: dict[str, dict[str, Any]] = {
    "adamw_fp32_copy": {"optimizer": "adamw", "reference": "copy"},
    "sgd_fp32_copy": {"optimizer": "sgd", "reference": "copy"},
    "sgd_split_release_delta": {"optimizer": "sgd_split", "gradient_release": True},
    "sgd_split_delayed_delta": {"optimizer": "sgd_split", "gradient_release": True, "two_pass": False},
    "sgd_split_kept_delta": {"optimizer": "sgd_split"},
    "sgd_bf16_release_delta": {"optimizer": "sgd_stochastic", "gradient_release": True},
}


def test_peaks_are_near_the_counted_ones() -> None:
    """Those of real GRPO steps. The tiny model's completions end before their limit: it takes less than the longest."""
    rows = json.loads((RESULTS / "bench_memory_cpu.json").read_text())["rows"]
    assert len(rows) == 18
    for row in rows:
        counted, mode = row["counted"], dict(COUNTED[row["mode"]])
        if "reference" not in mode:
            changed = counted["owners_bytes"]["reference"] / 6 / counted["parameters"]
            mode |= {"dtype": "bfloat16", "reference": "delta", "changed_frac": changed}
        batch = {"group_size": 4, "micro_batch": 8, "step_completions": 8, "prompt_tokens": 5, "max_tokens": 12}
        settings = Run(**mode, **batch, compute_dtype="float32", activation_checkpointing=True, device="cpu")
        error = predict(CONFIGS[row["model"]], settings).peak_bytes / counted["peak_bytes"] - 1
        allowed = (-0.02, 0.1) if row["model"] == "tiny" else (-0.02, 0.02)
        assert allowed[0] < error < allowed[1], (row["model"], row["mode"], error)


def test_constants_are_those_of_the_code() -> None:
    assert (activations.BLOCK_BYTES, activations.CAST_BYTES) == (logprobs.BLOCK_BYTES, logprobs.CAST_BYTES)
    assert activations.MOST_TOKENS == logprobs.MOST_TOKENS
    assert activations.CAST_ENTRIES == compute.BLOCK_ENTRIES
    assert (activations.COLUMNS, activations.PROMPT_TOKENS) == (cache.COLUMNS, hf.PROMPT_TOKENS)
    assert activations.SAMPLING_BLOCK == sampling.BLOCK
    assert update.CHUNK_ENTRIES["cpu"] == optimizer_bytes.CHUNK_CPU


@pytest.mark.parametrize(("prompt", "completion"), [(100, 10), (10, 4000), (300, 300), (7, 90)])
def test_packing_is_that_of_the_code(prompt: int, completion: int) -> None:
    entries, hidden = 3_540_096, 576
    mine = activations.per_row(prompt, completion, 6, entries, hidden)
    assert mine == completions_per_row(rollouts(1, 6, prompt, completion), entries / (2 * hidden))


def test_a_peak_is_an_instant_of_a_phase() -> None:
    config = named()["qwen3-8b"]
    ledger = predict(config, Run(optimizer="adamw", reference="copy"))
    assert ledger.peak.phase == "training"
    assert ledger.peak_bytes < sum(
        max(i.held.owners().get(o, 0) for i in ledger.instants) for o in vars(ledger.peak.held)
    )
    long = predict(config, Run(optimizer="sgd_split", dtype="bfloat16", gradient_release=True, max_tokens=8192))
    assert long.phase_bytes("rollout") > long.phase_bytes("training") - long.peak.held.activations


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"micro_batch": 3, "group_size": 8}, "must divide group_size"),
        ({"optimizer": "adam"}, "optimizer: 'adam' is not known here"),
        ({"optimizer": "adamw", "gradient_release": True}, "adamw cannot update during the backward pass"),
        ({"optimizer": "sgd_split", "gradient_release": True, "step_completions": 64}, "set micro_batch to 64"),
        ({"dtype": "bfloat16", "autocast": True}, "set dtype: float32"),
        ({"changed_frac": 2.0}, "changed_frac must lie in"),
        ({"dtype": "float16"}, "dtype: 'float16' is not known here; one of float32, bfloat16"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(**settings)


def test_tensor_parallelism_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="cannot share 9 attention heads with 3"):
        sizes(CONFIGS["smollm2"], Run(tensor=2))
    with pytest.raises(ValueError, match="how gpt2 layers are split"):
        sizes(CONFIGS["gpt2"], Run(tensor=2))


@pytest.mark.parametrize(("tensor", "shard"), [(2, 1), (2, 3), (4, 2)])
def test_tensor_parallel_shares(tensor: int, shard: int) -> None:
    """Those of the strategy's own splitting, over processes that do not exist."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from rlvr_lightning.delta.tensor import local
    from rlvr_lightning.strategy import AXES, Sharded, fully_shard_layers

    config = dict(named()["qwen3-0.6b"]) | {"num_hidden_layers": 2, "num_key_value_heads": 4}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tensor * shard)
    try:
        mesh = dist.init_device_mesh("cpu", (1, shard, tensor), mesh_dim_names=AXES)
        with torch.device("meta"):
            policy = Policy(bare(config, "bfloat16"))
        fully_shard_layers(policy, mesh, torch.bfloat16, Sharded(tensor=tensor))
        held = sum(local(p).nbytes for p in policy.parameters())
    finally:
        dist.destroy_process_group()
    assert sizes(config, Run(dtype="bfloat16", tensor=tensor, shard=shard)).weights == held
