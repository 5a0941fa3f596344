"""Checkpoints of several processes: resumed bit for bit, whatever they are written as and by how many they are read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_ranks import CASES, RUNS, main, place
from conftest import tiny_causal_lm
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from test_checkpoint_file import Evil
from transformers import AutoModelForCausalLM

from rlvr_lightning.__main__ import main as export
from rlvr_lightning.checkpoint import DeltaCheckpointIO, check_readable, dcp
from rlvr_lightning.checkpoint.file import metadata_of, sweep, temporary_name
from rlvr_lightning.checkpoint.folder import read_manifest, remove_whole
from rlvr_lightning.checkpoint.io import source
from rlvr_lightning.delta.digest import digest_state
from rlvr_lightning.policy import TINY, load_tokenizer
from rlvr_lightning.strategy import Sharded

FEW = ["split", "tied", "tensor", "replicated"]
FEWER = ["split", "tensor"]  # by four processes


def ranks(count: int, root: Path, *arguments: str) -> dict:
    """What the worker finds in so many processes."""
    worker = str(Path(__file__).with_name("checkpoint_ranks.py"))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", worker]
    done = subprocess.run(
        [*start, str(root / "split"), str(root), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((root / f"{arguments[0]} {count}.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    tokenizer = load_tokenizer(str(TINY))
    for name in ("split", "tied"):
        more = {"eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": name == "tied"}
        tiny_causal_lm("qwen3", vocab_size=len(tokenizer), **more).save_pretrained(path / name)
        for file in TINY.glob("tokenizer*"):
            shutil.copy(file, path / name)
    return path


@pytest.fixture(scope="module")
def by_two(root: Path) -> dict:
    return ranks(2, root, "save", *FEW)


def goes_on(two: dict, cases: list[str]) -> None:
    """Runs resumed by two processes ended as those that were not interrupted."""
    for name, form in RUNS:
        if name in cases:
            whole, resumed = two[f"{name} {form}"], two[f"{name} {form} again"]
            assert whole[1] == resumed[1], (name, form)
            assert resumed[0] != resumed[1], (name, form)


def all_there(found: dict, one: dict, two: dict, cases: list[str]) -> None:
    """What was loaded is what one process, or two, had saved."""
    assert len(found) == 2 * sum(name in cases for name, _ in RUNS) + 1
    for run, start in found.items():
        name, form, world, *_ = run.split()
        assert start == {"1": one, "2": two}[world][f"{name} {form} again"][0], run


def test_saved_by_one_or_two_processes_resumed_by_any_number(root: Path, by_two: dict) -> None:
    goes_on(by_two, FEW)
    by_one = main(str(root / "split"), root, "save", FEW)
    all_there(main(str(root / "split"), root, "load", FEW), by_one, by_two, FEW)
    all_there(ranks(4, root, "load", *FEWER), by_one, by_two, FEWER)


@pytest.mark.slow
def test_so_are_all_optimizers(root: Path) -> None:
    everything = list(CASES)
    by_two = ranks(2, root, "save", *everything)
    goes_on(by_two, everything)
    by_one = main(str(root / "split"), root, "save", everything)
    all_there(main(str(root / "split"), root, "load", everything), by_one, by_two, everything)
    all_there(ranks(4, root, "load", *everything), by_one, by_two, everything)


@pytest.fixture
def saved(root: Path, by_two: dict, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of a checkpoint of two processes."""
    path = tmp_path / "a.ckpt"
    shutil.copytree(place(root, "split", request.param, 2) / "ckpt/step=2.ckpt", path)
    return path


