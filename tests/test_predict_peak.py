"""The predicted peak against the counted one, in real GRPO steps of awkward sizes."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from rlvr_lightning.data.prompts import PromptData, PromptSource
from rlvr_lightning.experience import Batching
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim import SGD, GradientRelease
from rlvr_lightning.policy import TINY
from rlvr_lightning.profiling import memory_worker
from rlvr_lightning.profiling.ledger import Ledger
from rlvr_lightning.profiling.owners import Owners
from rlvr_lightning.profiling.predict import predict
from rlvr_lightning.profiling.settings import Run
from rlvr_lightning.rollout.hf import HFEngine
from rlvr_lightning.schema import Sampling

LLAMA = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 3001,
    "tie_word_embeddings": True,
}
QWEN = LLAMA | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": False}
ADAMW, PLAIN, OURS = partial(torch.optim.AdamW, lr=1e-6), partial(torch.optim.SGD, lr=1e-3), partial(SGD, lr=1e-3)
CASES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "micro-batches, nothing recomputed": (LLAMA, ADAMW, {"optimizer": "adamw", "micro_batch": 6}),
    "recomputed": (QWEN, PLAIN, {"optimizer": "sgd", "micro_batch": 12, "activation_checkpointing": True}),
    "released": (
        LLAMA,
        OURS,
        {"optimizer": "sgd_split", "dtype": "bfloat16", "gradient_release": True, "micro_batch": 12},
    ),
    "a reference, small micro-batches": (
        QWEN,
        OURS,
        {
            "optimizer": "sgd_split",
            "dtype": "bfloat16",
            "compute_dtype": "float32",
            "reference": "copy",
            "micro_batch": 3,
            "activation_checkpointing": True,
        },
    ),
}


class Sums(PromptSource):
    """Prompts of one length."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        return {"prompt": "12+34=" * 9}


def counted(folder: Path, make: Any, run: Run) -> tuple[Ledger, int]:
    """Two steps; what was counted, and the tokens of a prompt."""
    model = memory_worker.Shaped(
        str(folder),
        {"parity": memory_worker.LengthParity()},
        make,
        group_size=run.group_size,
        sampling=Sampling(max_tokens=run.max_tokens),
        objective=Objective(kl_coef=0.1 if run.reference != "none" else 0.0),
        batching=Batching(micro_batch=run.micro_batch, rollout_batch=run.rollout_batch),
        activation_checkpointing=run.activation_checkpointing,
        dtype=run.dtype,
        compute_dtype=run.compute_dtype,
        reference="copy",
        gradient_release=GradientRelease() if run.gradient_release else None,
    )
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=2, accelerator="cpu", devices=1, enable_checkpointing=False, **settings)
    owners = Owners()
    with owners.watching(model):
        trainer.fit(model, datamodule=PromptData(str(folder), train=Sums(), prompts_per_step=2))
    return owners.ledger(), len(model.tokenizer(Sums()[0]["prompt"]).input_ids)


@pytest.mark.parametrize("case", CASES)
def test_a_real_step(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HFEngine, "stopped", lambda self, rows, counts, tokens: torch.zeros_like(tokens).bool())
    config, make, settings = CASES[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    sizes = {"group_size": 6, "step_completions": 12, "rollout_batch": 7, "max_tokens": 47, "device": "cpu"}
    run = Run(**{**sizes, **settings})
    found, prompt = counted(tmp_path, make, run)
    predicted = predict(config, Run(**{**sizes, **settings, "prompt_tokens": prompt}))
    error = predicted.peak_bytes / found.peak_bytes - 1
    assert abs(error) < 0.05, (error, predicted.peak, found.peak)
