"""vLLM in the training process."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from rlvr_lightning.rollout.vllm.requests import Answer, Request, memory_folder, one_line, remedy
from rlvr_lightning.rollout.vllm.sync import Part


class Colocated:
    """An engine in this process: each rank of a run has one for its own prompts.

    Starting it leaves the global random numbers of torch as they were. It asks torch.distributed for a group of its
    own, so that must be initialised before, if it is to be used.

    Raises:
        ValueError: vLLM cannot start with these options.
    """

    def __init__(self, options: dict[str, Any], sleeps: bool) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where tensors need not be sent
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if options["enforce_eager"]:
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # on a CPU it compiles C++ for half a minute
        with _same_random_numbers():
            from vllm import LLM

            try:
                self.llm = LLM(**options, enable_sleep_mode=sleeps, disable_log_stats=True)
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"rollout: vLLM cannot start: {one_line(str(error))}{remedy(str(error))}") from error
        self.sleeps = sleeps
        self._adapter: Any = None
        self._adapters = 0
        self._folder = Path(tempfile.mkdtemp(prefix="rlvr-adapter-", dir=memory_folder()))
        self.llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})

    def sample(self, requests: Sequence[Request], options: dict[str, Any]) -> dict[int, list[Answer]]:
        """Completions by the place of their request."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=list(request.prompt)) for request in requests]
        each = [SamplingParams(**options, n=request.num, seed=request.seed) for request in requests]
        made = self.llm.generate(prompts, each, lora_request=self._adapter, use_tqdm=False)
        return {k: [answer_of(one) for one in sorted(m.outputs, key=lambda o: o.index)] for k, m in enumerate(made)}

    def recover(self) -> None:
        """What this process could lose it has lost with itself."""
        raise RuntimeError("rollout: vLLM did not finish its requests")

    def update(self, parts: Iterator[Part]) -> int:
        """Take in weights; returns the bytes that came."""
        size = 0
        self.llm.collective_rpc("start_weight_update")
        try:
            for part in parts:
                update = {"shapes": part.shapes, "tensors": part.tensors}
                self.llm.collective_rpc("update_weights", kwargs={"update_info": update})
                size += part.nbytes
        except BaseException:
            with suppress(RuntimeError):  # it may have ended by itself; another must be able to begin
                self.llm.collective_rpc("finish_weight_update")
            raise
        self.llm.collective_rpc("finish_weight_update")
        self.llm.reset_prefix_cache()
        return size

    def load_adapter(self, save: Callable[[Path], None]) -> int:
        """Sample with adapters from now on, which `save` writes into a folder; returns their bytes."""
        from vllm.lora.request import LoRARequest

        save(self._folder)
        self._adapters += 1  # a new name: what is known by the old one must not be used
        self._adapter = LoRARequest(f"policy-{self._adapters}", self._adapters, str(self._folder))
        self.llm.llm_engine.add_lora(self._adapter)
        if self._adapters > 1:
            self.llm.llm_engine.remove_lora(self._adapters - 1)
        return sum(file.stat().st_size for file in self._folder.glob("*.safetensors"))

    def digests(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
        """SHA-256 of each tensor that the engine holds."""
        return self.llm.collective_rpc("weight_digests", args=(json.dumps(dict(shapes)),))[0]

    def sleep(self) -> None:
        """Give the memory of the KV cache back, and keep the weights in host memory; a CPU cannot."""
        if self.sleeps:
            self.llm.sleep(level=1)

    def wake(self) -> None:
        """Take it again."""
        if self.sleeps:
            self.llm.wake_up()

    def close(self) -> None:
        """End the engine."""
        self.llm.llm_engine.engine_core.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


def answer_of(made: Any) -> Answer:
    """One of vLLM's completions."""
    tokens = list(made.token_ids)
    logprobs = [at[token].logprob for at, token in zip(made.logprobs, tokens, strict=True)]
    return Answer(tokens, logprobs, made.stop_reason is not None)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    state = torch.random.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
        for index, each in enumerate(cuda):
            torch.cuda.set_rng_state(each, index)
