"""Learning from given texts: the modules against naive losses, and what holds whatever the settings."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import reference
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_grpo import folder, weights  # noqa: F401 (a fixture)

from rlvr_lightning.__main__ import main
from rlvr_lightning.checkpoint import DeltaCheckpointIO
from rlvr_lightning.data.prompts import ListedPrompts, PromptData
from rlvr_lightning.data.texts import Demonstrations, Labels, Pairs
from rlvr_lightning.dpo import DPO
from rlvr_lightning.kto import KTO, mismatched
from rlvr_lightning.offline import Text
from rlvr_lightning.optim import SGD, GradientRelease
from rlvr_lightning.orpo import ORPO
from rlvr_lightning.policy import TINY, LoRA
from rlvr_lightning.sft import SFT
from rlvr_lightning.simpo import SimPO

RATE = partial(torch.optim.SGD, lr=0.3)
PROMPTS = [f"{a}+{b}=" for a, b in [(1, 2), (13, 4), (5, 5), (20, 7), (8, 1), (31, 6), (2, 2)]]
ALGORITHMS = {
    "sft": SFT,
    "dpo": DPO,
    "ipo": partial(DPO, loss="ipo"),
    "simpo": SimPO,
    "orpo": partial(ORPO, weight=1.0),
    "kto": partial(KTO, beta=0.5),
}


def texts(kind: str, num: int = 7) -> ListedPrompts:
    """Texts of unlike length: the right sum is good, a wrong one is bad."""
    records = []
    for i, prompt in enumerate(PROMPTS[:num]):
        right = sum(map(int, prompt[:-1].split("+")))
        pair = {"chosen": f"answer {right}" + " " * (i % 3), "rejected": f"+{i} answer {right + 1 + i}"}
        good = i % 3 > 0
        single = {"completion": pair["chosen"] if good else pair["rejected"], "label": good}
        fields = {"sft": {"demonstration": pair["chosen"]}, "kto": single}.get(kind, pair)
        records.append({"prompt": prompt} | fields)
    return ListedPrompts(records)


def fit(model, kind: str, path: Path, steps: int = 1, batch: int = 7, num: int = 7, **trainer) -> Trainer:
    data = PromptData(str(TINY), train=texts(kind, num), val={"held": texts(kind)}, prompts_per_step=batch)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "default_root_dir": path, "num_sanity_val_steps": 0}
    ckpt_path = trainer.pop("ckpt_path", None)
    runner = Trainer(max_steps=steps, **quiet | trainer)
    runner.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return runner


def make(kind: str, model: str, **settings):
    return ALGORITHMS[kind](model, **{"optimizer": RATE} | settings)


def naive_logprob(model, prompt: list[int], completion: list[int]) -> float:
    """By one unpadded forward pass."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    return sum(float(logprobs[len(prompt) + k - 1, token]) for k, token in enumerate(completion))


@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo", "orpo"])
def test_held_out_pairs_are_measured_as_by_hand(kind: str, folder: str, tmp_path: Path) -> None:  # noqa: F811
    """After steps on others: margins of packed forward passes against separate ones, with a separate reference."""
    from transformers import AutoModelForCausalLM

    module = make(kind, folder)
    metrics = fit(module, kind, tmp_path, steps=4, batch=3, num=6).callback_metrics
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    margins = []
    for record in texts(kind):
        prompt = module.tokenizer(record["prompt"])["input_ids"]
        sides = [module.tokenizer(record[s])["input_ids"] + [1] for s in ("chosen", "rejected")]
        now, then = ([naive_logprob(m, prompt, side) for side in sides] for m in (module.policy.model, start))
        if kind in ("dpo", "ipo"):
            rewards = [0.1 * (a - b) for a, b in zip(now, then, strict=True)]
        else:
            scale = 2.0 if kind == "simpo" else 1.0
            rewards = [scale * value / len(side) for value, side in zip(now, sides, strict=True)]
        margins.append(rewards[0] - rewards[1])
    assert float(metrics["val/held/rewards/margin"]) == pytest.approx(sum(margins) / 7, abs=2e-5)
    assert float(metrics["val/held/rewards/accuracy"]) == pytest.approx(sum(m > 0 for m in margins) / 7)


