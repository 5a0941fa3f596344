"""The module against a bare PyTorch loop, and the equivalences that hold whatever the settings."""

from __future__ import annotations

import csv
import math
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import reference
import torch
from conftest import tiny_causal_lm
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from rlvr_lightning.data.prompts import PromptData, PromptSource
from rlvr_lightning.evaluation_plan import Evaluation
from rlvr_lightning.experience import Batching, Handling
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.losses import Objective
from rlvr_lightning.policy import TINY, LoRA, load_tokenizer
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.schema import Sample, Sampling

SGD = partial(torch.optim.SGD, lr=0.5)


class Digits(Reward):
    """Digits in the completion, modulo 3: varies within most groups of a random model."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [float(sum(c.isdigit() for c in s.text) % 3) for s in samples]


class Constant(Reward):
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [1.0] * len(samples)


class Broken(Reward):
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        raise KeyError("no such field")


class Prompts(PromptSource):
    def __init__(self, num: int = 12) -> None:
        self.records = [
            {"prompt": f"{10 + 7 * i % 83}{'+' if i % 2 else '-'}{i % 9}="[: 3 + i % 4]} for i in range(num)
        ]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random two-layer model with the tiny model's tokenizer."""
    path = tmp_path_factory.mktemp("model")
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, path)
    tokenizer = load_tokenizer(str(TINY))
    tiny_causal_lm("qwen3", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(path)
    return str(path)


def module(folder: str, kind: type[GRPO] = GRPO, **settings) -> GRPO:
    defaults = {
        "model": folder,
        "rewards": {"digits": Digits()},
        "optimizer": SGD,
        "group_size": 4,
        "sampling": Sampling(max_tokens=9, temperature=0.8),
        "evaluation": Evaluation(samples=2),
    }
    return kind(**defaults | settings)


def fit(model: GRPO, path: Path, steps: int = 3, prompts_per_step: int = 6, **trainer) -> Trainer:
    data = PromptData(str(TINY), train=Prompts(), prompts_per_step=prompts_per_step, seed=5)
    defaults = {"max_steps": steps, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults |= {"accelerator": "cpu", "devices": 1, "default_root_dir": path, "enable_checkpointing": False}
    ckpt_path = trainer.pop("ckpt_path", None)
    runner = Trainer(**defaults | trainer)
    runner.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return runner


def weights(model: GRPO) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.policy.parameters()]


class Recorder(GRPO):
    """Remembers each step's experience, so that a bare loop can learn from the same completions."""

    def learn(self, experience) -> None:
        self.seen = [*getattr(self, "seen", []), experience]
        super().learn(experience)


def bare_step(
    model, optimizer, experience, objective: Objective, temperature: float, ref, max_grad_norm: float
) -> None:
    """GRPO by plain autograd: every completion a row of its own, full logits, one backward pass."""
    rollouts, mask = experience.rollouts, experience.mask
    total = 0.0
    for r, length in enumerate(rollouts.lengths.tolist()):
        prompt = rollouts.prompt_ids[r // rollouts.group]
        ids = torch.tensor([prompt + rollouts.completion_ids[r, :length].tolist()])

        def logprobs(lm, ids=ids, prompt=prompt):
            n = len(prompt)
            return (lm(ids).logits[0] / temperature).log_softmax(-1)[n - 1 : -1].gather(1, ids[0, n:, None])[:, 0]

        policy = logprobs(model)
        ratio = (policy - rollouts.rollout_logprobs[r, :length]).exp()
        adv = experience.advantages[r]
        loss = -torch.minimum(ratio * adv, ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high) * adv)
        if objective.kl_coef:
            with torch.no_grad():
                ref_logprobs = logprobs(ref)
            loss = loss + objective.kl_coef * ((ref_logprobs - policy).exp() - 1 + policy - ref_logprobs)
        total = total + loss.sum() / mask.sum()
    optimizer.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()


@pytest.mark.parametrize(("kl_coef", "passes"), [(0.0, 1), (0.2, 1), (0.2, 3)])
@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.AdamW, lr=1e-3)])
def test_equals_a_bare_loop(folder: str, tmp_path: Path, kl_coef: float, passes: int, optimizer) -> None:
    from transformers import AutoModelForCausalLM

    objective = Objective(kl_coef=kl_coef)
    settings = {"objective": objective, "optimizer": optimizer, "batching": Batching(micro_batch=8, passes=passes)}
    ours = Recorder(
        folder, {"digits": Digits()}, group_size=4, sampling=Sampling(max_tokens=9, temperature=0.8), **settings
    )
    fit(ours, tmp_path, steps=3 * passes)
    assert len(ours.seen) == 3
    bare, ref = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    bare_optimizer = optimizer(bare.parameters())
    start = [p.detach().clone() for p in bare.parameters()]
    for experience in ours.seen:
        for _ in range(passes):
            bare_step(bare, bare_optimizer, experience, objective, 0.8, ref, 1.0)
    moved = max((a - b).abs().max() for a, b in zip(start, bare.parameters(), strict=True))
    apart = max((a - b).abs().max() for a, b in zip(weights(ours), bare.parameters(), strict=True))
    assert moved > 1e-3
    assert apart < 0.01 * moved


