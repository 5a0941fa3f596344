"""`sparsity`: counts against loops over scalars, and what all forms of a checkpoint have to say alike."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import run as train
from test_grpo import folder  # noqa: F401 (a fixture)
from torch import Tensor

from rlvr_lightning.__main__ import main
from rlvr_lightning.analysis.sparsity import BINS, as_counts, tally
from rlvr_lightning.policy import LoRA

SHAPES = {
    "model.embed_tokens.weight": (11, 3),
    "model.layers.0.self_attn.q_proj.weight": (5, 3),
    "model.layers.0.mlp.up_proj.weight": (7, 3),
    "model.layers.0.input_layernorm.weight": (3,),
    "model.layers.1.self_attn.q_proj.weight": (5, 3),
    "model.layers.1.mlp.up_proj.weight": (7, 3),
    "model.layers.1.input_layernorm.weight": (3,),
    "model.norm.weight": (3,),
}


def states(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    moved = {
        name: torch.where(
            torch.rand(x.shape, generator=generator) < 0.4,
            x * (1 + 0.02 * torch.randn(x.shape, generator=generator)),
            x,
        )
        for name, x in base.items()
    }
    return base, {name: x.to(dtype) for name, x in moved.items()}


def save(path: Path, state: dict[str, Tensor], shards: int = 1) -> str:
    path.mkdir()
    if shards == 1:
        save_file(state, path / "model.safetensors")
        return str(path)
    weight_map = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(state)}
    for file in set(weight_map.values()):
        save_file({name: state[name] for name in state if weight_map[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return str(path)


def record(capsys: pytest.CaptureFixture, *arguments: object) -> dict:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {arguments[0]}: ") and error.count("\n") == 1
    return error


def bits32(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def naive(old: Tensor, new: Tensor) -> dict[str, int]:
    """One entry after the other, in Python's floats, for values that are finite in float32."""
    found = dict.fromkeys(["entries", "zeros", "bf16", "tol1e-5", "rel1e-3", "fp32", "flips", *BINS], 0)
    for a, b, x, y in zip(
        old.double().tolist(), new.double().tolist(), old.bfloat16().tolist(), new.bfloat16().tolist(), strict=True
    ):
        found["entries"] += 1
        found["zeros"] += a == 0
        found["fp32"] += bits32(a) != bits32(b)
        found["bf16"] += bits32(x) != bits32(y)
        found["tol1e-5"] += abs(x - y) > 1e-5
        found["rel1e-3"] += abs(a - b) > 1e-3 * max(abs(a), abs(b))
        found["flips"] += a * b < 0
        if bits32(a) != bits32(b):
            ulp = 2.0 ** (math.floor(math.log2(abs(x))) - 7) if x else 2.0**-133
            power = math.floor(math.log2(abs(b - a) / ulp)) if a else 0
            found["from zero" if a == 0 else "below 2^-16" if power < -16 else f"2^{min(power, 16)}"] += 1
    return found


def flat(row: dict) -> dict[str, int]:
    kept = {"entries": row["entries"], "zeros": row["zeros"], "flips": row["sign_flips"]}
    return kept | row["changed"] | dict.fromkeys(BINS, 0) | row["ulp_histogram"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_those_of_a_loop(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlvr_lightning.analysis.sparsity.FEW", 7)
    old = torch.randn(211) * 0.02
    new = old + torch.randn(211) * 10.0 ** torch.randint(-9, 0, (211,))
    new[::3], old[::17], new[::51] = old[::3], 0.0, 1e-4
    old, new = old.to(dtype), new.to(dtype)
    found = as_counts(tally(old, new))
    assert flat(found) == naive(old, new)
    assert found["absorbed"] == found["changed"]["fp32"] - found["changed"]["bf16"]
    assert (found["absorbed"] > 20) == (dtype == torch.float32)


def test_worked_by_hand() -> None:
    ulp = 2.0**-7  # of bf16 from 1 to 2
    old = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, -0.5, float("nan"), 1.0, 2.0])
    new = torch.tensor([1.0, 1 + ulp, 1 + ulp / 4, 1 + 3 * ulp, 1e-3, 0.5, 1.0, float("inf"), 2 - ulp])
    found = as_counts(tally(old, new))
    histogram = found["ulp_histogram"]
    # 2 - ulp is half a unit of 2's below it; -0.5 to 0.5 is 1 in units of 2**-8
    assert histogram == {"from zero": 1, "not finite": 2, "2^-2": 1, "2^-1": 1, "2^0": 1, "2^1": 1, "2^8": 1}
    assert (found["entries"], found["changed"]["fp32"], found["changed"]["bf16"], found["absorbed"]) == (9, 8, 7, 1)
    assert (found["zeros"], found["changed_zeros"]["fp32"], found["sign_flips"]) == (1, 1, 1)
    assert (found["changed_frac"]["bf16"], found["absorbed_frac"]) == (7 / 9, 1 / 8)
    assert as_counts(tally(old, old))["absorbed_frac"] is None


