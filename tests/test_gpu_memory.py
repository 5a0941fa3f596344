"""GPUMemory and its probes: phases, peaks, records."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
import torch
from callback_module import Tiny, fit, rows_of

from rlvr_lightning.callbacks import GPUMemory, OptimizerState, gpu_memory
from rlvr_lightning.callbacks.memory_probes import LifetimeProbe, PhaseMeter, ResidentProbe
from rlvr_lightning.heap import give_back


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
    give_back()  # what earlier tests freed, and would be used again
    probe.reset()
    before = probe.peak_bytes()
    big = torch.ones(size // 4)
    del big
    assert probe.peak_bytes() - before > 0.9 * size
    give_back()
    probe.reset()
    assert probe.peak_bytes() - before < 0.5 * size


def test_the_backward_phase_shows_what_backward_holds(tmp_path):
    size = 96 << 20
    give_back()

    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            torch.ones(size // 4)
            give_back()  # a heap with such a hole in it would not shrink by itself
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