def test_completions_are_sampled_from_the_current_policy(folder: str, tmp_path: Path) -> None:
    ours = Recorder(folder, {"digits": Digits()}, SGD, group_size=4, sampling=Sampling(max_tokens=9))
    logged = []
    ours.log = lambda name, value, **_: logged.append((name, float(value)))  # type: ignore[assignment]
    fit(ours, tmp_path, steps=4)
    ratios = [value for name, value in logged if name == "policy/fresh_ratio_mean"]
    assert len(ratios) == 4
    assert ratios == pytest.approx([1.0] * 4, abs=1e-5)


def gradients(folder: str, tmp_path: Path, **settings) -> list[torch.Tensor]:
    """Of the first step, from the change of the weights under SGD with rate 1."""
    model = module(folder, optimizer=partial(torch.optim.SGD, lr=1.0), max_grad_norm=0.0, **settings)
    fit(model, tmp_path, steps=1)
    before = module(folder)
    before.configure_model()
    return [a - b for a, b in zip(weights(before), weights(model), strict=True)]


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_micro_batches_change_no_gradient(folder: str, tmp_path: Path, normalization: str) -> None:
    objective = Objective(normalization=normalization, kl_coef=0.1, entropy_coef=0.01)
    whole = gradients(folder, tmp_path, objective=objective, batching=Batching(micro_batch=24))
    for micro, rollout_batch in ((1, 5), (2, 7), (4, 24), (8, 1)):
        batching = Batching(micro_batch=micro, rollout_batch=rollout_batch)
        parts = gradients(folder, tmp_path, objective=objective, batching=batching)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-3)


def test_skipping_groups_without_signal_changes_no_gradient(folder: str, tmp_path: Path) -> None:
    skipped = gradients(folder, tmp_path)
    # A KL weight too small to matter makes every group go through the model.
    kept = gradients(folder, tmp_path, objective=Objective(kl_coef=1e-12))
    for a, b in zip(skipped, kept, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-3)


def test_a_first_batch_without_signal_is_shown_once(folder: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module(folder, rewards={"one": Constant()}), tmp_path / "dull", steps=2)
        fit(module(folder), tmp_path / "lively", steps=2)
    told = [str(warning.message) for warning in caught if "no signal" in str(warning.message)]
    assert len(told) == 1 and "any of 6 groups (all rewards are 1)" in told[0]
    assert told[0].count("  reward 1") == 3, "examples"


def test_all_equal_rewards_cost_no_forward_and_move_nothing(folder: str, tmp_path: Path) -> None:
    model = module(folder, rewards={"constant": Constant()})
    model.configure_model()
    before = weights(model)
    calls = []
    model.policy.register_forward_hook(lambda *_: calls.append(1))
    trainer = fit(model, tmp_path, steps=2)
    assert not calls
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert trainer.global_step == 2
    assert trainer.callback_metrics["train/skipped_groups"] == 6
    assert trainer.callback_metrics["reward/no_signal_frac"] == 1


