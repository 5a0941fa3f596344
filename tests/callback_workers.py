"""Programs that the tests of the callbacks run as processes of their own: `python callback_workers.py NAME ARGS`."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn


def mixed(out: str) -> None:
    """One of two ranks, after a run: counts a sharded, a replicated and a plain parameter; writes `mixed RANK.json`."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from rlvr_lightning.callbacks.change_meter import ChangeMeter
    from rlvr_lightning.callbacks.optimizer_state import count_state

    first = dist.get_rank() == 0
    mesh = init_device_mesh("cpu", (2,))
    shard = nn.Parameter(distribute_tensor(torch.ones(7, 5), mesh, [Shard(0)]))  # 4 + 3 rows
    copy = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
    plain = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([shard, copy, plain], lr=1.0, momentum=0.9)
    meter = ChangeMeter(optimizer, {}, ["bf16"], Path(out), total=False, first_rank=first)
    meter.before_step()
    for weight in (shard, copy, plain):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    counts = meter.counts()
    entries = count_state(optimizer, first_rank=first)
    owned = torch.tensor(sum(entry.owned_bytes for entry in entries))
    dist.all_reduce(counts)
    dist.all_reduce(owned)
    local = sum(entry.local_bytes for entry in entries)
    result = {"counts": counts.tolist(), "owned": int(owned), "local": local}
    Path(out, f"mixed {dist.get_rank()}.json").write_text(json.dumps(result))


