"""Callbacks on tiny modules, with exact expected numbers, in automatic and in manual optimization."""

from __future__ import annotations

import csv
import json
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from rlvr_lightning.callbacks import (
    CompletionTable,
    GPUMemory,
    OptimizerState,
    ShortProgressBar,
    UpdateSparsity,
    change_meter,
    gpu_memory,
    optimizer_state_bytes,
    snapshots,
)
from rlvr_lightning.callbacks.change_counts import DEFINITIONS, count_changed, kind_of
from rlvr_lightning.callbacks.change_meter import ChangeMeter
from rlvr_lightning.callbacks.completions import printable, render
from rlvr_lightning.callbacks.memory_probes import LifetimeProbe, PhaseMeter, ResidentProbe
from rlvr_lightning.callbacks.optimizer_state import count_state
from rlvr_lightning.callbacks.tensors import distinct, total_bytes

ALL = list(DEFINITIONS)
WORKERS = str(Path(__file__).with_name("callback_workers.py"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Tiny(pl.LightningModule):
    """An embedding of 7 x 5 whose looked-up rows alone get gradients, a frozen tensor of 3, and a norm of 5."""

    def __init__(self, manual: bool = False, steps: int = 1, lr: float = 1.0) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.steps, self.lr = steps, lr
        self.embed = nn.Embedding(7, 5)
        self.layers = nn.ModuleList([nn.ParameterDict({"norm": nn.Parameter(torch.ones(5))})])
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        nn.init.ones_(self.embed.weight)

    def loss(self, rows):
        return (self.embed(rows) * self.layers[0]["norm"].detach()).sum()

    def training_step(self, batch, batch_idx):
        rows = batch[0]
        if self.automatic_optimization:
            return self.loss(rows)
        optimizer = self.optimizers()
        for _ in range(self.steps):
            optimizer.zero_grad()
            self.manual_backward(self.loss(rows))
            optimizer.step()
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(module, rows, folder, callbacks, **kwargs):
    """Train on batches of row numbers; returns the trainer."""
    options = {"logger": CSVLogger(folder, name="", version=""), "enable_progress_bar": False, "log_every_n_steps": 1}
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options | kwargs,
    )
    loader = DataLoader([torch.tensor(row) for row in rows], batch_size=1, shuffle=False)
    trainer.fit(module, loader)
    return trainer


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---- counting ----------------------------------------------------------------------------------------------------


def naive_changed(old: float, new: float, old_bits: int, new_bits: int, name: str) -> bool:
    """One entry of float32, by the words of the definitions."""
    as16 = [torch.tensor(x).to(torch.bfloat16) for x in (old, new)]
    bits16 = [int(x.view(torch.int16)) for x in as16]
    if name == "fp32":
        return old_bits != new_bits
    if name == "bf16":
        return bits16[0] != bits16[1]
    if name == "tol1e-5":
        a, b = (float(x) for x in as16)
        return bits16[0] != bits16[1] and not abs(b - a) <= 1e-5
    if old_bits == new_bits:
        return False
    near = abs(new - old) <= 1e-3 * max(abs(old), abs(new))
    return not near or float("inf") in (abs(old), abs(new))


AWKWARD = [0.0, -0.0, 1.0, 1.0001, 1.004, 1.01, -1.0, 1e-6, 5e-6, 1.2e-5, 3e38, -3e38, 1e-40]
AWKWARD += [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("repeat", [1, 40])
def test_counts_equal_a_loop_over_scalars(repeat):
    """All pairs of awkward values; repeated unchanged entries make the sparse way of counting be taken too."""
    pairs = [(a, b) for a in AWKWARD for b in AWKWARD] + [(1.0, 1.0)] * (len(AWKWARD) ** 2 * (repeat - 1))
    old, new = (torch.tensor(side) for side in zip(*pairs, strict=True))
    raw = [[struct.unpack("i", struct.pack("f", x))[0] for x in side.tolist()] for side in (old, new)]
    expected = [[len(pairs), sum(a == 0 for a, _ in pairs)]]
    for name in ALL:
        hits = [naive_changed(a, b, i, j, name) for a, b, i, j in zip(old.tolist(), new.tolist(), *raw, strict=True)]
        expected.append([sum(hits), sum(h for h, (a, _) in zip(hits, pairs, strict=True) if a == 0)])
    assert count_changed(old, new, ALL).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_count_by_hand(dtype):
    old = torch.tensor([0.0, 1.0, 2.0, 3.0, float("nan")], dtype=dtype)
    new = old.clone()
    new[1] = 1.5
    new[3] = float("nan")
    counts = count_changed(old, new, ALL).tolist()
    assert counts == [[5, 1], [2, 0], [2, 0], [2, 0], [2, 0]]


def test_a_nan_that_stays_is_unchanged_and_nothing_changed_is_zero():
    values = torch.tensor([float("nan"), float("inf"), 0.0, 1.0])
    assert count_changed(values, values.clone(), ALL).tolist() == [[4, 1]] + [[0, 0]] * 4


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("transformer.h.3.mlp.c_fc.weight", "mlp"),
        ("transformer.h.3.ln_1.weight", "norm"),
        ("transformer.wte.weight", "embedding"),
        ("model.embed_tokens.weight", "embedding"),
        ("policy.model.lm_head.weight", "lm_head"),
        ("value.weight", "other"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


# ---- snapshots and the meter -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [8, 24, 1 << 20])
def test_meter_counts_hand_changed_entries_whatever_the_chunk(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setitem(snapshots.CHUNK_BYTES, "cpu", chunk_bytes)
    matrix = nn.Parameter(torch.ones(3, 5).t())  # not contiguous
    half = nn.Parameter(torch.ones(7, dtype=torch.bfloat16))
    zeros = nn.Parameter(torch.zeros(4))
    still = nn.Parameter(torch.ones(9), requires_grad=False)
    optimizer = torch.optim.SGD([matrix, half, zeros, still], lr=1.0)
    meter = ChangeMeter(optimizer, {id(matrix): "m"}, ["bf16", "fp32"], tmp_path)
    with torch.no_grad():
        half[6] = 2.0
    meter.before_step()
    with torch.no_grad():
        matrix[4, 2], matrix[0, 1] = 5.0, 1.0001  # the second is lost in bf16
        zeros[3] = 1e-9
        half[6] = 1.0  # back to where it started
        half[0] = 3.0
    step, start = meter.counts().tolist()
    assert step[:3] == [[[15, 0], [1, 0], [2, 0]], [[7, 0], [2, 0], [2, 0]], [[4, 4], [1, 1], [1, 1]]]
    assert start[:3] == [[[15, 0], [1, 0], [2, 0]], [[7, 0], [1, 0], [1, 0]], [[4, 4], [1, 1], [1, 1]]]
    assert meter.frozen == {3: 9}
    assert list(tmp_path.iterdir()) == []  # the files have no names, nothing to clean up
    meter.close()


def test_tied_parameters_count_once():
    one = nn.Parameter(torch.zeros(3, 5))
    alias = nn.Parameter(one.data)
    assert len(distinct([one, one, alias, nn.Parameter(torch.zeros(3, 5))])) == 2
    assert total_bytes([one, alias]) == 60


# ---- UpdateSparsity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manual", [False, True])
def test_sparsity_of_known_updates(tmp_path, manual):
    """Step 1 looks up rows 1 and 3 (10 entries), step 2 row 3 (5), step 3 rows 0 and 1 (10)."""
    sparsity = UpdateSparsity(every_n_steps=1)
    fit(Tiny(manual), [[1, 3], [3, 3], [0, 1]], tmp_path, [sparsity])
    records = lines(tmp_path / "sparsity.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3]
    assert [r["last_step"]["changed"]["bf16"] for r in records] == [10, 5, 10]
    assert [r["total"]["changed"]["fp32"] for r in records] == [10, 10, 15]
    last = records[-1]["last_step"]
    assert last["entries"] == 35 + 5 + 3  # the frozen three are counted, unchanged
    assert last["kinds"]["embedding"]["changed"] == dict.fromkeys(ALL, 10)
    assert last["kinds"]["norm"]["changed"]["fp32"] == 0
    assert last["layers"]["0"]["entries"] == 5
    assert records[0]["module_entries"] == 43
    metrics = rows_of(tmp_path)
    assert [float(m["update/changed_frac/tol1e-5"]) for m in metrics] == pytest.approx([10 / 43, 5 / 43, 10 / 43])
    assert [float(m["update/changed_frac_total/rel1e-3"]) for m in metrics] == pytest.approx(
        [10 / 43, 10 / 43, 15 / 43]
    )


def test_every_n_counts_optimizer_steps_not_batches(tmp_path, monkeypatch):
    """4 batches of 3 optimizer steps, every 5th step measured: steps 1, 6, 11; the weights are kept for these only."""
    writes = []
    write = snapshots.Snapshot.write
    monkeypatch.setattr(snapshots.Snapshot, "write", lambda self: (writes.append(1), write(self)))
    fit(Tiny(manual=True, steps=3), [[1]] * 4, tmp_path, [UpdateSparsity(every_n_steps=5, total=False)])
    records = lines(tmp_path / "sparsity.jsonl")
    assert [r["step"] for r in records] == [1, 6, 11]
    assert records[0]["total"] == {}
    assert len(writes) == 3
    assert [float(m["update/measured_step"]) for m in rows_of(tmp_path)] == [1, 6, 6, 11]


def test_a_resumed_run_keeps_counting_steps_and_says_where_its_start_is(tmp_path):
    """3 steps, then 4 more of which every 2nd is measured: steps 5 and 7; the start is after step 3."""
    trainer = fit(Tiny(), [[0]] * 3, tmp_path / "a", [])
    trainer.save_checkpoint(tmp_path / "at3.ckpt")
    module = Tiny()
    resumed = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[UpdateSparsity(every_n_steps=2)],
        enable_model_summary=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=CSVLogger(tmp_path / "b", name="", version=""),
    )
    loader = DataLoader([torch.tensor([row]) for row in (1, 2, 3, 4)])
    resumed.fit(module, loader, ckpt_path=tmp_path / "at3.ckpt")
    records = lines(tmp_path / "b" / "sparsity.jsonl")
    assert [(r["step"], r["since_step"]) for r in records] == [(5, 3), (7, 3)]
    assert [r["total"]["changed"]["bf16"] for r in records] == [10, 20]


def test_small_updates_vanish_in_bf16_only(tmp_path):
    """1 - 1e-4 rounds to 1 in bf16, is a relative change under 1e-3, and differs as fp32."""
    fit(Tiny(lr=1e-4), [[2]], tmp_path, [UpdateSparsity()])
    changed = lines(tmp_path / "sparsity.jsonl")[0]["last_step"]["changed"]
    assert changed == {"bf16": 0, "tol1e-5": 0, "rel1e-3": 0, "fp32": 5}


def test_measuring_stops_and_training_goes_on_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(change_meter.Snapshot, "write", full)
    module = Tiny()
    with pytest.warns(UserWarning, match="No space left"):
        fit(module, [[1], [1]], tmp_path, [UpdateSparsity(every_n_steps=1, total=False)])
    assert float(module.embed.weight[1, 0]) == -1.0
    assert not (tmp_path / "sparsity.jsonl").exists()


class Ticks:
    """A clock that advances one second each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_cost_is_amortised_over_n_steps(tmp_path):
    """By the ticks: base 1 s; before-step 1 s and comparing 1 s; the batch 5 s of which 3 s were not measuring."""
    sparsity = UpdateSparsity(every_n_steps=10)
    sparsity.clock = Ticks()
    fit(Tiny(), [[1]], tmp_path, [sparsity])
    (row,) = rows_of(tmp_path)
    assert float(row["update/measure_s"]) == 2.0
    assert float(row["update/measure_frac"]) == pytest.approx((1 + 2) / (3 * 10))


def test_sparsity_leaves_optimizer_hooks_as_they_were(tmp_path):
    module = Tiny()

    class Fails(pl.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("boom")

    trainer = None
    with pytest.raises(RuntimeError, match="boom"):
        trainer = fit(module, [[1]], tmp_path, [sparsity := UpdateSparsity(), Fails()])
    assert trainer is None
    assert sparsity._watched == []
    optimizer = module.optimizers().optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_bad_arguments_are_one_line():
    with pytest.raises(ValueError, match=r"UpdateSparsity\.every_n_steps must be at least 1, got 0"):
        UpdateSparsity(every_n_steps=0)
    with pytest.raises(ValueError, match=r"definitions: unknown \['fp8'\]; there are \['bf16'"):
        UpdateSparsity(definitions=["fp8"])


# ---- OptimizerState ----------------------------------------------------------------------------------------------


def stepped(optimizer_class, dtype=torch.float32, **kwargs):
    weights = [nn.Parameter(torch.ones(3, 5, dtype=dtype)), nn.Parameter(torch.ones(7, dtype=dtype))]
    optimizer = optimizer_class(weights, lr=0.1, **kwargs)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs", "dtype", "expected"),
    [
        (torch.optim.SGD, {}, torch.float32, 0),
        (torch.optim.SGD, {"momentum": 0.9}, torch.float32, 22 * 4),
        (torch.optim.SGD, {"momentum": 0.9}, torch.bfloat16, 22 * 2),
        (torch.optim.RMSprop, {}, torch.float32, 22 * 4 + 2 * 4),
        (torch.optim.AdamW, {}, torch.float32, 22 * 8 + 2 * 4),
        (torch.optim.AdamW, {}, torch.bfloat16, 22 * 4 + 2 * 4),
        (torch.optim.AdamW, {"amsgrad": True}, torch.float32, 22 * 12 + 2 * 4),
    ],
)
def test_state_bytes_are_exact(optimizer_class, kwargs, dtype, expected):
    assert optimizer_state_bytes(stepped(optimizer_class, dtype, **kwargs)) == expected


def test_state_is_found_in_nested_containers_and_shared_storages_count_once():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    flat = torch.zeros(10)
    optimizer.state[weight] = {"history": [flat[:3], {"more": flat[3:7]}], "again": flat, "note": "text", "step": 3}
    entries = {entry.key: entry.local_bytes for entry in count_state(optimizer)}
    assert entries == {"history": 28, "again": 12}


def test_optimizer_state_logs_bytes_of_weights_gradients_and_state(tmp_path):
    module = Tiny(manual=True)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=0.1)
    fit(module, [[1], [2]], tmp_path, [OptimizerState()])
    row = rows_of(tmp_path)[-1]
    assert float(row["memory/weights_bytes"]) == 43 * 4
    assert float(row["memory/gradients_bytes"]) == 35 * 4
    assert float(row["memory/optimizer_state_bytes"]) == 35 * 8 + 4


# ---- GPUMemory ---------------------------------------------------------------------------------------------------


class FakeProbe:
    """Each reset starts at 0; the n-th reading of a peak says n hundred bytes."""

    method = "fake"

    def __init__(self, *_) -> None:
        self.readings = 0

    def reset(self) -> None: ...

    def peak_bytes(self) -> int:
        self.readings += 100
        return self.readings

    def total_bytes(self) -> int:
        return 5000


def test_phase_meter_keeps_the_highest_of_each_phase():
    meter = PhaseMeter(FakeProbe())
    meter.enter("rollout")  # other 100
    meter.enter("forward")  # rollout 200
    meter.enter("rollout")  # forward 300
    assert meter.take_step() == {"other": 100, "rollout": 400, "forward": 300}
    meter.enter("")  # rollout 500
    assert meter.take_step() == {"rollout": 500, "other": 600}
    assert meter.run == {"other": 600, "rollout": 500, "forward": 300}


def recorded_phases(monkeypatch):
    seen = []

    class Recorder(PhaseMeter):
        def enter(self, phase):
            seen.append(phase)
            super().enter(phase)

    monkeypatch.setattr(gpu_memory, "PhaseMeter", Recorder)
    return seen


@pytest.mark.parametrize("manual", [False, True])
def test_phases_of_an_ordinary_module(tmp_path, monkeypatch, manual):
    seen = recorded_phases(monkeypatch)
    fit(Tiny(manual), [[1]], tmp_path, [GPUMemory()])
    order = [phase for phase in seen if phase not in ("", "other")]
    assert order == ["forward", "backward", "forward", "optimizer", "forward"]


def test_a_module_that_tells_its_phases_is_believed(tmp_path, monkeypatch):
    seen = recorded_phases(monkeypatch)

    class Tells(Tiny):
        def __init__(self) -> None:
            super().__init__(manual=True)
            self.phase_listeners = []

        def training_step(self, batch, batch_idx):
            for phase in ("rollout", "reward", "forward"):
                for listener in self.phase_listeners:
                    listener(phase)
            super().training_step(batch, batch_idx)

    module = Tells()
    fit(module, [[1]], tmp_path, [GPUMemory()])
    assert [phase for phase in seen if phase not in ("", "other")] == ["rollout", "reward", "forward", "forward"][:3]
    assert module.phase_listeners == []
    assert float(rows_of(tmp_path)[0]["memory/rollout_peak_bytes"]) > 0


def test_memory_json_holds_integers_and_the_optimizer_state(tmp_path):
    module = Tiny()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    fit(module, [[1]], tmp_path, [GPUMemory(), OptimizerState()])
    report = json.loads((tmp_path / "memory.json").read_text())
    assert report["device"] == "cpu"
    assert report["peak_bytes"] == max(report["phase_peak_bytes"].values())
    assert isinstance(report["peak_bytes"], int)
    assert set(report["phase_peak_bytes"]) == {"other", "forward", "backward", "optimizer"}
    assert 0 < report["peak_bytes"] < report["total_bytes"]
    state = report["optimizer_state"]
    assert state == {"local_bytes": 140, "by_key_bytes": {"momentum_buffer": {"float32": 140}}, "global_bytes": 140}


def resettable() -> bool:
    try:
        ResidentProbe().reset()
        return True
    except OSError:
        return False


@pytest.mark.skipif(not resettable(), reason="this kernel does not let a process reset its peak")
def test_resident_probe_sees_a_peak_and_forgets_it():
    probe, size = ResidentProbe(), 64 << 20
    probe.reset()
    before = probe.peak_bytes()
    big = torch.ones(size // 4)
    del big
    assert probe.peak_bytes() - before > 0.9 * size
    probe.reset()
    assert probe.peak_bytes() - before < 0.5 * size


def test_the_backward_phase_shows_what_backward_holds(tmp_path):
    size = 96 << 20

    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            torch.ones(size // 4)
            return grad

    class Hungry(Tiny):
        def loss(self, rows):
            return Greedy.apply(super().loss(rows))

    fit(Hungry(), [[1], [1]], tmp_path, [GPUMemory()])
    row = rows_of(tmp_path)[-1]
    if resettable():
        gap = float(row["memory/backward_peak_bytes"]) - float(row["memory/forward_peak_bytes"])
        assert 0.8 * size < gap < 1.5 * size
    assert row["memory/peak_bytes"] == row["memory/backward_peak_bytes"]


def test_probe_without_proc_falls_back(monkeypatch):
    from rlvr_lightning.callbacks import memory_probes

    def refused(self):
        raise PermissionError("read-only /proc")

    monkeypatch.setattr(memory_probes.ResidentProbe, "reset", refused)
    probe = memory_probes.choose_probe(torch.device("cpu"))
    assert isinstance(probe, LifetimeProbe)
    assert probe.peak_bytes() > 50 << 20


def test_cuda_figures_come_from_the_allocator_and_nvml(monkeypatch):
    from types import SimpleNamespace

    from rlvr_lightning.callbacks import memory_probes

    device, calls = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: calls.append(d))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: 7 if d == device else 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (3, 11))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid="a-b"))
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=5 if handle == "GPU-a-b" else 0),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    probe = memory_probes.choose_probe(device)
    probe.reset()
    assert (probe.peak_bytes(), probe.total_bytes(), calls) == (7, 11, [device])
    assert memory_probes.nvml_used_bytes(device) == 5


def test_nvml_failure_warns_once(tmp_path):
    callback = GPUMemory()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert callback._read_nvml(torch.device("cpu")) == {}
    assert sum("no NVML figures" in str(warning.message) for warning in caught) == 1


# ---- CompletionTable ---------------------------------------------------------------------------------------------

SAMPLE = {
    "step": 0,
    "prompt": "[red]2 + 2 =[/red]",
    "completion": "4\x1b[2J\n\u202e\x07[bold]",
    "reward": torch.tensor(0.5),
    "parts": {"answer": float("nan")},
    "advantage": -1.25,
    "truncated": True,
}


def test_hostile_text_cannot_steer_the_terminal():
    table = render([SAMPLE], "title [red]", width=120)
    assert "\x1b" not in table
    assert "\x07" not in table
    assert "\u202e" not in table
    assert "[red]2 + 2 =[/red]" in table
    assert r"4\x1b[2J\n\u202e\x07[bold] [cut at the limit]" in table
    assert "title [red]" in table
    assert "-1.25" in table
    assert printable("x" * 500).count("x") == 400
    assert printable("\ud800") == r"\ud800"


class Writes(Tiny):
    def training_step(self, batch, batch_idx):
        self.last_samples = [dict(SAMPLE, step=batch_idx, prompt=f"p{n}", extra={"level": n}) for n in range(5)]
        return super().training_step(batch, batch_idx)


def test_completions_go_to_file_and_console_every_n(tmp_path, capsys):
    fit(Writes(), [[1]] * 5, tmp_path, [CompletionTable(every_n_steps=3, num=2)])
    records = lines(tmp_path / "completions.jsonl")
    assert [r["step"] for r in records] == [0] * 5 + [3] * 5
    assert records[0]["completion"] == SAMPLE["completion"]
    assert records[1]["extra"] == {"level": 1}
    assert records[0]["reward"] == 0.5
    assert records[0]["parts"] == {"answer": None}
    out = capsys.readouterr().out
    assert out.count("2 of 5 completions") == 2
    assert "p0" in out
    assert "p2" in out  # spread over the batch
    assert "p1" not in out


def test_completions_do_nothing_for_a_module_without_samples(tmp_path, capsys):
    fit(Tiny(), [[1]], tmp_path, [CompletionTable()])
    assert not (tmp_path / "completions.jsonl").exists()
    assert "completions" not in capsys.readouterr().out


# ---- ShortProgressBar --------------------------------------------------------------------------------------------


def test_progress_bar_shows_short_names(tmp_path, capsys):
    class Logs(Tiny):
        def training_step(self, batch, batch_idx):
            self.log_dict({"policy/kl": 0.25, "reward/mean": 0.5, "response/length_mean": 7.0}, prog_bar=True)
            return super().training_step(batch, batch_idx)

    fit(Logs(), [[1]], tmp_path, [ShortProgressBar()], enable_progress_bar=True)
    out = capsys.readouterr().out
    assert "reward=0.500, KL=0.250, length=7.000" in out
    assert "v_num" not in out


# ---- sharded -----------------------------------------------------------------------------------------------------


def test_shards_are_counted_where_they_lie_and_replicas_once(tmp_path):
    commands = [[sys.executable, WORKERS, "sharded", str(rank), str(tmp_path)] for rank in range(2)]
    processes = [subprocess.Popen(command, env=ENVIRONMENT) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for result in results:
        assert result["counts"] == [[[[35, 0], [35, 0]], [[3, 0], [3, 0]], [[2, 0], [2, 0]]]]
        assert result["owned"] == 35 * 4 + 3 * 4 + 2 * (2 * 4)  # the replica once, the plain tensor on both ranks
    assert [result["local"] for result in results] == [(20 + 3 + 2) * 4, (15 + 3 + 2) * 4]