def test_minibatches_and_passes_are_optimizer_steps(folder: str, tmp_path: Path) -> None:
    model = module(folder, batching=Batching(micro_batch=4, minibatches=3, passes=2))
    trainer = fit(model, tmp_path, steps=12)
    assert (trainer.global_step, model.rollout_step) == (12, 2)


def test_truncated_completions_are_masked_or_penalized(folder: str, tmp_path: Path) -> None:
    seen = {}
    for mode in ("keep", "mask", "penalize"):
        model = Recorder(
            folder,
            {"digits": Digits()},
            SGD,
            group_size=4,
            sampling=Sampling(max_tokens=5),
            handling=Handling(truncated=mode),
        )
        fit(model, tmp_path, steps=1)
        seen[mode] = model.seen[0]
    truncated = seen["keep"].rollouts.truncated
    assert 0 < truncated.sum() < len(truncated)
    assert torch.equal(seen["keep"].mask, seen["keep"].rollouts.completion_mask)
    assert not seen["mask"].mask[truncated].any()
    assert torch.equal(seen["mask"].mask[~truncated], seen["keep"].mask[~truncated])
    for start in range(0, len(truncated), 4):  # docked by one before the group is compared
        group = slice(start, start + 4)
        texts = [
            load_tokenizer(str(TINY)).decode(ids[m])
            for ids, m in zip(seen["keep"].rollouts.completion_ids[group], seen["keep"].mask[group], strict=True)
        ]
        rewards = [sum(c.isdigit() for c in t) % 3 - float(cut) for t, cut in zip(texts, truncated[group], strict=True)]
        assert seen["penalize"].advantages[group].tolist() == pytest.approx(
            reference.advantages(rewards, 4, "mean_std"), abs=1e-5
        )


def test_groups_without_signal_are_drawn_again(folder: str, tmp_path: Path) -> None:
    dull, means = {}, {}
    for rounds in (0, 3):
        model = module(folder, group_size=2, handling=Handling(resample_rounds=rounds))
        trainer = fit(model, tmp_path, steps=1)
        dull[rounds] = float(trainer.callback_metrics["reward/no_signal_frac"])
        means[rounds] = trainer.callback_metrics
    assert dull[3] < dull[0]
    assert "reward/mean_first_draw" not in means[0]
    assert float(means[3]["reward/mean_first_draw"]) == pytest.approx(float(means[0]["reward/mean"]))
    assert means[3]["reward/mean"] != means[0]["reward/mean"]


def test_a_penalty_is_a_signal(folder: str, tmp_path: Path) -> None:
    """All answers are alike to the reward; some are cut."""
    ours = {"rewards": {"one": Constant()}, "sampling": Sampling(max_tokens=5)}
    dull = {}
    for mode in ("keep", "penalize"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = module(folder, handling=Handling(truncated=mode), **ours)
            trainer = fit(model, tmp_path, steps=1)
        told = any("no signal" in str(warning.message) for warning in caught)
        dull[mode] = (float(trainer.callback_metrics["reward/no_signal_frac"]), told)
    assert dull["keep"] == (1, True)
    assert dull["penalize"][0] < 1 and not dull["penalize"][1]


def test_lora_trains_adapters_against_the_bare_model(folder: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = module(
        folder, lora=LoRA(rank=1), objective=Objective(kl_coef=0.1), optimizer=partial(torch.optim.SGD, lr=5.0)
    )
    trainer = fit(model, tmp_path, steps=3)
    assert model.reference.nbytes == 0
    assert trainer.callback_metrics["policy/kl"] > 0
    for name, p in model.policy.named_parameters():
        assert p.requires_grad == ("lora_" in name)
    fresh = module(folder)
    fresh.configure_model()
    original = dict(fresh.policy.causal_lm.named_parameters())
    for name, p in model.policy.causal_lm.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, original[name.replace(".base_layer", "")])


def test_resumed_run_equals_uninterrupted(folder: str, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    settings = {"optimizer": partial(torch.optim.SGD, lr=0.5, momentum=0.9), "warmup_steps": 3}
    whole, first, second = (module(folder, **settings) for _ in range(3))
    fit(whole, tmp_path, steps=5)
    keep = ModelCheckpoint(tmp_path / "ckpt", save_last=True, every_n_train_steps=3, save_top_k=-1)
    fit(first, tmp_path, steps=3, callbacks=[keep], enable_checkpointing=True)
    fit(second, tmp_path, steps=5, ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))


@pytest.mark.parametrize(("settings", "trainer"), [({"dtype": "bfloat16"}, {}), ({}, {"precision": "bf16-mixed"})])
def test_bf16_weights_and_mixed_precision_train(folder: str, tmp_path: Path, settings: dict, trainer: dict) -> None:
    model = module(folder, activation_checkpointing=True, **settings)
    model.configure_model()
    before = weights(model)
    done = fit(model, tmp_path, steps=2, **trainer)
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert done.callback_metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=0.05)


