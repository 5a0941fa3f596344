"""The profile command: tables at once and without torch, what fits, and one line for each mistake."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlvr_lightning.configuration import packaged_configs
from rlvr_lightning.profiling.command import main
from rlvr_lightning.profiling.find_model import find_model
from rlvr_lightning.profiling.fit_into import fit, parse_size
from rlvr_lightning.profiling.overview import KINDS, fewest, overview, scale
from rlvr_lightning.profiling.parameters import count
from rlvr_lightning.profiling.predict import predict
from rlvr_lightning.profiling.run_config import LIKE_GRPO, read_config, run_of
from rlvr_lightning.profiling.settings import Run
from rlvr_lightning.profiling.table import FORMATS, Table, render

ROOT = Path(__file__).parent.parent
GIB = 2**30


def test_at_once_and_without_torch() -> None:
    """The whole process, console table included; the best of three, for the machine may be busy."""
    code = "import sys; from rlvr_lightning.__main__ import main; assert main(['profile']) == 0; "
    code += "assert not {'torch', 'transformers', 'lightning', 'numpy'} & set(sys.modules)"
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
        assert "qwen2.5-0.5b" in done.stdout
        assert "deepseek-v3" in done.stdout
    assert min(seconds) < 1.5


def test_the_table_says_what_is_predicted() -> None:
    table, paper = overview()
    names = [row[0] for row in table.rows if row[0]]
    assert len(table.rows) == len(KINDS) * len(names)
    row = next(k for k, row in enumerate(table.rows) if row[0] == "qwen3-8b")
    adamw, sgd, split = (dict(zip(table.columns, table.rows[row + k], strict=True)) for k in range(3))
    # 4 of weights, 4 of gradients, 8 of moments; no moments; 2 of weights and 2 of low halves
    for found, by_hand in ((adamw, 16), (sgd, 8), (split, 4)):
        assert found["bytes/param"] == pytest.approx(by_hand, abs=1e-4)
    config = find_model("qwen3-8b")[0]
    peak = predict(config, scale("SGD")).peak_bytes / GIB
    assert sgd["GiB, 1 GPU"] == peak
    assert sgd["saved GiB"] == pytest.approx(adamw["GiB, 1 GPU"] - peak)
    assert adamw["GPUs of 80 GB"] > sgd["GPUs of 80 GB"] == 1
    assert paper.rows[0][-1] == pytest.approx(13.6)  # 1.7e9 * (12 - 4) / 1e9
    assert paper.rows[1][-1] == pytest.approx(paper.rows[2][-1], abs=1e-4)


def test_fewest_gpus_is_the_first_that_suffices() -> None:
    config = find_model("qwen3-14b")[0]
    limit = 24 * GIB
    gpus = fewest(config, "SGD", limit)
    assert gpus is not None
    assert gpus > 1
    assert predict(config, scale("SGD", shard=gpus)).peak_bytes <= limit
    assert predict(config, scale("SGD", shard=gpus // 2)).peak_bytes > limit
    assert fewest(config, "SGD", GIB) is None


@pytest.mark.parametrize("name", [n for n in packaged_configs() if "\nmodel:" in (ROOT / "configs" / n).read_text()])
def test_every_packaged_config(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--config", name])
    out, err = capsys.readouterr()
    text = (ROOT / "configs" / name).read_text()
    if any(f".{algorithm}\n" in text for algorithm in LIKE_GRPO):
        assert status == 0, err
        assert "peak:" in out
    else:
        assert (status, err.count("\n")) == (2, 1)


def test_a_config_is_the_run_that_fit_would_make() -> None:
    config = read_config(ROOT / "configs" / "qwen3_8b_math_sgd.yaml", ["--model.batching.micro_batch", "16"])
    run, remarks = run_of(config, gpus=4)
    assert remarks == []
    assert (run.optimizer, run.dtype, run.compute_dtype, run.reference) == ("sgd", "float32", "bfloat16", "none")
    assert (run.shard, run.step_completions, run.micro_batch, run.rollout_batch) == (4, 512, 16, 64)
    assert (run.prompt_tokens, run.max_tokens, run.activation_checkpointing) == (1024, 1024, True)
    low = read_config(
        ROOT / "configs" / "lowmem.yaml", ["--model.optimizer.master=none", "--trainer.accelerator", "cpu"]
    )
    run, _ = run_of(low)
    assert (run.optimizer, run.gradient_release, run.two_pass, run.reference) == ("sgd_bf16", True, True, "delta")
    assert (run.compute_dtype, run.device) == ("float32", "cpu")  # as on a CPU


def test_what_fits() -> None:
    config = find_model("qwen3-1.7b")[0]
    run = Run(optimizer="adamw", step_completions=64, micro_batch=64, prompt_tokens=512, max_tokens=512)
    roomy = fit(config, run, 400 * GIB)
    assert roomy is not None
    assert (roomy.overrides, roomy.run.micro_batch, roomy.run.rollout_batch) == ((), 64, 64)
    for limit in (60 * GIB, 24 * GIB, 12 * GIB, 8 * GIB):
        found = fit(config, run, limit)
        assert found is not None
        assert found.peak_bytes == predict(config, found.run).peak_bytes <= limit
        assert sum("--model.optimizer " in text for text in found.overrides) <= 1
    smaller = fit(config, run, 24 * GIB)
    assert smaller is not None
    assert any("SGD" in text for text in smaller.overrides)  # AdamW's 16 bytes a parameter do not go in
    assert fit(config, run, GIB // 2) is None


def test_overrides_are_those_that_fit_takes() -> None:
    """The real parser takes every override that may be suggested."""
    from rlvr_lightning.profiling.fit_into import changes

    run = Run(optimizer="adamw", reference="copy", shard=2)
    words = [word for text, _ in changes(run) for word in text.replace("LR", "0.1").split()]
    words += ["--model.batching.micro_batch", "128", "--model.batching.rollout_batch", "64", "--trainer.devices", "2"]
    command = [sys.executable, "-m", "rlvr_lightning", "fit", "--config", "fsdp.yaml", *words, "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for line in ("master: split", "rollout: layers", "dtype: bfloat16", "activation_checkpointing: true", "two_pass"):
        assert line in done.stdout


def test_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "qwen3-8b", "--compare", "adamw,sgd, sgd_split", "--format", "json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)
    rows = {row[""]: row for row in table["rows"]}
    parameters = 8_190_735_360
    assert rows["optimizer state GiB"]["adamw"] == pytest.approx((8 * parameters + 4 * 399) / GIB)  # 399 tensors
    assert rows["optimizer state GiB"]["sgd"] == 0
    assert rows["saved GiB"]["sgd"] == rows["peak GiB"]["adamw"] - rows["peak GiB"]["sgd"]
    assert main(["--compare", "sgd.yaml,adamw.yaml"]) == 0


@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "file"
    assert main(["--model", "tiny", "--format", form, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert "optimizer step" in out.read_text()


def test_formats_keep_numbers() -> None:
    table = Table("<t>", ["name", "GiB"], [["a|b", 1 / 3], ["c", None]], ["n"])
    assert json.loads(render([table], "json"))[0]["rows"] == [{"name": "a|b", "GiB": 1 / 3}, {"name": "c", "GiB": None}]
    assert list(csv.reader(io.StringIO(render([table], "csv"))))[1] == ["<t>", "a|b", str(1 / 3)]
    assert r"| a\|b | 0.33 |" in render([table], "markdown")
    page = render([table], "html")
    assert "&lt;t&gt;" in page
    assert "<td class=n>0.33</td>" in page


def test_an_unknown_architecture_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GPTNeoXConfig

    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 28}
    GPTNeoXConfig(vocab_size=97, **sizes).save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    from transformers import GPTNeoXForCausalLM

    real = sum(p.numel() for p in GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=97, **sizes)).parameters())
    assert count(find_model(str(tmp_path))[0]) == real
    assert f"{real:,} parameters" in said
    assert "gpt_neox: its shapes are not known here; counted" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "qwn3-8b"], "near: qwen3-8b"),
        (["--model", "Qwen/Qwen9-8B-Instruct"], "near: qwen3-8b"),
        (["--model", "/nowhere/at/all"], "no packaged model"),
        (["--config", "no.yaml"], "no file 'no.yaml'"),
        (
            ["--config", "tiny_sft.yaml"],
            "DrGRPO, DAPO, GSPO, CISPO, PPO; this is rlvr_lightning.sft.SFT",
        ),
        (["--config", "prime.yaml"], "this is rlvr_lightning.prime.PRIME; fit --dry_run counts its two models"),
        (["--config", "sgd.yaml", "--optimizer", "adam"], "'adam' is not known here; one of sgd, momentum"),
        (["--config", "sgd.yaml", "--model.batching.micro_batch", "3"], "must divide group_size"),
        (["--config", "sgd.yaml", "--model.batching.micro_batch", "x"], "micro_batch must be a number, got 'x'"),
        (["--config", "sgd.yaml", "--model.group_size"], "has no value"),
        (["--config", "sgd.yaml", "--wat", "3"], "unknown option --wat"),
        (["--config", "sgd.yaml", "--model.optimizer.class_path", "x.Y"], "the state of x.Y"),
        (["--config", "sgd.yaml", "--gpus", "0"], "--gpus must be at least 1"),
        (["--config", "sgd.yaml", "--gpus", "7"], "must be a multiple of"),
        (["--config", "sgd.yaml", "--fit-into", "24"], "'24' is no size; give one such as 24GiB"),
        (["--config", "sgd.yaml", "--fit-into", "..GiB"], "is no size"),
        (["--config", "lowmem.yaml", "--model.batching.micro_batch", "64"], "set micro_batch to 128"),
        (["--compare", "sgd,adamw"], "of what model"),
        (["--compare", "sgd.yaml"], "two names or more"),
        (["--fit-into", "24GiB"], "add --config or --model"),
        (["--model.group_size", "4"], "need --config"),
        (["--model", "tiny", "--out", "/dev/null/x"], "--out"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_broken_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not a JSON object"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        find_model(str(tmp_path))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        read_config(tmp_path / "bad.yaml")
    assert [parse_size(text) for text in ("24GiB", "80 GB", "1.5MiB")] == [24 * GIB, 80 * 10**9, 1_572_864]
