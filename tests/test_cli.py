"""The command line as a user meets it."""

from __future__ import annotations

import csv
import glob
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlvr_lightning.configuration import PACKAGED, find_config, packaged_configs, resolve_config_arguments
from rlvr_lightning.study.plan import read_sweep

ROOT = Path(__file__).parent.parent


def rlvr(*argv: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rlvr_lightning", *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole fit of 3 steps, away from the checkout."""
    cwd = tmp_path_factory.mktemp("cwd")
    small = ["--trainer.max_steps=3", "--trainer.val_check_interval=3", "--data.val.arithmetic.num=24"]
    done = rlvr("fit", "--config", "sgd.yaml", *small, "--completions.every_n_steps=2", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "3 optimizer steps in" in done.stdout
    return cwd / "runs" / "sgd" / "version_0"


def test_a_run_folder_holds_what_the_readme_says(run: Path) -> None:
    for name in (
        "config.yaml",
        "metrics.csv",
        "completions.jsonl",
        "memory.json",
        "sparsity.jsonl",
        "checkpoints/last.ckpt",
    ):
        assert (run / name).stat().st_size > 0, name
    samples = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert {"prompt", "completion", "reward"} <= set(samples[0])
    assert json.loads((run / "memory.json").read_text())["peak_bytes"] > 100 << 20


def test_metrics_have_the_documented_names(run: Path) -> None:
    seen = {name for row in rows(run) for name, value in row.items() if value}
    assert seen >= {
        "reward/mean", "reward/std", "reward/answer", "reward/no_signal_frac", "policy/kl", "policy/entropy",
        "policy/clip_frac", "policy/ratio_mean", "response/length_mean", "response/truncated_frac",
        "val/arithmetic/pass@1", "val/arithmetic/greedy_pass@1", "memory/peak_bytes", "memory/optimizer_state_bytes",
        "update/changed_frac/bf16", "update/changed_frac/fp32", "update/changed_frac_total/bf16", "update/grad_norm",
        "time/rollout_s", "time/reward_s", "time/train_s", "tokens/per_s",
    }  # fmt: skip
    ratios = [float(row["policy/fresh_ratio_mean"]) for row in rows(run) if row["policy/fresh_ratio_mean"]]
    assert ratios == pytest.approx([1.0] * 3, abs=1e-4)
    assert {row["memory/optimizer_state_bytes"] for row in rows(run) if row["memory/optimizer_state_bytes"]} == {"0.0"}


def test_the_saved_config_repeats_the_run(run: Path, tmp_path: Path) -> None:
    done = rlvr("fit", "--config", str(run / "config.yaml"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = rows(tmp_path / "runs" / "config" / "version_0")
    for name in ("reward/mean", "response/length_mean", "update/grad_norm", "val/arithmetic/pass@1"):
        before = [row[name] for row in rows(run) if row[name]]
        assert before
        assert [row[name] for row in again if row[name]] == before


def test_resuming_continues(run: Path, tmp_path: Path) -> None:
    small = ["--trainer.max_steps=4", "--trainer.val_check_interval=3", "--data.val.arithmetic.num=24"]
    done = rlvr("fit", "--config=sgd.yaml", *small, "--ckpt_path", str(run / "checkpoints/last.ckpt"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = [row["step"] for row in rows(tmp_path / "runs/sgd/version_0") if row["reward/mean"]]
    assert steps == ["3"]


def test_validate_measures_a_checkpoint(run: Path, tmp_path: Path) -> None:
    small = ["--data.val.arithmetic.num=24", "--ckpt_path", str(run / "checkpoints/last.ckpt")]
    done = rlvr("validate", "--config=sgd.yaml", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    at_end = [row["val/arithmetic/greedy_pass@1"] for row in rows(run) if row["val/arithmetic/greedy_pass@1"]][-1]
    measured = [row["val/arithmetic/greedy_pass@1"] for row in rows(tmp_path / "runs/sgd/version_0")]
    assert float(measured[-1]) == pytest.approx(float(at_end))


def test_help_is_quick(tmp_path: Path) -> None:
    started = time.monotonic()
    done = rlvr("--help", cwd=tmp_path)
    assert "fit" in done.stdout
    assert time.monotonic() - started < 1.5
    for heavy in ("torch", "lightning", "transformers"):
        probe = f"import sys, rlvr_lightning.__main__ as m; m.main(['--help']); assert {heavy!r} not in sys.modules"
        assert subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


def test_fit_help_explains_the_settings(tmp_path: Path) -> None:
    done = rlvr("fit", "--model.help", "rlvr_lightning.grpo.GRPO", cwd=tmp_path)
    assert "completions per prompt, G" in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "nope.yaml"], "--config: no file 'nope.yaml' here, nor among the packaged: adamw.yaml,"),
        (["--model.grop_size", "3"], "model: unknown option 'grop_size' of GRPO; did you mean 'group_size'?"),
        (["--model.optimizer.lrr", "3"], "model.optimizer: unknown option 'lrr' of SGD; did you mean 'lr'?"),
        (["--model.optimizer", "torch.optim.Nope"], "model.optimizer: module 'torch.optim' has no attribute 'Nope'"),
        (
            ["--model.advantage", "median"],
            "model.advantage: expected one of ['mean', 'mean_std', 'leave_one_out'], got median",
        ),
        (["--model.group_size", "1"], "group_size must be at least 2, got 1"),
        (["--model.model", "/no/such"], "model: no folder '/no/such'"),
        (["--data.prompts_per_step", "0"], "data.prompts_per_step must be at least 1, got 0"),
        (["--data.max_prompt_tokens", "1"], "is empty: all"),
        (["--model.sampling.max_tokens", "100000"], "max_tokens"),
        (
            ["--trainer.callbacks+=rlvr_lightning.callbacks.UpdateSparsity"],
            "trainer.callbacks: UpdateSparsity is there twice; the one that every run has is set by `update_sparsity`",
        ),
    ],
)
def test_mistakes_get_one_line(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlvr_lightning.__main__ import main

    monkeypatch.chdir(tmp_path)
    config = [] if argv[0] == "--config" else ["--config", "sgd.yaml"]
    try:
        status = main(["fit", *config, *argv, "--trainer.accelerator=cpu"])
    except SystemExit as left:
        status = left.code
    assert status == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


def test_unknown_command(tmp_path: Path) -> None:
    done = rlvr("fitt", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown command 'fitt'; one of fit, validate" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m rlvr_lightning sweep --config guards_tiny.yaml --dry_run --redo | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_working_directory_comes_before_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("sgd.yaml") == PACKAGED / "sgd.yaml"
    (tmp_path / "sgd.yaml").write_text("seed_everything: 1\n")
    assert find_config("sgd.yaml") == Path("sgd.yaml")
    assert resolve_config_arguments(["fit", "-c", "sgd.yaml"]) == ["fit", "-c", "sgd.yaml"]


PAIRS = [
    ("sgd.yaml", "adamw.yaml"),
    ("smollm2.yaml", "smollm2_adamw.yaml"),
    ("qwen3_1.7b_math_sgd.yaml", "qwen3_1.7b_math_adamw.yaml"),
    ("qwen3_8b_math_sgd.yaml", "qwen3_8b_math_adamw.yaml"),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_pairs_differ_in_nothing_but_the_optimizer(one: str, other: str) -> None:
    configs = [yaml.safe_load((PACKAGED / name).read_text()) for name in (one, other)]
    optimizers = [config["model"]["init_args"].pop("optimizer") for config in configs]
    assert configs[0] == configs[1]
    assert optimizers[0]["class_path"].endswith("SGD")
    assert optimizers[1]["class_path"].endswith("AdamW")


@pytest.mark.parametrize("name", packaged_configs())
def test_packaged_configs_parse(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = (PACKAGED / name).read_text().splitlines()[0]
    assert header.startswith("# ")
    if "configs" in yaml.safe_load((PACKAGED / name).read_text()):
        assert list(read_sweep(PACKAGED / name).runs())
        return
    from rlvr_lightning.cli import main

    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", name, "--print_config"])
    assert left.value.code in (0, None), capsys.readouterr().err
    assert "class_path" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--model=rlvr_lightning.rloo.RLOO"], ["--model.group_size=4"]])
def test_a_seed_reaches_a_model_of_another_class_too(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`seed: ${seed_everything}` is no number when the other class takes settings over."""
    from rlvr_lightning.cli import main

    with pytest.raises(SystemExit):
        main(["fit", "--config=sgd.yaml", *words, "--seed_everything=3", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["seed"] == printed["data"]["init_args"]["seed"] == 3


@pytest.mark.parametrize("kind", ["wheel", pytest.param("sdist", marks=pytest.mark.slow)])
def test_distributions_work_away_from_the_checkout(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"  # an earlier build lies in ROOT, whose modules would be packaged, too
    left = shutil.ignore_patterns("build", "dist", "*.egg-info", ".*", "results", "tests", "runs", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left)
    build = [sys.executable, "-m", "build", f"--{kind}", "--outdir", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True)
    [artefact] = [path for path in tmp_path.iterdir() if path.name.endswith((".whl", ".tar.gz"))]
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, artefact]
    subprocess.run(pip, check=True, capture_output=True)
    here, there = (set(glob.glob("rlvr_lightning/**/*.py", root_dir=root, recursive=True)) for root in (ROOT, target))
    assert there == here  # a room that is not packaged is missed only by who installs from a wheel
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    fit = [sys.executable, "-m", "rlvr_lightning", "fit", "--config", "sgd.yaml", "--trainer.max_steps=1"]
    fit += ["--data.val.arithmetic.num=8"]
    done = subprocess.run(fit, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    probe = [sys.executable, "-c", "import rlvr_lightning; print(rlvr_lightning.__file__)"]
    where = subprocess.run(probe, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert str(target) in where
