import hashlib
import inspect
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import load_file

from rlvr_lightning.data.arithmetic import Arithmetic, ArithmeticDemos
from rlvr_lightning.data.prompts import PromptData
from rlvr_lightning.offline import Text, ids_of, rollouts_of
from rlvr_lightning.optim import SGD, GradientRelease
from rlvr_lightning.policy import TINY, LoRA, load_model, load_tokenizer
from rlvr_lightning.rewards.arithmetic import FinalAnswer
from rlvr_lightning.rollout import HFEngine
from rlvr_lightning.schema import Sample, Sampling
from rlvr_lightning.sft import SFT, weights_digest

ADAMW = partial(torch.optim.AdamW, lr=1e-2)
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    """A folder with a smaller config of the tiny model and its tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("blank")
    config = json.loads((TINY / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": ["full_attention"], "hidden_size": 32, "intermediate_size": 48}
    (folder / "config.json").write_text(json.dumps(config))
    load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


def fit(model, steps=5, seed=7, scheduler=None, drawn_before=0, optimizer=ADAMW, **kwargs):
    seed_everything(seed, verbose=False)
    torch.rand(drawn_before)
    module = SFT(model, optimizer, scheduler, from_scratch=True, seed=seed, **kwargs)
    demos = ArithmeticDemos(num=30, seed=1, levels=[1, 2])
    data = PromptData(model, train=demos, val={"demos": ArithmeticDemos(num=5, seed=2, levels=[2])}, prompts_per_step=6)
    trainer = Trainer(max_steps=steps, num_sanity_val_steps=0, **QUIET)
    trainer.fit(module, data)
    return module, trainer


def naive_nll(model, tokenizer, record):
    """Negative log-likelihood of each token of a demonstration, one unpadded forward pass a token."""
    prompt = tokenizer(record["prompt"])["input_ids"]
    completion = tokenizer(record["demonstration"])["input_ids"] + [tokenizer.eos_token_id]
    losses = []
    for k, token in enumerate(completion):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion[:k]])).logits[0, -1].tolist()
        losses.append(math.log(sum(math.exp(z) for z in logits)) - logits[token])
    return losses


def test_losses_equal_the_naive_ones(blank):
    """Both are means over tokens, not over demonstrations."""
    module, trainer = fit(blank, steps=5)  # 5 batches of 6 are one epoch: ends with a validation
    val = ArithmeticDemos(num=5, seed=2, levels=[2])
    losses = [naive_nll(module.policy.model, module.tokenizer, record) for record in val]
    expected = sum(map(sum, losses)) / sum(map(len, losses))
    assert len(set(map(len, losses))) > 1
    assert float(trainer.callback_metrics["val/demos/nll"]) == pytest.approx(expected, rel=1e-5)
    batch = [record | {"prompt_ids": module.tokenizer(record["prompt"])["input_ids"]} for record in val]
    texts = [module.text_of(record) for record in batch]
    assert float(module._loss(texts, module.totals(texts)).loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_change_no_gradient(blank, micro_batch):
    whole, parts = (fit(blank, steps=3, micro_batch=size)[0] for size in (16, micro_batch))
    for a, b in zip(whole.policy.parameters(), parts.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_released_step_has_one_micro_batch(blank):
    ours = {"dtype": "bfloat16", "gradient_release": GradientRelease()}
    with pytest.raises(ValueError, match=r"model\.micro_batch is 4 and a step has 6 texts"):
        fit(blank, optimizer=partial(SGD, lr=0.1), micro_batch=4, **ours)


@pytest.mark.parametrize("setting", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_lightnings_own_steps_are_refused(blank, setting):
    with pytest.raises(ValueError, match=rf"trainer\.{next(iter(setting))}: leave it out"):
        SFT(blank, ADAMW, from_scratch=True).check(Trainer(max_steps=1, **QUIET, **setting), None)


def test_loss_falls(blank):
    first = float(fit(blank, steps=1)[1].callback_metrics["sft/nll"])
    last = float(fit(blank, steps=40)[1].callback_metrics["sft/nll"])
    assert first == pytest.approx(math.log(18), abs=0.2)  # a blank model knows nothing of 18 tokens
    assert last < 0.6 * first


def test_same_seed_same_weights_other_seed_others(blank):
    runs = [fit(blank, seed=seed, drawn_before=drawn)[0] for seed, drawn in [(3, 0), (3, 5), (4, 0)]]
    digests = [weights_digest(module.policy.model.state_dict()) for module in runs]
    assert digests[0] == digests[1] != digests[2]


def test_schedule_is_stepped_after_every_update(blank):
    schedule = partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=10)
    _, trainer = fit(blank, steps=7, scheduler=schedule)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.3)


def test_export_is_a_model_folder_and_tells_its_digest(blank, tmp_path, capsys):
    folder = tmp_path / "model"
    module, _ = fit(blank, export_to=str(folder))
    weights = load_file(folder / "model.safetensors")
    assert weights_digest(weights) in capsys.readouterr().out
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    trained = module.policy.model.state_dict()
    assert all(torch.equal(trained[name].bfloat16(), tensor) for name, tensor in weights.items())
    assert set(trained) - set(weights) == {"lm_head.weight"}  # tied to the embedding
    loaded = load_model(str(folder)).state_dict()
    assert all(torch.equal(tensor.bfloat16().float(), loaded[name]) for name, tensor in trained.items())
    assert load_tokenizer(str(folder)).eos_token_id == 1
    with pytest.raises(ValueError, match=r"model\.export_to must differ"):
        SFT(str(folder), ADAMW, export_to=str(folder))
    with pytest.raises(ValueError, match=r"model\.export_to does not merge adapters; .* -m rlvr_lightning export"):
        SFT(str(folder), ADAMW, export_to=str(tmp_path / "other"), lora=LoRA(rank=2))


def test_the_optimizer_has_no_default_whose_settings_another_would_take_over():
    """The parser keeps what both classes know: AdamW's weight_decay of 0.01 would be SGD's."""
    assert inspect.signature(SFT).parameters["optimizer"].default is inspect.Parameter.empty


def test_a_record_without_demonstration_is_refused():
    with pytest.raises(ValueError, match=r"record 3 has no text under 'demonstration'"):
        ids_of({"prompt": "1+1=", "index": 3}, "demonstration", load_tokenizer("tiny"), {1})


def test_rollouts_of_unlike_lengths():
    texts = [Text(prompt_ids=prompt, completions=[ids]) for prompt, ids in [([5], [1, 2, 3]), ([6, 7], [4])]]
    rollouts = rollouts_of(texts, "cpu")
    assert rollouts.completion_ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert rollouts.completion_mask.tolist() == [[True, True, True], [True, False, False]]
    assert rollouts.group == 1 and rollouts.prompt_ids == [[5], [6, 7]]


def test_packaged_model_is_the_recorded_one():
    record = json.loads((TINY / "made_by.json").read_text())
    file = TINY / "model.safetensors"
    assert weights_digest(load_file(file)) == record["weights_sha256"]
    assert file.stat().st_size < 8 << 20
    assert sum(p.numel() for p in load_model("tiny").parameters()) == record["parameters"]


def accuracy(folder, num, temperature):
    """Share of held-out problems that a model solves."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    problems = list(Arithmetic(num, split="test"))
    prompts = [tokenizer(problem["prompt"])["input_ids"] for problem in problems]
    engine = HFEngine(model, [tokenizer.eos_token_id], tokenizer.pad_token_id)
    rollouts = engine.generate(prompts, 1, Sampling(max_tokens=64, temperature=temperature), range(num))
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rollouts.completion_ids]
    pairs = zip(texts, problems, strict=True)
    samples = [Sample(prompt="", text=text, token_ids=[], record=problem) for text, problem in pairs]
    return sum(FinalAnswer()(samples)) / num


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_packaged_model_is_mediocre(temperature):
    assert 0.2 < accuracy("tiny", 300, temperature) < 0.5


