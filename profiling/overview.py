"""Tables of predicted memory: SGD against AdamW over scales, one run by owner, several beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlvr_lightning.profiling.parameters import count, named
from rlvr_lightning.profiling.predict import predict
from rlvr_lightning.profiling.settings import Run
from rlvr_lightning.profiling.shares import sizes
from rlvr_lightning.profiling.table import Table

SHOWN = (
    *("qwen2.5-0.5b", "qwen3-1.7b", "qwen2.5-3b", "qwen3-8b", "qwen3-14b", "qwen3-32b", "llama-3.1-70b"),
    *("llama-3.1-405b", "qwen3-30b-a3b", "mixtral-8x7b", "qwen3-235b-a22b", "deepseek-v3"),
)
GPU_MIB = {"24 GB": 24_564, "80 GB": 81_559, "141 GB": 143_771}
"""As the driver reports them: RTX 4090, H100, H200."""
MOST_GPUS = 8192
KINDS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw"},
    "SGD": {"optimizer": "sgd"},
    "SGD, split, released": {"optimizer": "sgd_split", "dtype": "bfloat16", "gradient_release": True},
}
GIB = 2**30


def scale(kind: str, **more: Any) -> Run:
    """The run of the overview: fp32 weights computed in bf16, one micro-batch of a group, layers recomputed."""
    common = {"micro_batch": 8, "rollout_batch": 64, "prompt_tokens": 1024, "max_tokens": 1024}
    return Run(**{**common, "activation_checkpointing": True, "rollout": "layers", **KINDS[kind], **more})


def fewest(config: Mapping[str, Any], kind: str, limit_bytes: int) -> int | None:
    """The smallest power of two of GPUs that suffices; None if not even `MOST_GPUS` do."""
    gpus = 1
    while gpus <= MOST_GPUS:
        if predict(config, scale(kind, shard=gpus)).peak_bytes <= limit_bytes:
            return gpus
        gpus *= 2
    return None


def bytes_per_parameter(config: Mapping[str, Any], run: Run) -> float:
    """Of weights, the optimizer's state, and gradients where they are all alive at once."""
    found = sizes(config, replace(run, shard=1, replicate=1, tensor=1))
    held = found.weights + sum(found.state.values()) + (0 if run.gradient_release else found.gradients)
    return held / count(config)


def overview() -> list[Table]:
    """SGD against AdamW from 0.5 B to 671 B, and the arithmetic of the papers."""
    columns = ["model", "parameters", "optimizer", "bytes/param", "GiB, 1 GPU", "of 8, each", "of 64, each"]
    columns += ["saved GiB", "saved %", *(f"GPUs of {size}" for size in GPU_MIB)]
    rows: list[list[Any]] = []
    for name in SHOWN:
        config = named()[name]
        adamw = predict(config, scale("AdamW")).peak_bytes
        for kind in KINDS:
            each = [predict(config, scale(kind, shard=gpus)).peak_bytes for gpus in (1, 8, 64)]
            saved = None if kind == "AdamW" else adamw - each[0]
            rows.append(
                [
                    name if kind == "AdamW" else "",
                    f"{count(config) / 1e9:,.2f} B" if kind == "AdamW" else "",
                    kind,
                    bytes_per_parameter(config, scale(kind)),
                    *(size / GIB for size in each),
                    None if saved is None else saved / GIB,
                    None if saved is None else 100 * saved / adamw,
                    *(fewest(config, kind, mib << 20) for mib in GPU_MIB.values()),
                ]
            )
    notes = [
        "GiB are of the peak of one process: weights, gradients, state, buffers of sharding, activations, KV cache,",
        "and 0.6 GiB of CUDA's own. GRPO without a reference, fp32 weights computed in bf16 (the last kind: bf16 with",
        "16 more bits), a micro-batch of 8 completions of 1,024 tokens on prompts of 1,024, rollouts of 64, layers",
        "recomputed and gathered one by one. bytes/param: weights, gradients, state. Saved: at the peak, on one GPU.",
        f"GPUs: powers of two; -: not even {MOST_GPUS:,}, for activations, caches and what is gathered take more.",
        "Your run: profile --config NAME.yaml, or --model NAME.",
    ]
    return [Table("SGD against AdamW, predicted memory", columns, rows, notes), papers()]