def test_warmup_and_schedule_are_stepped(folder: str, tmp_path: Path) -> None:
    model = module(folder, warmup_steps=4, optimizer=partial(torch.optim.SGD, lr=1.0))
    trainer = fit(model, tmp_path, steps=2)
    assert trainer.callback_metrics["update/lr"] == pytest.approx(3 / 4)  # the rate of the coming third step


def test_failing_rewards_stop_the_run_past_a_share(folder: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"rewards failed on 24 of 24 completions, more than handling.max_failed_frac=0.1"
    ):
        fit(module(folder, rewards={"broken": Broken()}), tmp_path)
    assert "KeyError" in (tmp_path / "reward_failures.jsonl").read_text()
    trainer = fit(
        module(folder, rewards={"broken": Broken()}, handling=Handling(max_failed_frac=1.0)), tmp_path, steps=1
    )
    assert trainer.callback_metrics["reward/failed"] == 24


def test_a_gradient_that_is_not_finite_is_not_applied(folder: str, tmp_path: Path) -> None:
    class Poisoned(GRPO):
        def _forward_backward(self, loss_of, part):
            metrics = super()._forward_backward(loss_of, part)
            if self.rollout_step:  # the first batch is well
                kept.append(weights(self))
                next(self.policy.parameters()).grad[0, 0] = math.nan
            return metrics

    kept: list[list[torch.Tensor]] = []
    model = Poisoned(folder, {"digits": Digits()}, SGD, group_size=4, sampling=Sampling(max_tokens=9))
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = fit(model, tmp_path, steps=2, logger=logger, log_every_n_steps=1)
    assert len(kept) and all(torch.equal(a, b) for a, b in zip(kept[0], weights(model), strict=True))
    assert trainer.callback_metrics["train/nonfinite_steps"] == 1
    with (tmp_path / "metrics.csv").open() as file:
        norms = [float(row["update/grad_norm"]) for row in csv.DictReader(file) if row["update/grad_norm"]]
    assert norms[0] > 0 and len(norms) == 2 and math.isnan(norms[1]), "of the second there is none to tell of"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"batching": Batching(micro_batch=3)}, r"batching.micro_batch \(3\) must divide group_size \(4\)"),
        ({"batching": Batching(passes=0)}, "batching.passes must be at least 1"),
        ({"sampling": Sampling(temperature=0)}, "sampling.temperature must be positive in training"),
        ({"rewards": {}}, "rewards must name at least one reward"),
        ({"reward_weights": {"speed": 1.0}}, r"reward_weights names \['speed'\], rewards has \['digits'\]"),
        ({"model": "/no/such/folder"}, "model: no folder '/no/such/folder'"),
    ],
)
def test_bad_settings_are_refused_before_loading(folder: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(folder, **settings)


def test_prompts_must_divide_into_minibatches(folder: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data.prompts_per_step \(6\) must be a multiple of batching.minibatches \(4\)"
    ):
        fit(module(folder, batching=Batching(micro_batch=4, minibatches=4)), tmp_path)


def test_a_model_that_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"holds a 'vit' model, which is not a causal LM"):
        module(str(tmp_path))


def test_sampling_limits_are_checked() -> None:
    for field, value in (("max_tokens", 0), ("temperature", -1), ("top_p", 0), ("top_k", -1)):
        with pytest.raises(ValueError, match=f"sampling.{field} must"):
            replace(Sampling(), **{field: value})