def test_kto_compares_with_completions_of_others(folder: str, tmp_path: Path) -> None:  # noqa: F811
    from transformers import AutoModelForCausalLM

    module = make("kto", folder)
    metrics = fit(module, "kto", tmp_path, steps=4, batch=3, num=6).callback_metrics
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    records = list(texts("kto"))
    ids = [module.tokenizer(r["completion"])["input_ids"] + [1] for r in records]
    prompts = [module.tokenizer(r["prompt"])["input_ids"] for r in records]

    def ratio(prompt, completion):
        return naive_logprob(module.policy.model, prompt, completion) - naive_logprob(start, prompt, completion)

    kl = max(0.0, sum(ratio(prompts[i], ids[(i + 1) % 7]) for i in range(7)) / 7)
    ratios = [ratio(*pair) for pair in zip(prompts, ids, strict=True)]
    good = [0.5 * r for r, record in zip(ratios, records, strict=True) if record["label"]]
    right = [(r > kl) == record["label"] for r, record in zip(ratios, records, strict=True)]
    assert float(metrics["val/held/rewards/kl"]) == pytest.approx(kl, abs=1e-4)
    assert float(metrics["val/held/rewards/chosen"]) == pytest.approx(sum(good) / len(good), abs=1e-4)
    assert float(metrics["val/held/rewards/accuracy"]) == pytest.approx(sum(right) / 7)


def test_kto_takes_no_completion_of_the_same_prompt() -> None:
    """As `samples` writes them: all completions of a prompt in a row."""

    def made(*prompts: int) -> list[tuple[int, int]]:
        given = [Text(prompt_ids=[p], completions=[[i]]) for i, p in enumerate(prompts)]
        return [(text.prompt_ids[0], text.completions[0][0]) for text in mismatched(given)]

    assert made(7, 7, 7, 8, 8, 8, 9, 9, 9) == list(
        zip([7] * 3 + [8] * 3 + [9] * 3, [3, 4, 5, 6, 7, 8, 0, 1, 2], strict=True)
    )
    assert made(7, 8, 9) == [(7, 1), (8, 2), (9, 0)], "text i+1's, as in the paper"
    assert made(7, 7, 7, 8) == [(7, 3), (8, 0)], "the others have none"
    assert made(7, 7) == made(7) == made() == []


