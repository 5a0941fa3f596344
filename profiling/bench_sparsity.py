"""`sparsity` against loading both models with transformers and comparing them: bytes and seconds.

    python -m rlvr_lightning.profiling.bench_sparsity --models smollm2-135m qwen3-0.6b

Models are well-known shapes with random bf16 weights; in the tuned one a hundredth of the entries, drawn at random, are
a few units in the last place away. Every run is a process of its own, from the start of Python to its end, the three in
turn, with files in the page cache and one thread:

    ours            `rlvr_lightning sparsity BASE TUNED --json -`: all that it counts
    four            transformers loads both; four definitions, one expression of torch each, parameter by parameter
    one             the same with one definition, |a - b| > 1e-5

Bytes are the kernel's high-water mark of resident memory; `above libraries` are those less what the same process held
with its libraries imported and no model read. All must count the same entries. `seconds` are wall time, which other
processes stretch (the load before it is in the record), `cpu_seconds` what the process used, from its start.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMAND = "python -m rlvr_lightning.profiling.bench_sparsity"
MEMORY = """
import re, sys
def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
"""
OURS = """
import contextlib, io, json
import torch, tqdm, rlvr_lightning.analysis.sparsity_command
libraries = status("VmRSS")
from rlvr_lightning.__main__ import main
with contextlib.redirect_stdout(io.StringIO()) as out:
    assert main(["sparsity", *sys.argv[1:3], "--json", "-"]) == 0
counts = json.loads(out.getvalue())["parts"]["all"]["changed"]
"""
THEIRS = """
import json
import torch
from transformers import AutoModelForCausalLM
from transformers.models.%(kind)s import modeling_%(kind)s
libraries = status("VmRSS")
base, tuned = (AutoModelForCausalLM.from_pretrained(name, dtype="auto") for name in sys.argv[1:3])
counts = dict.fromkeys(%(definitions)r, 0)
with torch.no_grad():
    for a, b in zip(base.parameters(), tuned.parameters()):
        %(compare)s
"""
ONE = """counts["tol1e-5"] += int(((a.float() - b.float()).abs() > 1e-5).sum())"""
FOUR = """x, y = a.float(), b.float()
        distance = (x - y).abs()
        counts["bf16"] += int((a.bfloat16() != b.bfloat16()).sum())
        counts["tol1e-5"] += int((distance > 1e-5).sum())
        counts["rel1e-3"] += int((distance > 1e-3 * torch.maximum(x.abs(), y.abs())).sum())
        counts["fp32"] += int((a != b).sum())"""
PRINT = """
import resource
used = resource.getrusage(resource.RUSAGE_SELF)
cpu = {"cpu_seconds": used.ru_utime + used.ru_stime}
print(json.dumps({"peak_bytes": status("VmHWM"), "libraries_bytes": libraries, **cpu, "changed": counts}))
"""


def programs(kind: str) -> dict[str, str]:
    """The processes, for an architecture."""
    four = {"kind": kind, "definitions": ["bf16", "tol1e-5", "rel1e-3", "fp32"], "compare": FOUR}
    one = {"kind": kind, "definitions": ["tol1e-5"], "compare": ONE}
    return {
        name: MEMORY + body + PRINT for name, body in (("ours", OURS), ("four", THEIRS % four), ("one", THEIRS % one))
    }


def make_models(name: str, folder: Path, density: float) -> tuple[Path, Path, int]:
    """Folders of a random model and of one that differs from it; and how many entries they have."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlvr_lightning.profiling.find_model import find_model

    config, _ = find_model(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1).view(torch.int16)
            where = torch.randint(len(flat), (round(density * len(flat)),))
            flat[where] += torch.randint(1, 4, (len(where),), dtype=torch.int16)
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned", sum(p.numel() for p in model.parameters())


def measure(program: str, folders: Sequence[Path]) -> dict[str, Any]:
    """One process."""
    command = [sys.executable, "-c", program, *map(str, folders)]
    start = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return {"seconds": time.perf_counter() - start, **json.loads(done.stdout.splitlines()[-1])}


def compare(name: str, density: float, repeats: int) -> dict[str, Any]:
    """All processes in turn; medians, and how often less ours takes."""
    from rlvr_lightning.profiling.find_model import find_model

    found: dict[str, list[dict[str, Any]]] = {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        base, tuned, parameters = make_models(name, Path(temporary), density)
        for turn in range(repeats + 1):
            for side, program in programs(find_model(name)[0]["model_type"]).items():
                one = measure(program, (base, tuned))
                if turn:  # the first is for the page cache
                    found.setdefault(side, []).append(one)
    counts = [run["changed"] for runs in found.values() for run in runs]
    if any(one[key] != counts[0][key] for one in counts for key in one):
        raise ValueError(f"they count differently: {counts}")
    median = {
        side: {key: statistics.median(run[key] for run in runs) for key in MEDIANS} for side, runs in found.items()
    }
    for row in median.values():
        row["above_libraries_bytes"] = row["peak_bytes"] - row["libraries_bytes"]
    ratio = {side: {key: median[side][key] / median["ours"][key] for key in RATIOS} for side in ("four", "one")}
    return {
        "model": name,
        "load_average": load,
        "parameters": parameters,
        "changed": counts[0],
        "median": median,
        "ratio": ratio,
        "runs": found,
    }


MEDIANS = ("seconds", "cpu_seconds", "peak_bytes", "libraries_bytes")
RATIOS = ("seconds", "cpu_seconds", "peak_bytes", "above_libraries_bytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and keep a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "qwen3-0.6b"])
    parser.add_argument("--density", type=float, default=0.01, help="share of the entries that differ")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/bench_sparsity.json"))
    options = parser.parse_args(argv)
    import torch
    import transformers

    record: dict[str, Any] = {
        "command": f"{COMMAND} --models {' '.join(options.models)} --repeats {options.repeats}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": platform.platform(),
        "rows": [],
    }
    for name in options.models:
        row = compare(name, options.density, options.repeats)
        record["rows"].append(row)
        for side, ratio in row["ratio"].items():
            print(name, side, ", ".join(f"{key} / ours {value:.2f}" for key, value in ratio.items()), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
