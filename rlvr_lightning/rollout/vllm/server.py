"""vLLM servers: started on this machine, or found running elsewhere."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from rlvr_lightning.ranks import ALONE, Ranks
from rlvr_lightning.rollout.vllm.http import Lost, call
from rlvr_lightning.rollout.vllm.requests import Answer, Request, memory_folder, one_line, remedy
from rlvr_lightning.rollout.vllm.sync import Part

log = logging.getLogger(__name__)
AT_ONCE = 64
"""Requests in flight at each server; it batches them by itself."""


def command_line(options: Mapping[str, Any], port: int) -> list[str]:
    """How a server with these options of vLLM is started.

    >>> command_line({"model": "m", "enforce_eager": True, "max_model_len": 7}, 80)[-8:]
    ['--model', 'm', '--enforce-eager', '--max-model-len', '7', '--tokens-only', '--port', '80']
    """
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return [*words, "--tokens-only", "--port", str(port)]


class Started:
    """A server on this machine, in processes that end with this one.

    Args:
        options: of vLLM.
        log_file: gets what it prints.
        gpu: CUDA device that it alone sees; None leaves them as they are.
        timeout_s: for the start.

    Raises:
        ValueError: it ended, or did not answer in time; with the end of its log.
    """

    def __init__(self, options: Mapping[str, Any], log_file: Path, gpu: int | None, timeout_s: float) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log_file = f"http://127.0.0.1:{port}", log_file
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}  # opens the routes for weights
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if options.get("enforce_eager"):
            environment.setdefault("TORCH_COMPILE_DISABLE", "1")
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)  # it is no part of our process group
        log_file.parent.mkdir(parents=True, exist_ok=True)
        guard = Path(__file__).with_name("guard.py")
        with log_file.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(guard), *command_line(options, port)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        log.info("rollout: starting a vLLM server at %s, its log is %s", self.url, log_file)
        self._wait(timeout_s)

    def _wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(Lost):
                call(self.url, "/health", None, 5.0)
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                ended = self.process.poll() is not None
                self.close()
                text = self.log_file.read_text(errors="replace").strip()
                tail = one_line(" | ".join(text.splitlines()[-5:]))
                why = "ended" if ended else f"did not answer within rollout.timeout_s = {timeout_s:g} s"
                raise ValueError(f"rollout: the vLLM server {why}{remedy(text)}; the end of {self.log_file}: {tail}")
            time.sleep(0.5)

    @property
    def alive(self) -> bool:
        """Whether its processes are there."""
        return self.process.poll() is None

    def close(self) -> None:
        """End its processes, all of them."""
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Servers:
    """One or several servers that hold the same weights and share the requests.

    Args:
        urls: of all.
        start: starts the own one anew and returns it; None if all run elsewhere.
        folder: for files of weights, which all servers must be able to read.
        timeout_s: for an update, and for a batch of rollouts.
        ranks: that use these servers together; the first starts, updates and recovers them.
    """

    def __init__(
        self,
        urls: Sequence[str],
        start: Callable[[], Started] | None,
        folder: Path | None,
        timeout_s: float,
        ranks: Ranks = ALONE,
    ) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self._start, self.timeout_s, self.ranks = start, timeout_s, ranks
        self.own: Started | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="rlvr-weights-", dir=folder or memory_folder()))
        self.version = 0
        """Of the weights that all servers have."""
        self._adapter = ""
        self.recover()

    def sample(self, requests: Sequence[Request], options: dict[str, Any]) -> dict[int, list[Answer]]:
        """Completions by the place of their request; without those that a lost server left unfinished."""
        found: dict[int, list[Answer]] = {}
        deadline = time.monotonic() + self.timeout_s
        errors: list[Lost] = []
        with ThreadPoolExecutor(AT_ONCE * len(self.urls), "vllm") as threads:
            asked = {
                threads.submit(self._ask, self.urls[k % len(self.urls)], request, options, deadline): k
                for k, request in enumerate(requests)
            }
            for future in as_completed(asked):
                try:
                    found[asked[future]] = future.result()
                except Lost as error:
                    errors.append(error)
        if errors:
            log.warning(
                "rollout: a vLLM server was lost: %d requests unfinished, the first: %s", len(errors), errors[0]
            )
        return found

    def _ask(self, url: str, request: Request, options: dict[str, Any], deadline: float) -> list[Answer]:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise Lost(f"{url}: no time is left of rollout.timeout_s = {self.timeout_s:g}")
        settings = options | {"n": request.num, "seed": request.seed}
        body = {"token_ids": list(request.prompt), "sampling_params": settings}
        body |= {"model": self._adapter} if self._adapter else {}
        told = call(url, "/inference/v1/generate", body, left_s)
        answers = [answer_of(choice) for choice in sorted(told["choices"], key=lambda choice: choice["index"])]
        stale = {version for answer in answers for version in answer.versions} - {str(self.version)}
        if stale:
            raise Lost(f"{url}: sampled with weights of version {stale.pop()}, not {self.version}")
        return answers

    def update(self, parts: Iterator[Part]) -> int:
        """Take in weights; returns the bytes that were sent to each server."""
        size, self.version = 0, self.version + 1
        error = self._all("/start_weight_update", {})
        for part in parts:  # to the end, whatever happens: the ranks gather each together
            size += part.nbytes
            if self.ranks.rank or error:
                continue
            file = self._folder / "part.safetensors"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in part.tensors.items()}, file)
            error = self._all("/update_weights", {"update_info": {"shapes": part.shapes, "file": str(file)}})
            file.unlink()
        error = error or self._all("/finish_weight_update", {"weight_version": str(self.version)})
        error = self.ranks.first(error or self._all("/reset_prefix_cache", {}))
        if error:
            raise Lost(error)
        return size

    def load_adapter(self, save: Callable[[Path], None]) -> int:
        """Sample with adapters from now on, which `save` writes into a folder; returns their bytes."""
        name, old = f"policy-{self.version}", self._adapter
        folder = self._folder / name
        save(folder)
        error = self._all("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if old and not error:
            error = self._all("/v1/unload_lora_adapter", {"lora_name": old})
        if error:
            raise Lost(error)
        self._adapter = name
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        shutil.rmtree(self._folder / old if old else self._folder / "none", ignore_errors=True)
        return size

    def _all(self, path: str, body: Mapping[str, Any]) -> str:
        """Tell all servers, if this is the first rank; returns what went wrong."""
        if self.ranks.rank:
            return ""
        try:
            with ThreadPoolExecutor(len(self.urls)) as threads:
                list(threads.map(lambda url: call(url, path, body, self.timeout_s), self.urls))
        except Lost as error:
            return str(error)
        return ""

    def digests(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
        """SHA-256 of each tensor that the servers hold; "differs" where they do not hold the same."""
        body = {"method": "weight_digests", "args": [json.dumps(dict(shapes))]}
        held = [call(url, "/collective_rpc", body, self.timeout_s)["results"][0] for url in self.urls]
        return {name: digest if all(h[name] == digest for h in held) else "differs" for name, digest in held[0].items()}

    def recover(self) -> None:
        """Make sure that all servers answer: start the own one again, wait for the others.

        Afterwards they may hold any weights.

        Raises:
            RuntimeError: one does not come back in time.
        """
        error = ""
        if self.ranks.rank == 0:
            try:
                self._make_ready()
            except (RuntimeError, ValueError, Lost) as problem:
                error = str(problem)
        self.urls, error = self.ranks.first((self.urls, error))
        if error:
            raise RuntimeError(error)

    def _make_ready(self) -> None:
        if self._start is not None:
            if self.own is not None:
                self.own.close()
            self.own = self._start()
            self.urls = [self.own.url]
        self._adapter = ""
        for url in self.urls:
            self._await(url)
            with contextlib.suppress(Lost):  # of an update that was cut off
                call(url, "/finish_weight_update", {}, self.timeout_s)
            call(url, "/init_weight_transfer_engine", {"init_info": {}}, self.timeout_s)

    def _await(self, url: str) -> None:
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                call(url, "/health", None, 5.0)
                return
            except Lost as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"rollout.urls: {error}; no answer for rollout.timeout_s = {self.timeout_s:g} s"
                    ) from None
            time.sleep(1.0)

    def sleep(self) -> None:
        """A server has its memory to itself."""

    def wake(self) -> None:
        """It does not sleep."""

    def close(self) -> None:
        """End the own server; others stay."""
        if self.own is not None:
            self.own.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def answer_of(choice: Mapping[str, Any]) -> Answer:
    """One of a server's completions."""
    logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    versions = tuple(str(span["version"]) for span in choice.get("weight_versions") or ())
    return Answer(list(choice["token_ids"]), logprobs, choice["stop_reason"] is not None, versions)