def test_loss_of_a_step_is_the_naive_one(folder: str, tmp_path: Path) -> None:  # noqa: F811
    """The second step's, when policy and reference differ; the third has rate 0."""
    rate = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: float(step == 0))
    module = make("dpo", folder, scheduler=rate)
    metrics = fit(module, "dpo", tmp_path, steps=2).callback_metrics
    batch = [r | {"prompt_ids": module.tokenizer(r["prompt"])["input_ids"]} for r in texts("dpo")]
    items = [module.text_of(record) for record in batch]
    with torch.no_grad():
        now, _ = module.logprobs(items, lambda r: module.policy(r).logprobs)
    then, _ = module.logprobs(items, module.reference.logprobs)
    assert not torch.equal(now, then)
    expected = reference.dpo(now.tolist(), then.tolist(), 0.1, 0.0) / 7
    assert float(metrics["train/loss"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_change_no_gradient(kind: str, micro_batch: int, folder: str, tmp_path: Path) -> None:  # noqa: F811
    found = []
    for size in (7, micro_batch):
        rate = partial(torch.optim.SGD, lr=0.03)
        module = make(kind, folder, micro_batch=size, max_grad_norm=0.0, optimizer=rate)
        fit(module, kind, tmp_path, steps=2)
        found.append(weights(module))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-3)


MODES = {
    "sgd": {},
    "adamw": {"optimizer": partial(torch.optim.AdamW, lr=1e-3)},
    "rmsprop": {"optimizer": partial(torch.optim.RMSprop, lr=1e-3)},
    "split released": {"optimizer": partial(SGD, lr=0.3), "dtype": "bfloat16", "gradient_release": GradientRelease()},
    "stochastic": {"optimizer": partial(SGD, lr=0.3, master="none", rounding="stochastic"), "dtype": "bfloat16"},
    "lora": {"lora": LoRA(rank=2)},
    "checkpointing": {"activation_checkpointing": True, "compute_dtype": "bfloat16"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ALGORITHMS)
def test_every_optimizer_and_precision(kind: str, mode: str, folder: str, tmp_path: Path) -> None:  # noqa: F811
    module = make(kind, folder, **MODES[mode])
    module.configure_model()
    before = weights(module)
    trainer = fit(module, kind, tmp_path, limit_val_batches=0)
    after = [p.to(b.device) for p, b in zip(weights(module), before, strict=True)]
    moved = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    assert moved > 0 and float(trainer.callback_metrics["train/nonfinite_steps"]) == 0


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_copied_reference_is_the_same(kind: str, folder: str, tmp_path: Path) -> None:  # noqa: F811
    found = []
    for reference_kind in ("delta", "copy"):
        ours = {"optimizer": partial(SGD, lr=0.1), "dtype": "bfloat16", "reference": reference_kind}
        module = make(kind, folder, **ours)
        fit(module, kind, tmp_path, steps=3)
        found.append(weights(module))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_the_tiny_model_gets_better_by_its_own_measure(kind: str, tmp_path: Path) -> None:
    rates = {"sft": 0.05, "dpo": 0.1, "ipo": 0.003, "simpo": 0.1, "orpo": 0.05, "kto": 0.3}
    module = make(kind, "tiny", optimizer=partial(torch.optim.SGD, lr=rates[kind]))
    first = fit(make(kind, "tiny", optimizer=partial(torch.optim.SGD, lr=0.0)), kind, tmp_path).callback_metrics
    last = fit(module, kind, tmp_path, steps=12).callback_metrics
    measure = "nll" if kind == "sft" else "rewards/accuracy"
    start, end = (float(found[f"val/held/{measure}"]) for found in (first, last))
    assert end < 0.7 * start if kind == "sft" else end >= 0.85 and end > start
    if kind in ("dpo", "ipo", "kto"):
        assert start == 0.5  # nothing has moved: all is equal


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_resumed_run_is_the_uninterrupted_run(kind: str, folder: str, tmp_path: Path) -> None:  # noqa: F811
    """With the reference of the first start, out of delta checkpoints; another beta is said."""
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=3)
    saving = {"callbacks": [keep], "enable_checkpointing": True, "plugins": [DeltaCheckpointIO()]}
    ours = {"optimizer": partial(SGD, lr=0.3), "dtype": "bfloat16"}
    whole, first, then = (make(kind, folder, **ours) for _ in range(3))
    fit(whole, kind, tmp_path, steps=5, batch=2)
    fit(first, kind, tmp_path, steps=3, batch=2, **saving)
    last = str(tmp_path / "last.ckpt")
    fit(then, kind, tmp_path, steps=5, batch=2, plugins=[DeltaCheckpointIO()], ckpt_path=last)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(then), strict=True))
    starts = [[m.reference.start(p) for p in m.policy.parameters()] for m in (whole, then)]
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))
    with pytest.warns(UserWarning, match=r"model\.beta: from here on 0\.9"):
        fit(make(kind, folder, beta=0.9, **ours), kind, tmp_path, steps=5, batch=2, ckpt_path=last, **saving)