def interruptible(folder: str, total: str, step_s: str, val_s: str, checkpoint: str = "") -> None:
    """Trains one weight by 1 a step, slowly; says READY and the step on stdout; validates every 4 batches."""
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader

    from rlvr_lightning.callbacks import SaveOnInterrupt

    class Slow(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def training_step(self, batch, batch_idx):
            print("STEP", self.global_step, float(self.weight), flush=True)
            time.sleep(float(step_s))
            self.log("weight", float(self.weight))
            return -self.weight.sum()

        def validation_step(self, batch, batch_idx):
            print("VALIDATION", batch_idx, flush=True)
            time.sleep(float(val_s))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    trainer = pl.Trainer(
        max_steps=int(total),
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[SaveOnInterrupt()],
        enable_model_summary=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        val_check_interval=4,
        num_sanity_val_steps=0,
    )
    module = Slow()
    trainer.fit(module, DataLoader(torch.zeros(100)), DataLoader(torch.zeros(3)), ckpt_path=checkpoint or None)
    print("DONE", trainer.global_step, float(module.weight), flush=True)


def trained(folder: str, out: Path, case: str) -> dict[str, Any]:
    """Train with all callbacks, in as many processes as there are; returns what this process learned of it."""
    from precision_modes import MODES, WHOLE
    from test_grpo import fit, module

    from rlvr_lightning.callbacks import (
        CompletionTable,
        GPUMemory,
        OptimizerState,
        UpdateSparsity,
        WhySparse,
        snapshots,
    )
    from rlvr_lightning.experience import Batching
    from rlvr_lightning.losses import Objective
    from rlvr_lightning.optim import GradientRelease
    from rlvr_lightning.rewards.base import Reward
    from rlvr_lightning.strategy import Sharded

    class TokenSum(Reward):
        def __call__(self, samples):
            return [float(sum(s.token_ids) % 3) for s in samples]

    world = int(os.environ.get("WORLD_SIZE", 1))
    snapshots.CHUNK_BYTES["cpu"] = 64  # so that only a tensor that should not be there is large
    cases: dict[str, dict[str, Any]] = {
        "split": {"objective": Objective(kl_coef=0.1), "batching": Batching(micro_batch=4)},
        "released": {"gradient_release": GradientRelease(), "batching": WHOLE, "max_grad_norm": 1.0},
        "adamw": {"optimizer": partial(torch.optim.AdamW, lr=1e-3)},
    }
    cases |= dict.fromkeys(("replicas", "copies", "full disk"), cases["split"])
    settings = {"optimizer": MODES["split"], "dtype": "bfloat16", "rewards": {"r": TokenSum()}, "max_grad_norm": 0}
    settings |= cases[case]
    strategy: Any = "auto"
    if world > 1:
        strategy = Sharded(timeout_s=60, replicate=2 if case in ("replicas", "copies") else 1)
    full_disk = case == "full disk" and os.environ.get("RANK") == "1"
    write = snapshots.Snapshot.write
    snapshots.Snapshot.write = no_space if full_disk else write
    seen = Seen()
    sparsity = seen.watch(UpdateSparsity(every_n_steps=1), "on_train_start", "_before_step", "_after_step")
    state = seen.watch(OptimizerState(), "on_before_optimizer_step", "on_train_batch_end")
    truth = Truth()
    callbacks = [truth, sparsity, state, GPUMemory(), CompletionTable(every_n_steps=1), WhySparse(1, 10**6)]
    callbacks += [KnownGradients()] if case != "released" else []
    metrics: list[dict[str, float]] = []
    torch.manual_seed(0)
    model = module(folder, **settings)
    log = model.log_dict

    def log_dict(values, *args, **kwargs):
        metrics.append({name: float(value) for name, value in values.items()})
        log(values, *args, **kwargs)

    model.log_dict = log_dict
    run = out / f"{case} {world}"
    trainer = fit(model, run, 3, 4, strategy=strategy, devices=world, logger=False, callbacks=callbacks)
    snapshots.Snapshot.write = write
    parameters = list(model.policy.parameters())
    return {
        "rank": trainer.global_rank,
        "metrics": {name: [m[name] for m in metrics if name in m] for name in sorted({n for m in metrics for n in m})},
        "truly_changed": truth.changed,
        "largest_allocation": seen.largest,
        "largest_weight": max(p.numel() * p.element_size() for p in parameters),
        "entries": sum(p.numel() for p in parameters),
        "entries_here": [getattr(p, "to_local", lambda p=p: p)().numel() for p in parameters],
        "collectives": sorted(seen.collectives),
    }


def no_space(*_: Any) -> None:
    raise OSError("No space left on device")


class KnownGradients(Callback):
    """Gradients that depend on nothing, so that weights are the same to the bit in any number of processes."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        from torch.distributed.tensor import distribute_tensor

        dice = torch.Generator().manual_seed(trainer.global_step)
        for p in pl_module.policy.parameters():
            grad = torch.randn(p.shape, generator=dice).mul_(0.003).to(p.dtype)
            p.grad.copy_(distribute_tensor(grad, p.device_mesh, p.placements) if hasattr(p, "placements") else grad)


class Truth(Callback):
    """Counts changed entries on whole tensors, which no callback under test may do."""

    def __init__(self) -> None:
        self.changed: list[int] = []

    @staticmethod
    def whole(pl_module) -> list[torch.Tensor]:
        weights = (p.detach() for p in pl_module.policy.parameters())
        return [getattr(w, "full_tensor", lambda w=w: w)().clone().view(torch.int16) for w in weights]

    def on_train_batch_start(self, trainer, pl_module, *_) -> None:
        self.before = self.whole(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        pairs = zip(self.before, self.whole(pl_module), strict=True)
        self.changed.append(sum(int((old != new).sum()) for old, new in pairs))


class Seen:
    """The largest tensor that watched methods make, and what they send between processes."""

    def __init__(self) -> None:
        self.largest = 0
        self.collectives: set[str] = set()

    def watch(self, callback: Any, *methods: str) -> Any:
        from rlvr_lightning.profiling.allocations import AllocationCounter

        seen = self

        class Mode(AllocationCounter):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.namespace == "c10d":
                    seen.collectives.add(func.name())
                return super().__torch_dispatch__(func, types, args, kwargs)

        def note(label: str, size: int) -> str:
            seen.largest = max(seen.largest, size)
            return label

        def counted(method, *args):
            with Mode(classify=note):
                return method(*args)

        for name in methods:
            setattr(callback, name, partial(counted, getattr(callback, name)))
        return callback


def training(folder: str, out: str, *cases: str) -> None:
    """Runs cases of `trained`, and `mixed`; each process writes CASE WORLD RANK.json."""
    for case in cases:
        if case == "mixed":
            mixed(out)
            continue
        found = trained(folder, Path(out), case)
        name = f"{case} {os.environ.get('WORLD_SIZE', 1)} {found['rank']}.json"
        Path(out, name).write_text(json.dumps(found))


if __name__ == "__main__":
    import conftest  # noqa: F401 (sets one thread)

    {"interruptible": interruptible, "training": training}[sys.argv[1]](*sys.argv[2:])
