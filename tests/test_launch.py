"""`fsdp.yaml` as a user starts it, and what `--dry_run` says before."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlvr_lightning.cli import main
from rlvr_lightning.policy import TINY, load_tokenizer

SMALL = ["--trainer.accelerator=cpu", "--trainer.max_steps=2", "--data.val.arithmetic.num=8"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def launch(launcher: list[str], *argv: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK")}
    command = [sys.executable, *launcher, "-m", "rlvr_lightning", *argv]
    settings = clean | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=settings)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_both_launchers_make_one_run_that_speaks_with_one_voice(tmp_path, monkeypatch, capsys) -> None:
    found = {}
    for version, launcher in enumerate(([], TORCHRUN)):
        done = launch(launcher, "fit", "--config", "fsdp.yaml", *SMALL, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        run = tmp_path / "runs" / "fsdp" / f"version_{version}"
        assert done.stdout.count("2 optimizer steps in") == 1
        assert "[rank" not in done.stderr
        assert "Initializing distributed" not in done.stderr
        assert len(re.findall(r"Epoch 0: +0%", done.stdout)) == 1  # one bar
        found[version] = [row["reward/mean"] for row in rows(run) if row["reward/mean"]]
    assert len(list((tmp_path / "runs" / "fsdp").iterdir())) == 2
    assert len(found[0]) == 2
    assert found[0] == found[1]
    monkeypatch.chdir(tmp_path)
    foretold = figures(dry(capsys, "--config", "fsdp.yaml"))
    [*_, last] = [row for row in rows(run) if row["memory/weights_rank_bytes"]]
    for name in ("weights", "gradients", "optimizer_state"):
        measured = float(last[f"memory/{name}_rank_bytes"])
        assert foretold[name.replace("_", " ")] == pytest.approx(measured, abs=0.006 * 2**20), name


def test_what_all_processes_find_wrong_is_said_once(tmp_path: Path) -> None:
    done = launch([], "validate", "--config", "fsdp.yaml", "--trainer.strategy.shard=3", *SMALL[::2], cwd=tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("error: trainer.strategy: shard (3) times replicate (1)")


def test_a_batch_that_cannot_be_shared_is_refused_before_processes_start(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "fsdp.yaml", "--trainer.accelerator=cpu", "--data.prompts_per_step=5"]) == 2
    said = capsys.readouterr()
    assert "data.prompts_per_step (5) must be a multiple of the number of processes (2)" in said.err
    assert "Validation" not in said.out


# ---- dry run ----


def dry(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["fit", *argv, "--dry_run"])
    assert left.value.code == 0
    return capsys.readouterr().out


def figures(text: str) -> dict[str, float]:
    """Bytes by owner."""
    unit = {"MiB": 2**20, "GiB": 2**30}[re.search(r"^per .*(.iB)$", text, re.M)[1]]
    return {name.strip(): float(size) * unit for name, size in re.findall(r"^  (\w[\w, ]+?) +([\d.]+)\b", text, re.M)}


@pytest.fixture
def tiny_7(tmp_path: Path) -> Path:
    """A model whose first dimensions 7 does not divide, without weights."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 70001, "tie_word_embeddings": False}))
    return folder


def test_a_dry_run_counts_the_first_of_seven_uneven_shares(tiny_7, tmp_path, monkeypatch, capsys) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    options = ["--trainer.devices=7", "--data.prompts_per_step=21", f"--model.model={tiny_7}"]
    options += ["--model.optimizer=AdamW", "--model.optimizer.lr=1e-3"]
    text = dry(capsys, "--config", "fsdp.yaml", *options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_7))
    share = sum(
        -(-p.shape[0] // 7) * p[0].numel() * 4 for p in model.parameters()
    )  # rounded up, parameter by parameter
    whole = sum(p.numel() * 4 for p in model.parameters())
    assert share * 7 > whole
    found = figures(text)
    near = 0.006 * 2**20
    for name, size in {"weights": share, "gradients": share, "reference": share, "optimizer state": 2 * share}.items():
        assert found[name] == pytest.approx(size, abs=near), name
    assert found["gathered, sampling"] == pytest.approx(whole, abs=near)
    assert "7 processes (1 node x 7), sharing one model" in text
    assert "21 prompts a batch, 3 in each process, 8 completions of up to 64 tokens for each: 24" in text
    assert "[3473, 11 tokens] '78-5+8-3-1='" in text
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_replicas_layers_and_tensors(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"replicate": 2, "tensor": 2, "rollout": "layers"}
    options = [f"--trainer.strategy.{name}={value}" for name, value in settings.items()]
    options += ["--trainer.devices=8", "--trainer.num_nodes=2", "--trainer.accelerator=gpu"]
    text = dry(capsys, "--config", "fsdp.yaml", *options, "--model.compute_dtype=bfloat16")
    assert "16 processes (2 nodes x 8), 2 copies of the model, each shared by 8, 2 of them computing each layer" in text
    assert "computed in bfloat16, on cuda" in text
    assert "16 prompts a batch, 2 in each process" in text


def test_a_dry_run_of_one_process_and_released_gradients(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    found = figures(dry(capsys, "--config", "lowmem.yaml"))
    assert found["gradients"] == 0
    assert found["weights"] == found["optimizer state"] == pytest.approx(445_760 * 2, abs=0.006 * 2**20)


def test_a_dry_run_refuses_what_the_run_would(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "fsdp.yaml", "--trainer.devices=3", "--dry_run=true"]) == 2
    assert "data.prompts_per_step (16) must be a multiple of" in capsys.readouterr().err


def test_a_dry_run_of_the_papers_config(tmp_path, monkeypatch, capsys) -> None:
    """Its model from a folder without weights, its prompts from a file."""
    pytest.importorskip("math_verify")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    from transformers import Qwen3Config

    sizes = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    Qwen3Config(**sizes, tie_word_embeddings=False).save_pretrained(folder)
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    problems = [{"problem": f"{i}+1=", "solution": rf"\boxed{{{i + 1}}}", "answer": str(i + 1)} for i in range(300)]
    Path("math.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    sources = [
        f"--data.{source}={tmp_path}/math.jsonl" for source in ("train.path", "val.math.path", "test.math500.path")
    ]
    options = [
        f"--model.model={folder}",
        "--data.train.num=300",
        "--data.val.math.num=9",
        "--data.val.math.split=train",
        "--data.test.math500.split=train",
    ]
    machine = ["--trainer.accelerator=gpu", "--trainer.devices=4"]
    text = dry(capsys, "--config", "qwen3_8b_math_sgd.yaml", *sources, *options, *machine)
    found = figures(text)
    assert "8,190,735,360 parameters, stored in float32, computed in bfloat16, on cuda" in text
    assert found["weights"] == pytest.approx(8_190_735_360, rel=1e-3)  # 4 bytes each, by 4 processes
    assert found["optimizer state"] == 0
    assert found["gathered, sampling"] == pytest.approx(2 * 8_190_735_360, rel=1e-3)
    assert "256 prompts a batch, 64 in each process" in text


def test_a_dry_run_of_a_model_that_is_not_at_hand(tmp_path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = launch(
        [], "fit", "--config=sgd.yaml", "--model.model=nobody/nothing-1B", "--dry_run", cwd=tmp_path, **offline
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: model: 'nobody/nothing-1B' is not at hand")
