from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from delta_strategies import chain, ints
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlvr_lightning.__main__ import main
from rlvr_lightning.delta import SparseDelta, digest_state
from rlvr_lightning.delta import codec as delta_codec
from rlvr_lightning.delta import folder as delta_folder
from rlvr_lightning.delta.file import load_delta, save_delta

SHAPES = {"a": (13, 7), "b": (5,), "c": (), "d": (0, 3), "e": (101, 3), "model.norm.weight": (9,)}


def states(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    chains = {name: chain(seed + i, shape, dtype, 0.2, 2) for i, (name, shape) in enumerate(SHAPES.items())}
    chains["e"] = [tensor.float() if dtype == torch.bfloat16 else tensor for tensor in chains["e"]]
    return tuple({name: pair[step] for name, pair in chains.items()} for step in (0, 1))


def save(folder: Path, state: dict[str, Tensor], shards: int = 1) -> Path:
    """A model's folder, with other files beside the weights."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pytorch_model.bin").write_text("the base's weights in another format")
    (folder / "sub").mkdir()
    (folder / "sub" / "tokenizer.txt").write_text("words")
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(state.items()) if i % shards == shard}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def loaded(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and ints(a[n]) == ints(b[n]) for n in a)


def delta(*arguments: object) -> int:
    return main(["delta", *map(str, arguments)])


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("file", "folder", "codec"):
        monkeypatch.setattr(f"rlvr_lightning.delta.{module}.SEGMENT", 16)


@pytest.mark.parametrize("shards", [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_diff_and_apply(tmp_path: Path, small_segments: None, shards: tuple[int, int]) -> None:
    a, b = states()
    base, tuned = save(tmp_path / "base", a, shards[0]), save(tmp_path / "tuned", b, shards[1])
    assert delta("diff", base, tuned, "--out", tmp_path / "x") == 0
    file = load_delta(tmp_path / "x")
    whole = SparseDelta.capture(a, b, digests=True)
    assert (file.base_digest, file.result_digest) == (digest_state(a), digest_state(b))
    found = file.load(a)
    assert all(torch.equal(found[n].indices, whole[n].indices) for n in whole)
    assert all(ints(found[n].values) == ints(whole[n].values) for n in whole)
    assert delta("apply", base, tmp_path / "x", "--out", tmp_path / "out" / "deeper") == 0
    out = tmp_path / "out" / "deeper"
    assert same(loaded(out), b) and same(loaded(base), a)
    names = {path.name for path in base.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "sub" / "tokenizer.txt").read_text() == "words"
    assert [path.name for path in out.parent.iterdir()] == ["deeper"]


def test_files_from_states_apply_to_folders(tmp_path: Path) -> None:
    a, b = states(1)
    a["head"], b["head"] = a["a"], b["a"]
    save_delta(tmp_path / "x", SparseDelta.capture(a, b), a)
    save_delta(tmp_path / "plain", SparseDelta.capture(a, b, digests=True))
    untied = {**a, "head": a["a"].clone()}
    for i, state in enumerate(({n: a[n] for n in a if n != "head"}, untied)):
        base = save(tmp_path / f"base{i}", state)
        for kind in ("x", "plain"):
            assert delta("apply", base, tmp_path / kind, "--out", tmp_path / f"out{i}{kind}") == 0
            assert same(loaded(tmp_path / f"out{i}{kind}"), {name: b[name] for name in state})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("b"), "'b' is in .*base, not in .*tuned; they must be saves of one architecture"),
        (lambda s: s.update(more=torch.zeros(2)), "'more' is in .*tuned, not in .*base"),
        (lambda s: s.update(b=s["b"][:3].clone()), r"'b' is \[5\] in .*base, \[3\] in .*tuned; they must be"),
        (lambda s: s.update(b=s["b"].float()), "'b' is torch.bfloat16 in .*, torch.float32 in .*tuned; save one"),
    ],
)
def test_diff_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture, change: object, message: str) -> None:
    a, b = states(2)
    change(b)
    base, tuned = save(tmp_path / "base", a), save(tmp_path / "tuned", b)
    assert delta("diff", base, tuned, "--out", tmp_path / "x") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: delta: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert delta(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: delta: ") and error.count("\n") == 1
    return error


def test_apply_refuses_a_wrong_base(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = states(3)
    base, tuned = save(tmp_path / "base", a), save(tmp_path / "tuned", b)
    assert delta("diff", base, tuned, "--out", tmp_path / "x") == 0
    other = save(tmp_path / "other", {name: a[name] for name in a if name != "e"})
    before = sorted(path.name for path in tmp_path.iterdir())
    out = ("--out", tmp_path / "out")
    assert "is not the model that" in refused(capsys, "apply", tuned, tmp_path / "x", *out)
    assert "'e' is in" in refused(capsys, "apply", other, tmp_path / "x", *out)
    assert "exists; name a new folder" in refused(capsys, "apply", base, tmp_path / "x", "--out", tuned)
    assert "no delta file" in refused(capsys, "apply", base, base / "config.json", *out)
    assert "absent" in refused(capsys, "info", tmp_path / "absent")
    assert "no folder" in refused(capsys, "diff", base, tuned, "--out", tmp_path / "no" / "x")
    (other / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-3])
    assert "is cut" in refused(capsys, "apply", other, tmp_path / "x", *out)
    (other / "model.safetensors").unlink()
    assert "has no model.safetensors nor its index" in refused(capsys, "apply", other, tmp_path / "x", *out)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_wrong_result_never_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = states(4)
    base, tuned = save(tmp_path / "base", a), save(tmp_path / "tuned", b)
    assert delta("diff", base, tuned, "--out", tmp_path / "x") == 0

    def wrong(*arguments: object) -> tuple[np.ndarray, np.ndarray]:
        positions, values = delta_codec.decode(*arguments)
        return positions[1:], values[1:]

    monkeypatch.setattr(delta_folder, "decode", wrong)
    assert delta("apply", base, tmp_path / "x", "--out", tmp_path / "out") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned", "x"]


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = states(5)
    save_delta(tmp_path / "x", SparseDelta.capture(a, b), a)
    changed = SparseDelta.capture(a, b).counts()
    assert delta("info", tmp_path / "x", "--top", 2) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["base", digest_state(a)] in lines and ["result", digest_state(b)] in lines
    kinds = {line[0]: line[1:4] for line in lines if line and line[0] in ("other", "norm")}
    assert kinds["norm"] == ["1", "9", str(changed["model.norm.weight"])]
    assert [line[0] for line in lines[-2:]] == sorted(changed, key=changed.get)[::-1][:2]
    assert delta("info", tmp_path / "x", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: row["changed"] for name, row in found["tensors"].items()} == changed
    assert found["file_bytes"] == (tmp_path / "x").stat().st_size
    save_delta(tmp_path / "none", SparseDelta.capture(a, a), a)
    assert delta("info", tmp_path / "none") == 0
    assert "0 of 409 entries, 0.0000%" in capsys.readouterr().out


def test_hub_names(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    a, b = states(6)
    cached, tuned = save(tmp_path / "cached", a), save(tmp_path / "tuned", b)

    def fetch(name: str, ignore_patterns: list[str]) -> str:
        if name != "owner/model":
            raise RuntimeError("404\nDetails")
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert delta("diff", "owner/model", tuned, "--out", tmp_path / "x") == 0
    assert load_delta(tmp_path / "x").base_digest == digest_state(a)
    assert delta("diff", "owner/none", tuned, "--out", tmp_path / "x") == 2
    assert capsys.readouterr().err == "error: delta: cannot fetch 'owner/none' from the hub: 404\n"


PEAK = """
import re, sys
import torch, tqdm
from rlvr_lightning.delta_command import main

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

base, tuned, file, out = sys.argv[1:]
for command in (["diff", base, tuned, "--out", file], ["apply", base, file, "--out", out]):
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    before = status("VmRSS")
    assert main(command) == 0
    print("peak", status("VmHWM") - before)
"""


def test_memory_stays_under_two_tensors(tmp_path: Path) -> None:
    """Of 4 tensors of 24 MiB in one file and in two shards; nothing is mapped, so resident memory counts all."""
    noise = (torch.randn(3072, 512) * 0.02).bfloat16()
    base = {f"w{i}": noise.roll(i).repeat(1, 8) for i in range(4)}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in tuned.values():
        tensor.view(torch.int16)[:, ::100] += 1
    folders = save(tmp_path / "base", base), save(tmp_path / "tuned", tuned, 2)
    paths = [str(path) for path in (*folders, tmp_path / "x", tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", PEAK, *paths], check=True, capture_output=True, text=True)
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak")]
    assert len(peaks) == 2 and max(peaks) < 2 * base["w0"].nbytes
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in loaded(tmp_path / "out").items())