@pytest.mark.parametrize(
    ("kind", "name", "other"),
    [
        ("dpo", "chosen", "answer 9"),
        ("dpo", "rejected", "answer 9"),
        ("kto", "completion", "9"),
        ("kto", "label", True),
        ("sft", "demonstration", "9"),
    ],
)
def test_other_texts_behind_the_same_prompts_are_other_data(
    kind: str,
    name: str,
    other: object,
    folder: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    fit(make(kind, folder), kind, tmp_path, callbacks=[keep], enable_checkpointing=True)
    first, *rest = texts(kind)
    monkeypatch.setitem(globals(), "texts", lambda *_: ListedPrompts([first | {name: other}, *rest]))
    with pytest.raises(ValueError, match=r"^data\.train: .* was made with .*: cannot resume"):
        fit(make(kind, folder), kind, tmp_path, 2, ckpt_path=str(tmp_path / "last.ckpt"))


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": "1", "rejected": "1"}, "record 4 has two equal sides, chosen and rejected"),
        ({"answer": "1"}, "record 4 has no text under 'chosen'; its fields are answer, prompt"),
        ({"chosen": "1", "rejected": ""}, "record 4 has an empty text under 'rejected'"),
        ({"chosen": "1", "worse": "2"}, "record 4 has no text under 'rejected'; its fields are chosen, prompt, worse"),
    ],
)
def test_bad_pairs_are_named(record: dict, message: str, folder: str) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=message):
        make("dpo", folder).text_of({"prompt": "1=", "prompt_ids": [3], "index": 4} | record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"completion": "1"}, "record 4 has no label; its fields are completion, prompt; make it true or false"),
        ({"completion": "1", "label": "true"}, "record 4 has the label 'true'; make it true or false"),
    ],
)
def test_bad_labels_are_named(record: dict, message: str, folder: str) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=message):
        make("kto", folder).text_of({"prompt": "1=", "prompt_ids": [3], "index": 4} | record)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("dpo", {"beta": 0.0}, "model.beta must be positive, got 0"),
        ("dpo", {"label_smoothing": 0.5}, r"model.label_smoothing must lie in \[0, 0.5\), got 0.5"),
        ("ipo", {"label_smoothing": 0.1}, "model.label_smoothing is of loss: sigmoid"),
        ("kto", {"bad_weight": -1.0}, "model.bad_weight must be positive"),
        ("orpo", {"micro_batch": 0}, "model.micro_batch must be at least 1, got 0"),
        ("dpo", {"lora": LoRA(rank=1), "reference": "copy"}, "reference: copy does not go with lora"),
        ("simpo", {"gradient_release": GradientRelease()}, "gradient_release needs optimizer"),
    ],
)
def test_settings_that_cannot_work(kind: str, settings: dict, message: str, folder: str) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=message):
        make(kind, folder, **settings)


def test_problems_need_a_verifier(folder: str, tmp_path: Path) -> None:  # noqa: F811
    problems = ListedPrompts([{"prompt": "1+1=", "answer": 2}])
    data = PromptData(str(TINY), train=texts("dpo"), val={"sums": problems}, prompts_per_step=7)
    runner = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"data\.val\.sums: its records have no 'chosen'.*need model\.rewards"):
        runner.validate(make("dpo", folder), data)


# ---- files ----


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pairs_of_a_file(tmp_path: Path) -> None:
    rows = [{"q": f"{a}+6=", "chosen": "1", "rejected": "2"} for a in range(10, 15)]
    rows += [{"q": "1", "chosen": "3", "rejected": "3"}, {"q": "1", "chosen": "", "rejected": "3"}]
    file = write(tmp_path / "pairs.jsonl", *rows)
    with pytest.warns(UserWarning, match=r"left out 2 rows, kept 5: both sides are equal \(line 6\); no text in 'ch"):
        found = {part: Pairs(file, columns={"prompt": "q"}, part=part) for part in ("all", "train", "held_out")}
    assert len(found["all"]) == 5 and found["all"][0]["prompt"] == "10+6="
    prompts = {part: {r["prompt"] for r in found[part]} for part in found}
    assert prompts["held_out"] == {"10+6=", "12+6="}
    assert prompts["train"] == prompts["all"] - prompts["held_out"]


