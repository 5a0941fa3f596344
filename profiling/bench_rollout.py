"""Tokens per second of HFEngine against `model.generate`: `python -m rlvr_lightning.profiling.bench_rollout`.

Both sides sample from the same model, for the same prompts, on the same machine, in turn. Every completion has a
prescribed length, spread evenly from `--shortest` to `--longest`: `generate` learns it from a stopping criterion for
each sequence, HFEngine from its own test for the end of a completion. Only tokens up to that length count, on both
sides. `generate` runs as users run it: prompts padded on the left in one batch, `num_return_sequences`, sdpa, cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from rlvr_lightning.rollout import HFEngine
from rlvr_lightning.schema import Sampling

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-random": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "tiny-random": {
        "model_type": "qwen3",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
}


class FixedLengths(HFEngine):
    """The engine, except that rollout r ends after `lengths[r]` tokens."""

    lengths: Tensor

    def stopped(self, rows: Tensor, counts: Tensor, tokens: Tensor) -> Tensor:
        """See `HFEngine.stopped`."""
        return counts + 1 >= self.lengths[rows]


class StopAtLength(transformers.StoppingCriteria):
    """The same for `model.generate`."""

    def __init__(self, lengths: Tensor, prompt_tokens: int) -> None:
        self.total = lengths + prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Bool [R]: which sequences have their length."""
        return input_ids.shape[1] >= self.total


def build_model(name: str) -> Any:
    """A model of a known shape with random weights, or the one in a folder."""
    torch.manual_seed(0)
    if name in SHAPES:
        shape = dict(SHAPES[name])
        config = transformers.AutoConfig.for_model(shape.pop("model_type"), max_position_embeddings=2048, **shape)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.eval()


def left_padded(prompts: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """int64 [P, S] ids and attention mask."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def baseline(model: Any, prompts: list[list[int]], group: int, lengths: Tensor) -> Callable[[], Any]:
    """A call of `model.generate` for the whole batch."""
    ids, mask = left_padded(prompts, 0)
    criteria = transformers.StoppingCriteriaList([StopAtLength(lengths, ids.shape[1])])
    settings = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=group,
        max_new_tokens=int(lengths.max()),
        use_cache=True,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    model.set_attn_implementation("sdpa")
    return lambda: model.generate(
        input_ids=ids, attention_mask=mask, generation_config=settings, stopping_criteria=criteria
    )


def ours(model: Any, prompts: list[list[int]], group: int, lengths: Tensor, max_batch: int) -> Callable[[], Any]:
    """A call of HFEngine for the same completions."""
    engine = FixedLengths(model, stop_token_ids=[], pad_token_id=0, max_batch=max_batch)
    engine.lengths = lengths
    sampling = Sampling(max_tokens=int(lengths.max()))
    seeds = range(len(prompts))

    def call() -> None:
        rollouts = engine.generate(prompts, group, sampling, seeds)
        assert torch.equal(rollouts.lengths, lengths), "completions of the wrong length were measured"

    return call


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time both sides in turn, after a warm-up of each; the record of it."""
    model = build_model(args.model)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.linspace(args.prompt_shortest, args.prompt_longest, args.prompts).round().long()
    vocab = model.config.vocab_size
    prompts = [torch.randint(1, vocab, (int(n),), generator=generator).tolist() for n in sizes]
    total = args.prompts * args.group
    spread = torch.linspace(args.shortest, args.longest, total).round().long()
    lengths = spread[torch.randperm(total, generator=generator)]
    sides = {
        "generate": baseline(model, prompts, args.group, lengths),
        "engine": ours(model, prompts, args.group, lengths, args.max_batch),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(args.repeats + 1):
        for name, call in sides.items():
            taken = seconds(call)
            if repeat:
                times[name].append(taken)
    tokens = int(lengths.sum())
    per_s = {name: tokens / statistics.median(t) for name, t in times.items()}
    return {
        "command": "python -m rlvr_lightning.profiling.bench_rollout " + " ".join(sys.argv[1:]),
        "model": args.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompts": args.prompts,
        "group": args.group,
        "prompt_tokens": sizes.tolist(),
        "completion_tokens_total": tokens,
        "completion_tokens_shortest": int(lengths.min()),
        "completion_tokens_longest": int(lengths.max()),
        "seconds_s": times,
        "median_tokens_per_s": per_s,
        "ratio": per_s["engine"] / per_s["generate"],
        "cpu": cpu_name(),
        "torch_threads": torch.get_num_threads(),
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def cpu_name() -> str:
    """As the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="tiny-random", help=f"one of {', '.join(SHAPES)}, or a model folder")
    p.add_argument("--prompts", type=int, default=8)
    p.add_argument("--group", type=int, default=16, help="completions of each prompt")
    p.add_argument("--prompt-shortest", type=int, default=64, help="tokens")
    p.add_argument("--prompt-longest", type=int, default=128, help="tokens")
    p.add_argument("--shortest", type=int, default=4, help="tokens of the shortest completion")
    p.add_argument("--longest", type=int, default=128, help="tokens of the longest completion")
    p.add_argument("--max-batch", type=int, default=128, help="sequences the engine decodes at once")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--out", type=Path, default=Path("results"), help="folder of the record")
    return p


def main() -> None:
    """Measure, print, and write the record."""
    args = parser().parse_args()
    record = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"bench_rollout_{Path(args.model).name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    for name, value in record["median_tokens_per_s"].items():
        print(f"{name:>10} {value:10.1f} tokens/s")
    print(f"{'ratio':>10} {record['ratio']:10.2f}   ({path})")


if __name__ == "__main__":
    main()