@pytest.mark.slow
def test_packaged_model_is_made_again(tmp_path):
    """The same weights with the same torch on the same processor and threads, elsewhere one as good."""
    record = json.loads((TINY / "made_by.json").read_text())
    command = [sys.executable, *record["command"].split()[1:]]
    env = os.environ | {"OMP_NUM_THREADS": str(record["threads"])}
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    folder = tmp_path / "runs" / "tiny_sft" / "model"
    if (record["torch"], record["cpu"]) == (torch.__version__, processor()):
        assert weights_digest(load_file(folder / "model.safetensors")) == record["weights_sha256"]
    assert 0.2 < accuracy(str(folder), 300, 0.0) < 0.5 and 0.2 < accuracy(str(folder), 300, 1.0) < 0.5


def processor():
    """The processor on Linux, by name and abilities: virtual ones of one name differ in these, and so in last bits."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    said = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    return f"{said.get('model name', '')} {hashlib.sha256(said.get('flags', '').encode()).hexdigest()[:16]}"


def test_packaged_tokenizer_loses_nothing():
    tokenizer = load_tokenizer("tiny")
    text = "47+8-5= +8=55 -5=50 answer 50"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("answer 7")["input_ids"] == [3, 15]
    assert tokenizer("7\nx")["input_ids"] == [15, tokenizer.unk_token_id, tokenizer.unk_token_id]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
    assert len(tokenizer) == load_model("tiny").config.vocab_size == 18
