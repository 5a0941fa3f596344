"""The predicted peak against the counted one, in real GRPO steps of awkward sizes."""

from __future__ import annotations

from typing import Any

import pytest

from rlvr_lightning.profiling.errors import counted
from rlvr_lightning.profiling.predict import predict
from rlvr_lightning.profiling.settings import Run

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
BF16 = {"dtype": "bfloat16", "compute_dtype": "bfloat16"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "micro-batches, nothing recomputed": (LLAMA, {"optimizer": "adamw", "micro_batch": 6}),
    "recomputed": (QWEN, {"optimizer": "sgd", "micro_batch": 12, "activation_checkpointing": True}),
    "released": (
        LLAMA,
        {"optimizer": "sgd_split", "gradient_release": True, "micro_batch": 12, **BF16},
    ),
    "a reference, small micro-batches": (
        QWEN,
        {
            "optimizer": "sgd_split",
            "dtype": "bfloat16",
            "reference": "copy",
            "micro_batch": 3,
            "activation_checkpointing": True,
        },
    ),
    "adapters": (QWEN, {"optimizer": "adamw", "lora_rank": 3, "micro_batch": 6}),
    "adapters, bf16": (LLAMA, {"optimizer": "adamw", "lora_rank": 3, "micro_batch": 6, "max_tokens": 13, **BF16}),
}
SIZES: dict[str, Any] = {
    "group_size": 6,
    "step_completions": 12,
    "rollout_batch": 7,
    "prompt_tokens": 54,
    "max_tokens": 47,
    "compute_dtype": "float32",
    "device": "cpu",
}


@pytest.mark.parametrize("case", CASES)
def test_a_real_step(case: str) -> None:
    config, settings = CASES[case]
    run = Run(**{**SIZES, **settings})
    found, predicted = counted(config, run)[1], predict(config, run)
    error = predicted.peak_bytes / found.peak_bytes - 1
    assert abs(error) < 0.05, (error, predicted.peak, found.peak)