def test_groups_add_up(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = states()
    found = record(capsys, "sparsity", save(tmp_path / "a", a), save(tmp_path / "b", b, shards=3))
    everything = naive(torch.cat([a[n].view(-1) for n in SHAPES]), torch.cat([b[n].view(-1) for n in SHAPES]))
    assert flat(found["parts"]["all"]) == everything
    for grouping in ("kinds", "layers", "by_tensor"):
        rows = [flat(row) for row in found[grouping].values()]
        assert {key: sum(row[key] for row in rows) for key in everything} == everything
    assert list(found["layers"]) == ["0", "1", "none"]
    assert set(found["kinds"]) == {"attention q_proj", "embedding", "mlp up_proj", "norm"}
    assert found["parts"]["norms"] == found["kinds"]["norm"] and found["parts"]["norms"]["entries"] == 9
    assert found["entries"] == found["parts"]["norms"]["entries"] + found["parts"]["all but norms"]["entries"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_forms_say_the_same(folder, tmp_path: Path, dtype: str, capsys) -> None:  # noqa: F811
    """Delta checkpoints, Lightning's own, steps of a run, exported folders, delta files."""
    for kind in ("delta", "whole"):
        train(folder, tmp_path / kind, kind == "delta", dtype=dtype, compute_dtype=dtype)
    for step in ("2", "4"):
        assert main(["export", str(tmp_path / "delta"), "--out", str(tmp_path / step), "--step", step]) == 0
    start = load_file(Path(folder) / "model.safetensors")
    base = save(tmp_path / "base", {name: x.to(getattr(torch, dtype)) for name, x in start.items()})
    assert main(["delta", "diff", base, str(tmp_path / "4"), "--out", str(tmp_path / "x")]) == 0
    checkpoints = sorted((tmp_path / "whole").rglob("*step=4*.ckpt"))
    forms = [tmp_path / "delta", f"{tmp_path}/whole@4", checkpoints[0], tmp_path / "4", tmp_path / "x"]
    found = [record(capsys, "sparsity", base, form) for form in forms]
    assert found[0]["parts"]["all"]["changed"]["bf16"] > 0
    assert all(one["by_tensor"] == found[0]["by_tensor"] for one in found)
    between = record(capsys, "sparsity", tmp_path / "2", f"{tmp_path}/delta@4")
    assert between == record(capsys, "sparsity", f"{tmp_path}/whole@2", tmp_path / "4") | {"models": between["models"]}
    assert between["parts"]["all"]["changed"]["fp32"] > 0
    error = refused(capsys, "sparsity", base, f"{tmp_path}/delta@3")
    assert error == "error: sparsity: TUNED: step 3 was not kept; these were: 2, 4\n"
    assert "write RUN@40 for step 40" in refused(capsys, "sparsity", base, f"{tmp_path}/delta@x")


def test_what_a_run_cannot_be_read_from(folder, tmp_path: Path, capsys) -> None:  # noqa: F811
    train(folder, tmp_path / "lora", dtype="float32", compute_dtype="float32", lora=LoRA(rank=2))
    assert "holds adapters; give what this writes:" in refused(capsys, "sparsity", folder, tmp_path / "lora")
    moved = tmp_path / "moved"
    save(moved, load_file(Path(folder) / "model.safetensors"))
    for file in Path(folder).glob("*.json"):
        (moved / file.name).write_bytes(file.read_bytes())
    train(str(moved), tmp_path / "run")
    state = load_file(moved / "model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, moved / "model.safetensors")
    assert "whose folder has other weights or names" in refused(capsys, "sparsity", folder, tmp_path / "run")


def test_resized_and_tied(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = states()
    embedding = "model.embed_tokens.weight"
    expected = record(capsys, "sparsity", save(tmp_path / "a", a), save(tmp_path / "b", b))
    more = {**b, embedding: torch.cat([b[embedding], torch.ones(2, 3).bfloat16()])}
    for first, second, owner in ((a, more, "c"), (more, a, "d")):
        paths = [save(tmp_path / f"{owner}{i}", state) for i, state in enumerate((first, second))]
        found = record(capsys, "sparsity", *paths)
        rest = {"tensor": embedding, "model": paths[owner == "c"], "entries": 6, "reason": "rows that only it has"}
        assert found["left_out"] == [rest]
        assert found["parts"]["all"]["changed"]["bf16"] == expected["parts"]["all"]["changed"]["bf16"]
    assert main(["sparsity", *paths]) == 0
    assert f"left out: 6 entries of {embedding}" in capsys.readouterr().out
    heads = [{**state, "lm_head.weight": state[embedding].clone()} for state in (a, b)]
    tied = save(tmp_path / "tied_a", heads[0]), save(tmp_path / "tied_b", heads[1])
    found = record(capsys, "sparsity", *tied)
    assert found["tied"] == {"lm_head.weight": embedding}
    assert found["parts"] == expected["parts"]
    untied = save(tmp_path / "untied", {**heads[1], "lm_head.weight": a[embedding]})
    assert record(capsys, "sparsity", tied[0], untied)["entries"] == expected["entries"] + 33
    found = record(capsys, "sparsity", tmp_path / "a", tied[1])
    assert [(one["tensor"], one["entries"], one["reason"]) for one in found["left_out"]] == [
        ("lm_head.weight", 33, "only there")
    ]


def test_dtypes_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = states(torch.float32)
    half = {name: x.bfloat16() for name, x in a.items()}
    paths = [save(tmp_path / "half", half), save(tmp_path / "b", b)]
    found = record(capsys, "sparsity", *paths)
    whole = torch.cat([half[n].float().view(-1) for n in SHAPES]), torch.cat([b[n].view(-1) for n in SHAPES])
    assert flat(found["parts"]["all"]) == naive(*whole)
    assert found["dtypes"] == ["bfloat16", "float32"]
    assert main(["sparsity", *paths]) == 0
    assert "dtypes differ: compared in the wider one" in capsys.readouterr().out
    quantised = {**a, "model.layers.0.mlp.up_proj.weight": torch.ones(7, 3, dtype=torch.int8)}
    left = record(capsys, "sparsity", paths[1], save(tmp_path / "q", quantised))["left_out"]
    assert [(one["entries"], one["reason"]) for one in left] == [(21, "torch.int8, no weights")]


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = states()
    base, other = save(tmp_path / "a", a), states(seed=5)[0]
    name = "model.layers.1.mlp.up_proj.weight"

    def error(change: dict[str, Tensor | None], shards: int = 1) -> str:
        path = tmp_path / f"bad{len(list(tmp_path.iterdir()))}"
        save(path, {n: x for n, x in {**b, **change}.items() if x is not None}, shards)
        return refused(capsys, "sparsity", base, path)

    assert "is in" in error({name: None}) and "a shard is missing" in error({name: None})
    assert "different architectures" in error({name: torch.zeros(7, 4)})
    assert "different architectures" in error({name: torch.zeros(8, 3)})
    assert "different architectures" in error({"model.layers.2.mlp.up_proj.weight": torch.zeros(7, 3)})
    assert "no tensor in common" in refused(capsys, "sparsity", base, save(tmp_path / "n", {"w": torch.zeros(2)}))
    gone = save(tmp_path / "gone", b, shards=2)
    (Path(gone) / "model-1.safetensors").unlink()
    assert "TUNED: " in refused(capsys, "sparsity", base, gone)
    assert "has no file 'model-1.safetensors', which its index names" in refused(capsys, "sparsity", base, gone)
    assert "TUNED: no folder './none'" in refused(capsys, "sparsity", base, "./none")
    assert "no folder" in refused(capsys, "sparsity", base, base, "--json", tmp_path / "no" / "x.json")
    assert "must end in .png" in refused(capsys, "sparsity", base, base, "--plot", tmp_path / "x.txt")
    (tmp_path / "empty").mkdir()
    assert "has no model.safetensors" in refused(capsys, "sparsity", base, tmp_path / "empty")
    tuned = save(tmp_path / "b", b)
    assert main(["delta", "diff", base, tuned, "--out", str(tmp_path / "x")]) == 0
    message = refused(capsys, "sparsity", save(tmp_path / "other", other), tmp_path / "x")
    assert "is a delta from another model" in message
    assert "a delta only of what comes after it" in refused(capsys, "sparsity", tmp_path / "x", tuned)
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    assert "is no delta file, truncated or altered" in refused(capsys, "sparsity", base, tmp_path / "x")


def test_an_empty_delta(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = states()
    base, tuned = save(tmp_path / "a", a), save(tmp_path / "b", b)
    assert main(["delta", "diff", base, base, "--out", str(tmp_path / "x")]) == 0
    assert main(["sparsity", base, str(tmp_path / "x")]) == 0
    assert "nothing differs: the two are the same model, bit for bit" in capsys.readouterr().out
    assert "the change has no rank" in refused(capsys, "rank", base, tmp_path / "x")
    assert "no spectrum moved" in refused(capsys, "spectrum", base, tmp_path / "x")
    message = refused(capsys, "overlap", tuned, tmp_path / "x", "--base", base)
    assert f"B: {tmp_path / 'x'} changes no entry of {base}" in message


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = states()
    paths = [save(tmp_path / "a", a), save(tmp_path / "b", b)]
    plot, numbers = tmp_path / "x.png", tmp_path / "x.json"
    assert main(["sparsity", *paths, "--plot", str(plot), "--json", str(numbers)]) == 0
    row = json.loads(numbers.read_text())["parts"]["all"]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = next(line for line in lines if line[:1] == ["all"])
    assert shown[1] == str(row["entries"]) and float(shown[2]) == pytest.approx(100 * row["changed_frac"]["bf16"], 0.01)
    assert plot.read_bytes()[:4] == b"\x89PNG"


LIGHT = """
import sys
from rlvr_lightning.__main__ import main
assert main(["sparsity", *sys.argv[1:]]) == 0
assert not {"lightning", "transformers", "matplotlib"} & set(sys.modules), "loaded for nothing"
"""


def test_folders_are_compared_without_heavy_imports(tmp_path: Path) -> None:
    a, b = states()
    paths = [save(tmp_path / "a", a), save(tmp_path / "b", b)]
    subprocess.run([sys.executable, "-c", LIGHT, *paths], check=True, capture_output=True)


PEAK = """
import json, re, sys
import torch, tqdm, rich.table
from rlvr_lightning.analysis.sparsity_command import main

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
assert main([*sys.argv[1:3], "--json", sys.argv[3]]) == 0
print("peak", status("VmHWM") - before)
"""


def test_memory_stays_under_three_tensors(tmp_path: Path) -> None:
    """Of 2 tensors of 24 MiB, with few entries changed in one and all of them in the other."""
    noise = (torch.randn(3072, 512) * 0.02).bfloat16()
    base = {f"w{i}": noise.roll(i).repeat(1, 8) for i in range(2)}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["w0"].view(torch.int16).view(-1)[::100] += 1
    tuned["w1"].view(torch.int16).add_(1)
    paths = [save(tmp_path / "a", base), save(tmp_path / "b", tuned), str(tmp_path / "x.json")]
    done = subprocess.run([sys.executable, "-c", PEAK, *paths], check=True, capture_output=True, text=True)
    assert int(done.stdout.split()[-1]) < 3 * base["w0"].nbytes
    changed = json.loads((tmp_path / "x.json").read_text())["by_tensor"]
    entries = base["w0"].numel()
    assert [changed[name]["changed"]["bf16"] for name in base] == [-(-entries // 100), entries]
