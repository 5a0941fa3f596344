"""The checkpoint's file: what it costs, that it is whole or absent, and that no bytes in it can do harm."""

from __future__ import annotations

import json
import math
import os
import resource
import zipfile
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_causal_lm
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from safetensors import safe_open
from test_checkpoint import saving
from test_grpo import fit, folder, module, weights  # noqa: F401 (a fixture)

from rlvr_lightning.checkpoint import file as checkpoint_file
from rlvr_lightning.checkpoint import state as checkpoint_state
from rlvr_lightning.checkpoint.codec import pack, unpack
from rlvr_lightning.checkpoint.file import Container, Writer, metadata_of, sweep
from rlvr_lightning.checkpoint.io import DeltaCheckpointIO, SinceStart
from rlvr_lightning.checkpoint.rest import to_bytes
from rlvr_lightning.checkpoint.restore import restore_
from rlvr_lightning.checkpoint.start import Start
from rlvr_lightning.checkpoint.state import Reader
from rlvr_lightning.checkpoint.stored import StoredState
from rlvr_lightning.delta.digest import digest_state
from rlvr_lightning.heap import give_back
from rlvr_lightning.optim import SGD
from rlvr_lightning.policy import Policy

STATES = [{"state": {0: {"low": torch.arange(-9, 9, dtype=torch.int16), "steps": 3}}, "param_groups": [{"lr": 0.5}]}]


class Holder(torch.nn.Module):
    """The names that checkpoints give a policy's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = Policy(tiny_causal_lm("qwen3").to(torch.bfloat16))


def bits(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone().view(torch.int16) for p in module.parameters()]


def some_checkpoint(folder: Path, change=None) -> tuple[Holder, dict]:  # noqa: F811
    """A module of which a few entries changed since the start, and what Lightning would have saved."""
    moved = Holder()
    start = Start(moved, None, folder)
    with torch.no_grad():
        (change or (lambda p: p.view(-1)[::7].mul_(1.01)))(next(moved.parameters()))
    state = SinceStart(moved.state_dict())
    state.about = {"model": "tiny", "dtype": "bfloat16", "lora": None, "base_digest": start.digest}
    state.start = start
    return moved, {"state_dict": state, "global_step": 7, "optimizer_states": STATES}


def saved(path: Path, change=None, **more) -> tuple[Holder, Holder]:
    """Save one: the module that it was made of, and one that is at the start."""
    moved, checkpoint = some_checkpoint(path.parent, change)
    DeltaCheckpointIO().save_checkpoint(checkpoint | more, path)
    return moved, Holder()


# ---- what is in it ----


def test_the_file_is_safetensors_that_says_what_it_holds(tmp_path: Path) -> None:
    moved, _ = saved(tmp_path / "a.ckpt")
    with safe_open(tmp_path / "a.ckpt", "pt") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert {"rest", "optimizer/0/0/low", "weights/policy.model.model.embed_tokens.weight"} <= names
    about, parts, counts = (json.loads(metadata[name]) for name in ("about", "bytes", "counts"))
    assert about["step"] == 7
    assert about["base_digest"] == digest_state(tiny_causal_lm("qwen3").to(torch.bfloat16).state_dict())
    assert set(parts) == {"weights delta", "optimizer low", "rest"}
    assert sum(parts.values()) < (tmp_path / "a.ckpt").stat().st_size
    embedding = next(moved.parameters())
    assert 0 < counts["changed"] <= math.ceil(embedding.numel() / 7)
    assert counts["in_base"] == sum(p.numel() for p in moved.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 1e-40])
@pytest.mark.parametrize("everything", [True, False])
def test_all_bits_come_back(tmp_path: Path, value: float, everything: bool) -> None:
    moved, fresh = saved(tmp_path / "a.ckpt", lambda p: p.view(-1)[:: 1 if everything else 5].fill_(value))
    restore_(fresh, Reader(tmp_path / "a.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(bits(moved), bits(fresh), strict=True))


def test_the_rest_and_the_optimizers_come_back(tmp_path: Path) -> None:
    saved(tmp_path / "a.ckpt", loops={"a": torch.tensor(3)}, callbacks={"x": [1, "two", None]})
    found = DeltaCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert (found["global_step"], found["loops"], found["callbacks"]) == (
        7,
        {"a": torch.tensor(3)},
        {"x": [1, "two", None]},
    )
    [optimizer] = found["optimizer_states"]
    assert optimizer["param_groups"] == STATES[0]["param_groups"]
    assert isinstance(optimizer["state"], StoredState)
    assert optimizer["state"][0]["steps"] == 3
    assert torch.equal(optimizer["state"][0]["low"], STATES[0]["state"][0]["low"])
    with pytest.raises(ValueError, match=r"holds changes of 'tiny', which only the modules of rlvr_lightning load"):
        dict(found["state_dict"])


@given(st.sampled_from([np.uint8, np.int16, np.int32, np.int64]), st.integers(1, 400), st.sampled_from([0, 1, 9, 63]))
@settings(max_examples=60, deadline=None)
def test_segments_round_trip(dtype, entries: int, width: int) -> None:
    values = (
        np.random.default_rng(entries)
        .integers(0, 1 << min(width, 8 * np.dtype(dtype).itemsize - 1), entries)
        .astype(dtype)
    )
    blob = pack(values)
    assert np.array_equal(unpack(blob, entries, values.itemsize).view(dtype), values)
    for damaged in (blob[:-1], blob + b"\0", blob[1:]):
        with pytest.raises(ValueError, match="a segment"):
            unpack(damaged, entries, values.itemsize)


def test_other_modules_are_stored_whole(tmp_path: Path) -> None:
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 5)

    plain = Plain()
    DeltaCheckpointIO().save_checkpoint({"state_dict": plain.state_dict(), "global_step": 1}, tmp_path / "a.ckpt")
    other = Plain()
    other.load_state_dict(DeltaCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["state_dict"])
    assert torch.equal(other.layer.weight, plain.layer.weight)


def test_what_is_no_checkpoint_is_stored_as_ever(tmp_path: Path) -> None:
    """Lightning's launcher of forked processes hands over bare weights."""
    bare = {"layer.weight": torch.ones(3, 5)}
    DeltaCheckpointIO().save_checkpoint(bare, tmp_path / ".temp.ckpt")
    assert torch.equal(DeltaCheckpointIO().load_checkpoint(tmp_path / ".temp.ckpt")["layer.weight"], torch.ones(3, 5))


