"""Programs that the tests of the callbacks run as processes of their own: `python callback_workers.py NAME ARGS`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn


def sharded(rank: str, folder: str) -> None:
    """One of two ranks: counts a sharded, a replicated and a plain parameter; writes RANK.json."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from rlvr_lightning.callbacks.change_meter import ChangeMeter
    from rlvr_lightning.callbacks.optimizer_state import count_state

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    shard = nn.Parameter(distribute_tensor(torch.ones(7, 5), mesh, [Shard(0)]))  # 4 + 3 rows
    copy = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
    plain = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([shard, copy, plain], lr=1.0, momentum=0.9)
    meter = ChangeMeter(optimizer, {}, ["bf16"], Path(folder), total=False, first_rank=rank == "0")
    meter.before_step()
    for weight in (shard, copy, plain):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    counts = meter.counts()
    entries = count_state(optimizer)
    owned = torch.tensor(sum(entry.owned_bytes for entry in entries))
    dist.all_reduce(counts)
    dist.all_reduce(owned)
    local = sum(entry.local_bytes for entry in entries)
    result = {"counts": counts.tolist(), "owned": int(owned), "local": local}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


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


if __name__ == "__main__":
    {"sharded": sharded, "interruptible": interruptible}[sys.argv[1]](*sys.argv[2:])
