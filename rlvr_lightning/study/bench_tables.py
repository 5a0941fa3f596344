"""Blocks of a README from the records of benchmarks, `results/*.json`.

<!-- bench -->                speed and memory against others
<!-- bench memory_cpu -->     bytes of a step by owner (`profiling/bench_memory.py`)
<!-- bench delta -->          bytes of an update's file (`profiling/bench_delta.py`)
<!-- bench checkpoints -->    bytes of a checkpoint (`profiling/bench_checkpoint.py`)
<!-- bench scaling -->        bytes of each process by owner (`profiling/bench_scaling.py`)
<!-- bench traffic -->        bytes that a process receives in a step, counted and in closed form
<!-- bench traffic_models --> the same in closed form for larger models
<!-- bench errors -->         predicted and simulated memory against counted (`profiling/errors.py`)
<!-- bench sparsity -->       comparing two models against loading both (`profiling/bench_sparsity.py`)
<!-- bench curvature -->       largest eigenvalues of the Hessian at the start (`curvature`), of all `curvature_*.json`
<!-- bench same_numbers -->   runs in several processes against the same in one (`tests/test_strategy.py`)
<!-- bench sandbox -->        programs a second under the code reward (`profiling/bench_sandbox.py`)
<!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlvr_lightning.study.tables import gib, markdown

BLOCK = re.compile(r"(<!-- bench(?P<what>[ \w]*) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADING = ["measured", "here", "peer", "ratio", "command"]


def shown(record: dict[str, Any]) -> str:
    """The command that measures it again, without what all of them begin with."""
    return f"`{record['command'].removeprefix('python -m rlvr_lightning.')}`"


def rollout_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    """Of a record of `profiling/bench_rollout.py`."""
    speed = record["median_tokens_per_s"]
    what = f"tokens/s, engine against `model.generate`, {record['model']}"
    yield [what, f"{speed['engine']:,.0f}", f"{speed['generate']:,.0f}", f"{record['ratio']:.2f}", shown(record)]


def trl_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    """Of a record of `profiling/bench_trl.py`."""
    ours, trl, ratio = record["median"]["ours"], record["median"]["trl"], record["ratio"]
    model = f"{record['model']}, prompts of {record['plan']['prompt_tokens']:.0f} tokens"
    parts = {"step_s": "a step", "generate_s": "of it generating", "train_s": "of it forward and backward"}
    for key, label in parts.items():
        if key in ours and key in trl:
            what = f"seconds, {label}, against TRL, {model}"
            yield [what, f"{ours[key]:.2f}", f"{trl[key]:.2f}", f"{ours[key] / trl[key]:.2f}", shown(record)]
    peaks = [gib(side["peak_bytes"]) for side in (ours, trl)]
    what = f"GiB, peak of the process, against TRL, {model}"
    yield [what, *peaks, f"{ratio['peak_bytes']:.2f}", shown(record)]


def bench_table(results: Path) -> str:
    """All comparisons with others as one Markdown table."""
    rows = [HEADING]
    for pattern, make in (("bench_rollout_*.json", rollout_rows), ("bench_trl_*.json", trl_rows)):
        for path in sorted(results.glob(pattern)):
            rows += make(json.loads(path.read_text()))
    return markdown(rows)


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f}"


def memory_table(record: dict[str, Any]) -> str:
    """Of a record of `profiling/bench_memory.py`: MiB by owner at the worst moment, and bytes a parameter."""
    from rlvr_lightning.profiling.bench_memory import MODES

    owners = {"weights": "weights", "optimizer state": "optimizer state", "gradients": "gradients"}
    owners |= {"reference": "reference", "activations": "activations"}
    rows = [
        [
            "model",
            "mode",
            *owners.values(),
            "process above interpreter",
            "bytes/parameter: counted",
            "process",
            "training s",
        ]
    ]
    for row in record["rows"]:
        measured, counted = row["measured"], row["counted"]
        mode = MODES[row["mode"]]
        if "counted_bytes_per_parameter" not in row:
            rows.append([row["model"], mode, f"failed: {measured.get('failed') or counted.get('failed')}", *[""] * 8])
            continue
        held = [_mib(counted["owners_bytes"].get(owner, 0)) for owner in owners]
        process = _mib(measured["peak_bytes"] - measured["interpreter_bytes"])
        per = [f"{row[f'{kind}_bytes_per_parameter']:.2f}" for kind in ("counted", "measured")]
        rows.append([row["model"], mode, *held, process, *per, f"{measured['train_s']:.1f}"])
    return markdown(rows)


def delta_table(record: dict[str, Any]) -> str:
    """Of the record of `profiling/bench_delta.py`: what one SGD step of SmolLM2 takes as a file."""
    rows = [
        ["SGD step", "changed", "file bytes", "bytes/entry", "bound, uniform", "bound, by exponent", "save s", "load s"]
    ]
    for name, step in record["steps"].items():
        bound = step["bound_bytes_per_changed"]
        rows.append(
            [
                f"{name}, rate {step['lr']:.1e}",
                f"{100 * step['density']:.3f} %",
                f"{step['file_bytes']:,}",
                f"{step['file_bytes_per_changed']:.2f}",
                f"{bound['uniform']:.2f}",
                f"{bound['exponent']:.2f}",
                f"{step['file_save_s']:.2f}",
                f"{step['file_load_s']:.2f}",
            ]
        )
    return markdown(rows)


def checkpoint_table(record: dict[str, Any]) -> str:
    """Of the record of `profiling/bench_checkpoint.py`: a checkpoint of ours and an ordinary one."""
    rows = [["model", "optimizer", "steps", "entries changed", "delta checkpoint bytes", "ordinary", "ratio"]]
    for row in record["rows"]:
        changed = f"{row['entries']['changed'] / row['parameters']:.2%}" if row["entries"]["in_base"] else "kept whole"
        sizes = [f"{row[kind]['bytes']:,}" for kind in ("delta", "ordinary")]
        rows.append([row["model"], row["mode"], str(row["steps"]), changed, *sizes, f"{row['ratio']:.1f}"])
    return markdown(rows)


OWNERS = {  # what a process holds: mode of `profiling/bench_scaling.py` and owner it is read from
    "weights, bf16; gradients, a copy as reference, low halves of a split master: each the same again": (
        "SGD, split master",
        "weights",
    ),
    "weights, fp32; gradients, a copy as reference: each the same again": ("SGD, fp32 weights", "weights"),
    "AdamW's state, bf16 weights": ("AdamW, bf16 weights", "optimizer state"),
    "AdamW's state, fp32 weights": ("AdamW, fp32 weights", "optimizer state"),
    "SGD's state, fp32 weights": ("SGD, fp32 weights", "optimizer state"),
    "at once in training: whole layers, bf16": ("SGD, split master", "gathered, training"),
    "at once in a rollout `once`: whole model, bf16": ("SGD, split master", "gathered, rollout"),
    "at once in a backward pass: gradients of whole layers": ("SGD, split master", "gradients before reduction"),
}


def scaling_table(record: dict[str, Any]) -> str:
    """Of the record of `profiling/bench_scaling.py`: MiB of the process with most, by owner and number of processes."""
    found = {
        (row["model"], row["mode"], row["processes"], owner): size
        for row in record["memory"]
        for owner, size in row["bytes"].items()
    }
    counts = sorted({row["processes"] for row in record["memory"]})
    rows = [["model", "MiB of a process", *map(str, counts), f"1 to {counts[-1]}, of 1/{counts[-1]}"]]
    for model in dict.fromkeys(row["model"] for row in record["memory"]):
        for name, (mode, owner) in OWNERS.items():
            sizes = [found.get((model, mode, count, owner)) for count in counts]
            first, last = sizes[0], sizes[-1]
            ratio = f"{last * counts[-1] / first:.2f}" if first and last else "-"
            cells = ["-" if size is None else f"{size / 2**20:,.3f}" for size in sizes]
            rows.append([model, name, *cells, ratio])
    return markdown(rows)


def traffic_table(record: dict[str, Any]) -> str:
    """Of the same record: MiB received by a process in one step of the tiny model, both optimizers side by side."""
    rows = [["shards x replicas", "weights", "reduced in", "rollout", "SGD", "AdamW", "closed form", "control bytes"]]
    groups: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for row in record["traffic"]:
        shards = row["processes"] // row["replicate"]
        key = (f"{shards} x {row['replicate']}", row["weights"], row["reduce"], row["rollout"])
        groups.setdefault(key, {})[row["optimizer"]] = row
    for key, pair in groups.items():
        counted = {name: dict(row["traffic_bytes"]) for name, row in pair.items()}
        control = "{:,} and {:,}".format(*(counted[name].pop("control") for name in ("sgd", "adamw")))
        sums = [sum(parts.values()) for parts in (counted["sgd"], counted["adamw"])]
        closed = sum(pair["sgd"]["closed_form_bytes"].values())
        rows.append([*key, *(f"{size / 2**20:,.4f}" for size in (*sums, closed)), control])
    return markdown(rows)


def traffic_models_table(record: dict[str, Any]) -> str:
    """Of the same record: GiB received by a process in one step of larger models, by the closed form; bf16 compute."""
    parts = ["weights, rollout", "weights, forward", "weights, backward", "gradients"]
    rows = [["model", "processes", "gathered in", "reduced in", *parts, "sum"]]
    for row in record["predicted_traffic"]:
        if row["compute"] != "bfloat16":
            continue
        sizes = [row["closed_form_bytes"][part] for part in parts]
        cells = [f"{size / 2**30:,.2f}" for size in (*sizes, sum(sizes))]
        rows.append([row["model"], str(row["processes"]), row["compute"], row["reduce"], *cells])
    return markdown(rows)


def curvature_table(results: Path) -> str:
    """Of the records of `curvature --json`: eigenvalues, within their residuals."""
    rows = [["config", "loss", "gradient norm", "largest eigenvalues", "each within"]]
    for path in sorted(results.glob("curvature_*.json")):
        record = json.loads(path.read_text())
        values = ", ".join(f"{one['value']:.2f}" for one in record["eigenvalues"])
        within = max(one["residual"] for one in record["eigenvalues"])
        loss = [f"{record[name]:.3f}" for name in ("loss", "grad_norm")]
        rows.append([f"`{record['config']}`", *loss, values, f"{within:.1g}"])
    return markdown(rows)


def same_numbers_table(record: dict[str, Any]) -> str:
    """Of `results/same_numbers.json`: how far the weights of each run are from those of the run in one process."""
    worlds = list(record["processes"])
    rows = [["run", *(f"{world} processes" for world in worlds)]]
    for name in record["processes"]["2"]:
        cells = []
        for case in (record["processes"][world].get(name) for world in worlds):
            if case is None:
                cells.append("-")
            elif case["steps_with_same_completions"] < record["steps"]:
                cells.append(f"same completions for {case['steps_with_same_completions']} steps")
            elif case["entries_differing"]:
                cells.append(f"{case['update_difference_frac']:.0e}, {case['entries_differing']:,.0f} entries")
            else:
                cells.append("the same bits")
        rows.append([name, *cells])
    return markdown(rows)


def errors_table(record: dict[str, Any]) -> str:
    """Of the record of `profiling/errors.py`: the peak of a step, and how far from it prediction and simulation are."""
    exact = ("weights", "gradients", "optimizer_state")
    rows = [["model", "optimizer", "layers", "peak MiB, counted", "predicted", "simulated"]]
    rows[0].append(", ".join(exact).replace("_", " ") + ": MiB predicted")
    for row in record["rows"]:
        errors = [f"{100 * row['error'][what]:+.1f} %" for what in ("predicted", "simulated")]
        pairs = [row["exact"][owner] for owner in exact]
        sizes = " + ".join(_mib(predicted) for predicted, _ in pairs)
        same = "exact" if all(predicted == counted for predicted, counted in pairs) else "OFF"
        layers = "recomputed" if row["recomputed"] else "kept"
        peak = _mib(row["peak_bytes"]["measured"])
        rows.append([row["model"], row["mode"], layers, peak, *errors, f"{sizes}, {same}"])
    return markdown(rows)


def sandbox_table(record: dict[str, Any]) -> str:
    """Of the record of `profiling/bench_sandbox.py`: judged programs a second, and against unprotected ones."""
    from rlvr_lightning.profiling.bench_sandbox import LABELS

    speeds, ratios = record["median_runs_per_s"], record["median_ratio_to_plain"]
    rows = [["programs run", "a second", "of unprotected"]]
    return markdown([*rows, *([label, f"{speeds[key]:.0f}", f"{ratios[key]:.2f}"] for key, label in LABELS.items())])


def vllm_table(record: dict[str, Any]) -> str:
    """Of the record of `profiling/bench_vllm.py`: tokens a second of each engine, and what a sync takes."""
    rows = [
        ["model", "engine", "tokens a second", "of embedded", "start s", "all weights: MiB", "ms", "entries: MiB", "ms"]
    ]
    for row in record["rows"]:
        speeds = row["median_tokens_per_s"]
        for side, speed in speeds.items():
            cells = [
                row["model"],
                side,
                f"{speed:,.0f}",
                f"{speed / speeds['embedded']:.2f}",
                f"{row['start_s'][side]:.0f}",
            ]
            for kind in ("dense", "sparse"):
                sync = row["sync"].get(side, {}).get(kind)
                cells += [_mib(sync["bytes"]), f"{1000 * sync['seconds']:.0f}"] if sync else ["", ""]
            rows.append(cells)
    return markdown(rows)


def sparsity_table(record: dict[str, Any]) -> str:
    """Of the record of `profiling/bench_sparsity.py`: comparing two models, streamed and loaded."""
    sides = {"ours": "`sparsity`", "four": "transformers, four definitions", "one": "transformers, one definition"}
    rows = [["model", "compared by", "seconds", "peak MiB", "above libraries, MiB", "seconds / ours", "peak / ours"]]
    for row in record["rows"]:
        for side, label in sides.items():
            found, ratio = row["median"][side], row["ratio"].get(side)
            sizes = [_mib(found[key]) for key in ("peak_bytes", "above_libraries_bytes")]
            more = [f"{ratio[key]:.1f}" for key in ("seconds", "peak_bytes")] if ratio else ["", ""]
            rows.append([row["model"], label, f"{found['seconds']:.1f}", *sizes, *more])
    return markdown(rows)


def _table(what: str, results: Path) -> str:
    """The table of one block."""
    if not what:
        return bench_table(results)
    makers = {
        "delta": ("bench_delta.json", delta_table),
        "vllm": ("bench_vllm.json", vllm_table),
        "checkpoints": ("checkpoint_bytes.json", checkpoint_table),
        "scaling": ("bench_scaling.json", scaling_table),
        "traffic": ("bench_scaling.json", traffic_table),
        "traffic_models": ("bench_scaling.json", traffic_models_table),
        "errors": ("profile_errors.json", errors_table),
        "sparsity": ("bench_sparsity.json", sparsity_table),
        "same_numbers": ("same_numbers.json", same_numbers_table),
        "sandbox": ("bench_sandbox.json", sandbox_table),
    }
    if what == "curvature":
        return curvature_table(results)
    file, make = makers.get(what, (f"bench_{what}.json", memory_table))
    return make(json.loads((results / file).read_text()))


def fill_bench(text: str, results: Path) -> str:
    """A Markdown text with its benchmark blocks rendered from the records.

    Raises:
        ValueError: there is a block and no record for it.
    """

    def fill(block: re.Match[str]) -> str:
        what = block["what"].strip()
        try:
            table = _table(what, results)
        except FileNotFoundError as error:
            raise ValueError(f"the bench block {what!r}: no {error.filename}; run its benchmark") from None
        return f"{block[1]}{table}\n{block[3]}"

    if BLOCK.search(text) and not list(results.glob("bench_*.json")):
        raise ValueError(f"the bench block: no records in {results}; run rlvr_lightning.profiling.bench_rollout")
    return BLOCK.sub(fill, text)