@pytest.mark.parametrize("saved", ["sharded", "delta"], indirect=True)
def test_damage_to_any_file_is_found(saved: Path) -> None:
    source(saved)
    for file in sorted(saved.iterdir()):
        content = file.read_bytes()
        for damaged in (content[:-1], b"", bytes([content[0] ^ 1]) + content[1:], None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(
                ValueError, match=r"a.ckpt.* (is truncated or altered|is not whole|is missing)"
            ) as error:
                source(saved)
            assert "\n" not in str(error.value)
        file.write_bytes(content)
    source(saved)


@pytest.mark.parametrize("saved", ["delta"], indirect=True)
def test_files_of_two_checkpoints_do_not_mix(saved: Path, root: Path) -> None:
    other = place(root, "split", "delta", 2) / "ckpt/step=4.ckpt"
    shutil.copy(other / "shard-00001.safetensors", saved)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is of another checkpoint"):
        source(saved)


@pytest.mark.parametrize("saved", ["sharded"], indirect=True)
def test_an_index_runs_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    monkeypatch.setattr(dcp, "check_files", lambda *_: None)  # whoever forges an index can forge its digest
    for evil in (Evil(), {"a": torch.nn.Linear(1, 1)}, [1, 2], b"x"):
        (saved / ".metadata").write_bytes(pickle.dumps(evil))
        with pytest.raises(ValueError, match="its index cannot be read"):
            source(saved)
    assert not Path("executed").exists()


@pytest.mark.parametrize("saved", ["sharded"], indirect=True)
def test_what_a_kill_leaves_is_put_in_order(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved.parent
    monkeypatch.setattr("os.getpid", lambda: 2**22 + 1)  # of no process
    aside, part = folder / temporary_name(saved, "old"), folder / temporary_name(saved)
    monkeypatch.undo()
    saved.rename(aside)  # killed between the two moves
    part.mkdir()
    sweep(folder)
    assert [path.name for path in folder.iterdir()] == ["a.ckpt"]
    source(saved)
    shutil.copytree(saved, aside)  # killed after them
    sweep(folder)
    assert [path.name for path in folder.iterdir()] == ["a.ckpt"]
    remove_whole(saved)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["split", "tied"])
def test_export_from_any_form(root: Path, by_two: dict, tmp_path: Path, name: str, capsys) -> None:
    digests = set()
    for form in CASES[name].forms:
        out = tmp_path / form
        assert export(["export", str(place(root, name, form, 2)), "--out", str(out), "--step", "2"]) == 0
        said = capsys.readouterr().out
        assert "exported step 2 (step=2.ckpt)" in said
        digests.add(said.split()[-1])
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert digest_state(loaded.state_dict()) == said.split()[-1]
    assert len(digests) == 1
    assert digests != {digest_state(AutoModelForCausalLM.from_pretrained(root / name).bfloat16().state_dict())}


def test_what_does_not_go_together_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").mkdir()
    quiet = {"accelerator": "cpu", "logger": False}
    with pytest.raises(ValueError, match=r"trainer.strategy.checkpoints: consolidated is not for DeltaCheckpointIO"):
        Trainer(strategy=Sharded(checkpoints="consolidated"), plugins=[DeltaCheckpointIO()], **quiet)
    with pytest.raises(ValueError, match=r"trainer.strategy.tensor: above 1 is not for DeltaCheckpointIO"):
        Trainer(strategy=Sharded(tensor=2), plugins=[DeltaCheckpointIO()], **quiet)
    with pytest.raises(ValueError, match=r"trainer.plugins: TorchCheckpointIO is not for a sharded model; leave it"):
        Trainer(strategy=Sharded(), plugins=[TorchCheckpointIO()], **quiet)
    with pytest.raises(ValueError, match=r"a.ckpt is a folder of a sharded run; to read it in one process set trainer"):
        check_readable(tmp_path / "a.ckpt", Trainer(**quiet))


def test_each_process_writes_its_own_share(root: Path, by_two: dict) -> None:
    folder = place(root, "replicated", "delta", 2) / "ckpt/step=2.ckpt"
    assert len(read_manifest(folder)["files"]) == 1  # one copy of two
    folder = place(root, "split", "delta", 2) / "ckpt/step=2.ckpt"
    found = [metadata_of(folder / name)["bytes"] for name in read_manifest(folder)["files"]]
    sizes = [sum(parts.values()) - parts.get("rest", 0) for parts in found]
    assert len(sizes) == 2
    assert max(sizes) < 1.5 * min(sizes)