def test_ordinary_checkpoints_load_through_it(folder, tmp_path: Path) -> None:  # noqa: F811
    options = saving(tmp_path)
    ours = options.pop("plugins")
    first, second, whole = (module(folder, dtype="bfloat16", optimizer=partial(SGD, lr=0.5)) for _ in range(3))
    fit(first, tmp_path, steps=3, **options)
    fit(second, tmp_path, steps=4, plugins=ours, ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"))
    fit(whole, tmp_path, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(weights(second), weights(whole), strict=True))


# ---- damage ----


def test_any_damage_is_found_and_nothing_is_written(tmp_path: Path) -> None:
    _, fresh = saved(tmp_path / "a.ckpt")
    before, whole = bits(fresh), (tmp_path / "a.ckpt").read_bytes()
    dice = np.random.default_rng(0)
    header = int.from_bytes(whole[:8], "little")
    places = [*range(8), *dice.integers(8, 8 + header, 100), *dice.integers(8 + header, len(whole), 100)]
    altered = [whole[:at] + bytes([whole[at] ^ (1 << int(dice.integers(8)))]) + whole[at + 1 :] for at in places]
    cuts = [whole[:at] for at in (0, 1, 8, 100, 8 + header, len(whole) // 2, len(whole) - 1)]
    for damaged in [*altered, *cuts, whole + b"\0"]:
        (tmp_path / "b.ckpt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"b.ckpt (is truncated or altered|has version)") as error:
            restore_(fresh, Reader(tmp_path / "b.ckpt"))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"b.ckpt is truncated or altered"):
        (tmp_path / "b.ckpt").write_bytes(whole[: len(whole) // 2])
        DeltaCheckpointIO().load_checkpoint(tmp_path / "b.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(before, bits(fresh), strict=True))


def test_another_base_is_named(tmp_path: Path) -> None:
    _, fresh = saved(tmp_path / "a.ckpt")
    with torch.no_grad():
        list(fresh.parameters())[-1].view(-1)[0] += 1
    before = bits(fresh)
    with pytest.raises(ValueError, match=r"a.ckpt was made from 'tiny' \(\w{12}\), but this module starts from other"):
        restore_(fresh, Reader(tmp_path / "a.ckpt"))
    fresh.policy.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"also has a tensor 'policy.extra'"):
        restore_(fresh, Reader(tmp_path / "a.ckpt"))
    del fresh.policy.extra
    with pytest.raises(ValueError, match=r"lm_head.weight' is torch.bfloat16 .*, but float32"):
        restore_(fresh.float(), Reader(tmp_path / "a.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(before, bits(fresh.to(torch.bfloat16)), strict=True))


# ---- hostile files: made with a right checksum ----


def forge(path: Path, entries: dict, blobs: dict[str, list[bytes]], rest: bytes = b"") -> None:
    metadata = {"about": {"step": 1}, "entries": entries, "aliases": {}}
    with Writer(path, [*blobs, "rest"], metadata) as writer:
        for name, pieces in blobs.items():
            for piece in pieces:
                writer.write(name, piece)
        writer.write("rest", rest or to_bytes({"global_step": 1, "optimizer_states": [{"state": {}}]}))
        writer.finish()


class Evil:
    def __reduce__(self):
        return os.system, ("echo executed > executed",)


def test_hostile_files_run_nothing_and_allocate_little(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.ckpt"
    buffer = BytesIO()
    torch.save({"global_step": Evil()}, buffer)
    forge(path, {}, {}, buffer.getvalue())
    with pytest.raises(ValueError, match="what is not tensors cannot be read"):
        DeltaCheckpointIO().load_checkpoint(path)
    assert not Path("executed").exists()

    bomb = BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    forge(path, {}, {}, bomb.getvalue())
    with pytest.raises(ValueError, match="what is not tensors cannot be read"):
        DeltaCheckpointIO().load_checkpoint(path)

    huge = {"optimizer/0/0/low": ["whole", "int16", [1 << 50]], "weights/w": ["whole", "int16", [3]]}
    forge(path, huge, {name: [pack(np.zeros(3, np.int16))] for name in huge})
    with pytest.raises(ValueError, match="its optimizer state is larger than its weights allow"):
        DeltaCheckpointIO().load_checkpoint(path)

    longer = {"weights/w": ["whole", "int16", [3]]}
    forge(path, longer, {"weights/w": [pack(np.zeros(1 << 20, np.int16))]})
    with pytest.raises(ValueError, match="'weights/w': a segment is malformed"):
        DeltaCheckpointIO().load_checkpoint(path)["state_dict"]["w"]

    for spec in (["whole", "load", [3]], ["whole", "int16", [-1]], ["whole", "int16", ["3"]], ["code", "int16", [3]]):
        forge(path, {"weights/w": spec}, {"weights/w": [b""]})
        with pytest.raises(ValueError, match="its list of tensors is malformed"):
            Reader(path)


def test_what_only_pickle_could_store_is_refused_on_saving(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'callbacks' of the checkpoint holds objects that only pickle could store"):
        saved(tmp_path / "a.ckpt", callbacks={"x": Evil()})
    assert list(tmp_path.glob("*a.ckpt*")) == []


# ---- a full disk, and what dead writers leave ----


def test_a_full_disk_leaves_the_last_checkpoint_and_no_rubbish(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the system refuse to write on, half-way through the file."""
    path = tmp_path / "ckpt" / "last.ckpt"
    _, checkpoint = some_checkpoint(tmp_path)
    DeltaCheckpointIO().save_checkpoint(checkpoint, path)
    size, whole = path.stat().st_size, path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, size // 2, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(
                ValueError, match=r"the disk is full: .*last.ckpt needs more than \d+ bytes, \d+ are"
            ) as e:
                DeltaCheckpointIO().save_checkpoint(checkpoint, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(e.value)
        assert path.read_bytes() == whole
        assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    restore_(Holder(), Reader(path))


def test_no_room_for_the_start_is_said_at_the_start(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot keep the start weights \(\d+ bytes\) in .*; make room"):
            Start(Holder(), None, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_half_written_files_of_the_dead_go_and_of_the_living_stay(tmp_path: Path) -> None:
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    host = checkpoint_file._HOST
    names = {f".a.{host}-{pid}.part": pid != dead and pid != os.getpid() for pid in (dead, os.getpid(), os.getppid())}
    names |= {".b.elsewhere-7.part": True, ".c.elsewhere-7.part": False, "a.ckpt": True, ".other": True}
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / ".c.elsewhere-7.part", (0, 0))
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}


def test_metadata_of_other_files_is_none(tmp_path: Path) -> None:
    for content in (b"", b"PK\3\4", b"\10\0\0\0\0\0\0\0{}      ", os.urandom(100)):
        (tmp_path / "x").write_bytes(content)
        assert metadata_of(tmp_path / "x") is None


def test_segments_are_coded_in_order_by_several_threads(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoint_state, "SEGMENT", 50)
    monkeypatch.setattr(checkpoint_state, "WORKERS", 3)
    moved, fresh = saved(tmp_path / "a.ckpt")
    assert len(list(Container(tmp_path / "a.ckpt").blobs("weights/policy.model.model.embed_tokens.weight"))) > 5
    restore_(fresh, Reader(tmp_path / "a.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(bits(moved), bits(fresh), strict=True))


CODING_BYTES = 80 << 20


def grown(work) -> int:
    """Bytes by which this process grew at its highest."""

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to reset the highest size")
@pytest.mark.parametrize("stored", ["delta", "whole"])
def test_one_tensor_at_a_time_in_memory(tmp_path: Path, monkeypatch, stored: str) -> None:
    """Weights and low halves of 24 tensors of 4 MiB each: none of it twice, whether saved or loaded."""
    monkeypatch.setattr(checkpoint_state, "WORKERS", 1)
    size, count = 2 << 20, 24

    def build(moved: bool) -> torch.nn.Module:
        holder = torch.nn.Module()
        holder.policy = torch.nn.ParameterList(torch.ones(size, dtype=torch.bfloat16) for _ in range(count))
        for p in holder.policy if moved else ():
            p.data[::100] = 2.0
        return holder

    fresh, moved = build(False), build(True)
    sgd, other = (SGD(holder.parameters(), lr=1.0) for holder in (moved, fresh))
    for p in moved.parameters():
        sgd.state[p]["low"] = torch.full((size,), 3, dtype=torch.int16)
    checkpoint = {"state_dict": moved.state_dict(), "optimizer_states": [sgd.state_dict()]}
    if stored == "delta":
        start = Start(fresh, None, tmp_path)
        checkpoint["state_dict"] = SinceStart(moved.state_dict())
        checkpoint["state_dict"].about, checkpoint["state_dict"].start = {"base_digest": start.digest}, start
    plugin, path = DeltaCheckpointIO(), tmp_path / "a.ckpt"
    assert grown(lambda: plugin.save_checkpoint(checkpoint, path)) < 2 * 2 * size + CODING_BYTES

    def load() -> None:
        found = plugin.load_checkpoint(path)
        restore_(fresh, found["state_dict"].reader)
        other.load_state_dict(found["optimizer_states"][0])

    assert grown(load) < (count + 2) * 2 * size + CODING_BYTES  # the optimizer's own state is new
    assert all(torch.equal(p, q) for p, q in zip(moved.parameters(), fresh.parameters(), strict=True))
    assert all(int(other.state[p]["low"].min()) == 3 for p in fresh.parameters())