def papers() -> Table:
    """12 bytes a parameter against 4, as arXiv 2602.07729 reckons."""
    number = count(named()["qwen3-1.7b"])
    held = {kind: sizes(named()["qwen3-1.7b"], scale(kind)) for kind in ("AdamW", "SGD")}
    rows: list[list[Any]] = []
    for label, params in (("1.7 B, as in the paper", 1_700_000_000), ("as counted", number)):
        rows.append([label, params, 12, 4, 12 * params / 1e9, 4 * params / 1e9, 8 * params / 1e9])
    state = {kind: (s.weights + sum(s.state.values())) / 1e9 for kind, s in held.items()}
    rows.append(["predicted here", number, None, None, *state.values(), state["AdamW"] - state["SGD"]])
    columns = ["Qwen3-1.7B", "parameters", "AdamW bytes", "SGD bytes", "AdamW GB", "SGD GB", "saved GB"]
    note = (
        "Weights and state without gradients, in GB of 10^9 bytes: the paper says 13.6 GB by arithmetic, 15.7 measured."
    )
    return Table('The arithmetic of "Do We Need Adam?" (arXiv 2602.07729)', columns, rows, [note])


def detail(label: str, config: Mapping[str, Any], run: Run, remarks: Sequence[str]) -> list[Table]:
    """One run by owner, at every instant that may be the peak."""
    ledger = predict(config, run)
    owners = list(dict.fromkeys(o for instant in ledger.instants for o in instant.held.owners()))
    small = ledger.peak_bytes - ledger.peak.held.overhead < GIB
    unit, per = ("MiB", 2**20) if small else ("GiB", GIB)
    rows: list[list[Any]] = []
    for instant in ledger.instants:
        held = [getattr(instant.held, owner) / per for owner in owners]
        rows.append([instant.phase, instant.name, *held, instant.held.total / per])
    columns = ["phase", f"{unit} of one process", *(owner.replace("_", " ") for owner in owners), "together"]
    what = f"{count(config):,} parameters, {run.optimizer}, {run.dtype} computed in {run.compute_dtype}, "
    what += f"{run.processes} process{'es' * (run.processes > 1)}"
    peak = f"peak: {ledger.peak_bytes / per:,.2f} {unit}, {ledger.peak.name} ({ledger.peak.phase})"
    return [Table(f"{label}: {what}", columns, rows, [peak, *remarks])]


def compare(runs: Sequence[tuple[str, Mapping[str, Any], Run]]) -> list[Table]:
    """Several beside each other; savings are against the first."""
    ledgers = [predict(config, run) for _, config, run in runs]
    first = ledgers[0].peak_bytes
    lines: list[tuple[str, Callable[[int], Any]]] = [
        ("bytes a parameter", lambda k: bytes_per_parameter(*runs[k][1:])),
        ("weights GiB", lambda k: ledgers[k].peak.held.weights / GIB),
        ("gradients GiB", lambda k: ledgers[k].peak.held.gradients / GIB),
        ("optimizer state GiB", lambda k: ledgers[k].peak.held.optimizer_state / GIB),
        ("reference GiB", lambda k: ledgers[k].peak.held.reference / GIB),
        (
            "activations and logits GiB",
            lambda k: (ledgers[k].peak.held.activations + ledgers[k].peak.held.logits) / GIB,
        ),
        ("KV cache GiB", lambda k: ledgers[k].peak.held.kv_cache / GIB),
        ("rollout GiB", lambda k: ledgers[k].phase_bytes("rollout") / GIB),
        ("training GiB", lambda k: ledgers[k].phase_bytes("training") / GIB),
        ("peak GiB", lambda k: ledgers[k].peak_bytes / GIB),
        ("saved GiB", lambda k: (first - ledgers[k].peak_bytes) / GIB),
        ("saved %", lambda k: 100 * (first - ledgers[k].peak_bytes) / first),
    ]
    names = [label for label, _, _ in runs]
    rows = [[what, *(line(k) for k in range(len(runs)))] for what, line in lines]
    peaks = [f"{name}: most at {ledger.peak.name}" for name, ledger in zip(names, ledgers, strict=True)]
    return [Table("of one process, at its peak", ["", *names], rows, peaks)]
