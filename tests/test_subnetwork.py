"""Subnetworks: what is frozen stays to the bit, under every optimizer and in several processes; bad masks refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import subnetwork_worker
import torch
from precision_modes import MODES, WHOLE, same
from safetensors.torch import load_file, save_file
from test_grpo import fit, folder, module, weights  # noqa: F401 (a fixture)
from torch import nn

from rlvr_lightning.configuration import find_config
from rlvr_lightning.delta import SparseDelta
from rlvr_lightning.delta.file import save_delta
from rlvr_lightning.optim import SGD, GradientRelease
from rlvr_lightning.optim.subnetwork import (
    CHUNK_BYTES,
    Frozen,
    Subnetwork,
    check_freezes,
    freeze_,
    load_subnetwork,
    open_subnetwork,
    pack,
    unpack,
)
from rlvr_lightning.policy import LoRA
from rlvr_lightning.profiling.owners import Owners
from rlvr_lightning.profiling.predict import predict
from rlvr_lightning.profiling.run_config import read_config, run_of
from rlvr_lightning.profiling.settings import Run

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
MOMENTUM = partial(torch.optim.SGD, lr=0.5, momentum=0.9)
OPTIMIZERS = {
    "sgd": {"optimizer": partial(torch.optim.SGD, lr=0.5)},
    "momentum": {"optimizer": MOMENTUM},
    "adamw": {"optimizer": ADAMW},
    "adamw bf16": {"optimizer": ADAMW, "dtype": "bfloat16"},
    "rmsprop": {"optimizer": partial(torch.optim.RMSprop, lr=1e-2)},
    **{mode: {"optimizer": make, "dtype": "bfloat16"} for mode, make in MODES.items()},
    "released": {"optimizer": MODES["split"], "dtype": "bfloat16", "gradient_release": GradientRelease()},
    "released dice": {"optimizer": MODES["stochastic"], "dtype": "bfloat16", "gradient_release": GradientRelease()},
}


def made(shapes: dict[str, tuple[int, ...]], share: float = 0.3, seed: int = 0) -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=dice) < share for name, shape in shapes.items()}


def of(masks: dict[str, torch.Tensor]) -> Subnetwork:
    return Subnetwork({n: pack(m) for n, m in masks.items()}, {n: tuple(m.shape) for n, m in masks.items()}, "by hand")


@pytest.fixture(scope="module")
def shapes(folder) -> dict[str, tuple[int, ...]]:  # noqa: F811
    return {name: tuple(tensor.shape) for name, tensor in load_file(Path(folder) / "model.safetensors").items()}


@pytest.fixture(scope="module")
def mask(shapes, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    of(made(shapes)).save(path)
    return str(path)


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_what_is_frozen_stays_to_the_bit(folder, shapes, mask, tmp_path, case):  # noqa: F811
    """5 steps; clipped, in several micro-batches where gradients are kept."""
    settings = OPTIMIZERS[case]
    batching = {"batching": WHOLE} if "gradient_release" in settings else {}
    model = module(folder, subnetwork=mask, max_grad_norm=0.5, **batching, **settings)
    model.configure_model()
    start = dict(zip(shapes_of(model), weights(model), strict=True))
    fit(model, tmp_path, steps=5)
    masks, moved = made(shapes), 0
    for (name, old), new in zip(start.items(), weights(model), strict=True):
        differs = old.view(torch.uint8).view(*old.shape, -1) != new.view(torch.uint8).view(*new.shape, -1)
        assert not (differs.any(-1) & ~masks[name]).any(), name
        moved += int(differs.any(-1).sum())
    trained = sum(int(m.sum()) for m in masks.values())
    assert moved > (0.3 if "nearest" in case or "bf16" in case else 0.5) * trained


def shapes_of(model) -> list[str]:
    return [name for name, _ in model.policy.model.named_parameters()]


@pytest.mark.parametrize("case", ["sgd", "adamw", "split", "released", "stochastic"])
def test_a_mask_of_everything_is_the_plain_run(folder, shapes, tmp_path, case):  # noqa: F811
    of({name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}).save(tmp_path / "all.safetensors")
    trained = []
    for path in (None, str(tmp_path / "all.safetensors")):
        model = module(folder, subnetwork=path, batching=WHOLE, max_grad_norm=0.1, **OPTIMIZERS[case])
        fit(model, tmp_path, steps=3)
        trained.append(model)
    assert same(*trained)


def test_the_norm_that_is_clipped_is_that_of_the_subnetwork():
    """Gradient (3, 4, 12), of which 3 and 4 are trained: the norm is 5, not 13."""
    weight = nn.Parameter(torch.zeros(3))
    frozen = Frozen({"w": weight}, of({"w": torch.tensor([True, True, False])}))
    (weight * torch.tensor([3.0, 4.0, 12.0])).sum().backward()
    assert float(torch.nn.utils.clip_grad_norm_([weight], 1.0)) == 5.0
    frozen.close()
    weight.grad = None
    weight.sum().backward()
    assert weight.grad.tolist() == [1.0, 1.0, 1.0]


def test_a_gradient_that_is_not_finite_is_frozen_too():
    gradient = torch.tensor([float("nan"), 1.0, float("-inf")])
    freeze_(gradient, pack(torch.tensor([False, True, False])))
    assert gradient.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("entries", [0, 1, 7, 8, 9, 8 * CHUNK_BYTES + 3])
def test_packing_is_lossless_and_freezing_follows_it(entries):
    mask = torch.rand(entries) < 0.5
    packed = pack(mask)
    assert packed.nbytes == -(-entries // 8)
    assert torch.equal(unpack(packed, entries), mask)
    tensor = torch.ones(entries)
    freeze_(tensor, packed)
    assert torch.equal(tensor, mask.float())


def test_a_file_gives_back_what_was_saved(tmp_path, shapes):
    subnetwork = of(made(shapes))
    subnetwork.save(tmp_path / "m.safetensors")
    again = load_subnetwork(tmp_path / "m.safetensors")
    assert (again.shapes, again.made) == (subnetwork.shapes, "by hand")
    assert all(torch.equal(bits, again.bits[name]) for name, bits in subnetwork.bits.items())
    masks = made(shapes)
    assert again.counts() == {name: (int(m.sum()), m.numel()) for name, m in masks.items()}
    assert all(torch.equal(again.mask(name), m) for name, m in masks.items())


@pytest.mark.parametrize("with_base", [False, True])
def test_a_delta_is_the_mask_of_what_it_changes(folder, shapes, tmp_path, with_base):  # noqa: F811
    base = load_file(Path(folder) / "model.safetensors")
    masks = made(shapes, 0.1)
    delta = SparseDelta.capture(base, {n: torch.where(masks[n], t + 1, t) for n, t in base.items()}, digests=True)
    save_delta(tmp_path / "d.safetensors", delta, base if with_base else None)
    found = open_subnetwork(tmp_path / "d.safetensors", base)
    assert all(torch.equal(found.mask(name), m) for name, m in masks.items())
    other = {name: tensor + 1 for name, tensor in base.items()}
    with pytest.raises(ValueError, match="is a delta from other weights than the model's"):
        open_subnetwork(tmp_path / "d.safetensors", other)


def test_one_and_two_processes_train_the_same_subnetwork(folder, shapes, mask, tmp_path):  # noqa: F811
    subnetwork_worker.train(folder, mask, str(tmp_path))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(subnetwork_worker.__file__)
    path = os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [*launch, str(script), folder, mask, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    start, masks = load_file(Path(folder) / "model.safetensors"), made(shapes)
    for case in subnetwork_worker.CASES:
        one, two = (torch.load(tmp_path / f"{case} {n}.pt", weights_only=True) for n in (1, 2))
        assert one["held"] == sum(-(-m.numel() // 8) for m in masks.values())
        assert one["held"] <= two["held"] <= one["held"] + 2 * len(masks)  # each shard has whole bytes
        for name, first in one["weights"].items():
            second, old = two["weights"][name], start[name].to(first.dtype)
            assert torch.equal(second[~masks[name]], old[~masks[name]])
            assert torch.equal(first[~masks[name]], old[~masks[name]])
            assert float((second - first).abs().max()) < 2e-3
        assert any(not torch.equal(start[name].to(t.dtype), t) for name, t in two["weights"].items())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            partial(torch.optim.AdamW, lr=1e-9),
            r"AdamW with weight_decay 0\.01 would move what is frozen; set it to 0\.0",
        ),
        (partial(torch.optim.SGD, lr=0.1, weight_decay=0.1), r"SGD with weight_decay 0\.1 would move"),
        (partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0, eps=0.0), "AdamW moves entries whose gradients are 0"),
        (partial(torch.optim.Muon, lr=0.1, weight_decay=0.0), "Muon moves entries whose gradients are 0"),
        (partial(torch.optim.ASGD, lr=0.1), "ASGD moves entries whose gradients are 0"),
    ],
)
def test_optimizers_that_move_what_is_frozen_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        check_freezes(make, torch.float32)


def test_a_step_with_our_sgd_is_not_refused():
    for mode in MODES.values():
        check_freezes(mode, torch.bfloat16)
    check_freezes(partial(SGD, lr=1.0), torch.float32)


def test_bad_masks_are_one_line_before_training(folder, shapes, mask, tmp_path):  # noqa: F811
    def refused(says: str, path: Path | str, **settings) -> None:
        with pytest.raises(ValueError, match=says) as found:
            module(folder, subnetwork=str(path), **settings).configure_model()
        assert "\n" not in str(found.value)

    refused(r"model\.subnetwork: there is no file .*nowhere", tmp_path / "nowhere")
    refused(r"model\.subnetwork is for the weights themselves; leave it or lora out", mask, lora=LoRA())
    refused("with weight_decay 0.01", mask, optimizer=partial(torch.optim.AdamW, lr=1.0))
    masks = made(shapes)
    first = next(iter(masks))
    for says, wrong in (
        (
            r"it has no tensor '.*' \(1 such in all\); it is of another model",
            {n: m for n, m in masks.items() if n != first},
        ),
        ("the model does not train a tensor 'h.0.w'", masks | {"h.0.w": torch.ones(3, dtype=torch.bool)}),
        (r"is \[3, 5\] there, \[.*\] in the model; it is of another model", masks | {first: torch.ones(3, 5).bool()}),
        ("the mask is empty: nothing would be trained", {n: torch.zeros_like(m) for n, m in masks.items()}),
    ):
        of(wrong).save(tmp_path / "wrong.safetensors")
        refused(says, tmp_path / "wrong.safetensors")
    damaged = bytearray(Path(mask).read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    refused("is damaged: its checksum differs", tmp_path / "damaged")
    (tmp_path / "short").write_bytes(damaged[:100])
    refused("is no safetensors file, or damaged", tmp_path / "short")
    save_file({"a": torch.ones(3)}, tmp_path / "other.safetensors")
    refused("is no delta file", tmp_path / "other.safetensors")


def test_the_bytes_of_a_mask_are_logged_counted_and_predicted(folder, shapes, mask, tmp_path):  # noqa: F811
    model = module(folder, subnetwork=mask)
    trainer = fit(model, tmp_path, steps=1)
    expected = sum(-(-torch.Size(shape).numel() // 8) for shape in shapes.values())
    assert float(trainer.callback_metrics["memory/subnetwork_bytes"]) == expected
    owners = Owners()
    with owners.watching(model):
        pass
    assert owners.peaks[""]["subnetwork"] == expected
    config = json.loads((Path(folder) / "config.json").read_text())
    with_mask, without = (predict(config, Run(subnetwork=given)).peak.held for given in (True, False))
    assert (with_mask.subnetwork, with_mask.total - without.total) == (expected, expected)
    config = read_config(find_config("sgd.yaml"), ["--model.subnetwork", mask])
    assert run_of(config)[0].subnetwork