def test_labels_and_demonstrations_of_a_file(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        {"prompt": "1+1=", "completion": "2", "label": False},
        {"prompt": "1+2=", "completion": "3", "label": 1},
    )
    assert [record["label"] for record in Labels(file)] == [False, True]
    assert [record["demonstration"] for record in Demonstrations(file)] == ["2", "3"]


@pytest.mark.parametrize(
    ("good", "bad"), [("true", "false"), ("True", "FALSE"), ("1", "0"), ("1.0", "0.0"), (" true", "False ")]
)
def test_labels_of_a_csv_file_are_texts(good: str, bad: str, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f"prompt,completion,label\n1+1=,2,{good}\n1+2=,4,{bad}\n1+3=,4,maybe\n")
    with pytest.warns(UserWarning, match=r"left out 1 rows, kept 2: a label that is neither true nor false"):
        assert [record["label"] for record in Labels(str(file))] == [True, False]


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (Pairs, {"prompt": "1", "chosen": "2"}, "no column 'rejected'; the columns are prompt, chosen; expected are"),
        (Pairs, {"prompt": "1", "chosen": "2", "rejected": "2"}, r"no usable problem: both sides are equal \(line 1\)"),
        (Labels, {"prompt": "1", "completion": "2", "label": "yes"}, "a label that is neither true nor false"),
        (Demonstrations, {"prompt": "1", "completion": " "}, "no text in 'completion'"),
    ],
)
def test_files_that_hold_no_texts(kind, row: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        kind(write(tmp_path / "a.jsonl", row))
    with pytest.raises(ValueError, match="columns: there is no field 'promt'; the fields are prompt"):
        kind("a.jsonl", columns={"promt": "q"})


# ---- commands ----


QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


@pytest.mark.parametrize(
    ("config", "kind", "file", "measure"),
    [
        ("dpo", "pairs", "pairs", "rewards/accuracy"),
        pytest.param("simpo", "pairs", "pairs", "rewards/accuracy", marks=pytest.mark.slow),
        pytest.param("orpo", "pairs", "pairs", "nll", marks=pytest.mark.slow),
        ("kto", "labels", "labels", "rewards/kl"),
        ("rft", "correct", "correct", "nll"),
    ],
)
def test_two_commands_make_texts_and_learn_from_them(
    config: str, kind: str, file: str, measure: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["samples", "--config=sgd.yaml", f"--out={file}.jsonl", f"--kind={kind}", "--num=60", *QUIET]) == 0
    short = [f"--config={config}.yaml", "--data.prompts_per_step=5", "--data.val.arithmetic.num=8", *QUIET]
    assert main(["fit", *short, "--trainer.max_steps=2", "--trainer.val_check_interval=2"]) == 0
    out = capsys.readouterr().out
    for name in (f"val/held_out/{measure}", "val/arithmetic/pass@1"):
        assert f"{name} " in out
    last = f"runs/{config}/version_0/checkpoints/last.ckpt"
    assert main(["validate", *short, f"--ckpt_path={last}"]) == 0
    told = capsys.readouterr().out
    assert f"val/held_out/{measure} " in told and "pass@1" in told


def test_texts_alone_are_validated_without_a_verifier(folder: str, tmp_path: Path) -> None:  # noqa: F811
    data = PromptData(str(TINY), train=texts("dpo"), val={"held": texts("dpo")}, prompts_per_step=7)
    module = make("dpo", folder)
    module.keeps_problems = True
    runner = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir=tmp_path)
    runner.validate(module, data, verbose=False)
    assert "val/held/rewards/accuracy  0.500" in module.report()
