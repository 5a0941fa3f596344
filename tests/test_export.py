"""Exported folders against the modules they come from."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from test_checkpoint import saving
from test_grpo import fit, folder, module  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlvr_lightning.__main__ import main
from rlvr_lightning.export import kept_steps
from rlvr_lightning.optim import SGD
from rlvr_lightning.policy import LoRA

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def run(folder: str, path: Path, delta: bool = True, steps: int = 4, **settings):  # noqa: F811
    """A run with every second step kept; the module at its end."""
    defaults = {"dtype": "bfloat16", "compute_dtype": "bfloat16", "optimizer": partial(SGD, lr=0.5)}
    model = module(folder, **defaults | settings)
    keep = ModelCheckpoint(path / "checkpoints", every_n_train_steps=2, save_top_k=-1)
    trainer = saving(path) | {"callbacks": [keep]}
    if not delta:
        del trainer["plugins"]
    fit(model, path, steps=steps, **trainer)
    written = {"model": folder, "dtype": "bfloat16", "lora": None}
    (path / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": written}}))
    return model


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_exported_folder_is_the_module_bit_for_bit(folder, tmp_path: Path, delta, dtype, capsys) -> None:  # noqa: F811
    end = run(folder, tmp_path / "run", delta, dtype=dtype, compute_dtype=dtype)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "exported step 4" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == getattr(torch, dtype)
    assert torch.equal(logits(loaded), logits(end.policy.model))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == end.tokenizer.eos_token_id
    middle = run(folder, tmp_path / "half", delta, steps=2, dtype=dtype, compute_dtype=dtype)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "two"), "--step", "2"]) == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "two")), logits(middle.policy.model))


def test_adapters_are_merged(folder, tmp_path: Path, capsys) -> None:  # noqa: F811
    end = run(folder, tmp_path / "run", dtype="float32", compute_dtype="float32", lora=LoRA(rank=2))
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "adapters merged" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(end.policy.model), atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name in loaded.state_dict())


def test_what_it_refuses(folder, tmp_path: Path, capsys) -> None:  # noqa: F811
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    run(str(moved), tmp_path / "run")
    source, out = str(tmp_path / "run"), str(tmp_path / "out")

    def error(*arguments: str) -> str:
        assert main(["export", *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "step 3 was not kept; these were: 2, 4" in error(source, "--out", out, "--step", "3")
    assert "no checkpoints" in error(str(moved), "--out", out)
    assert f"there is no {tmp_path / 'nowhere'}" in error(str(tmp_path / "nowhere"), "--out", out)
    shutil.rmtree(moved)
    assert f"no folder {str(moved)!r}" in error(source, "--out", out)
    assert "starts from other weights" in error(source, "--out", out, "--model", _other(folder, tmp_path))
    assert not Path(out).exists()
    assert main(["export", source, "--out", out, "--model", folder]) == 0
    assert "is not empty; choose another, or --force" in error(source, "--out", out, "--model", folder)
    (Path(out) / "model-00001-of-00002.safetensors").touch()
    assert main(["export", source, "--out", out, "--model", folder, "--force"]) == 0
    assert [path.name for path in Path(out).glob("*.safetensors")] == ["model.safetensors"]
    assert [one.step for one in kept_steps(tmp_path / "run")] == [2, 4]


def _other(folder: str, tmp_path: Path) -> str:  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    model.save_pretrained(other)
    return str(other)
