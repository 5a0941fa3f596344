"""RLOO, REINFORCE++, Dr. GRPO, DAPO, GSPO, CISPO, PPO, PRIME: what each makes of a batch, and that each learns."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import reference
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_checkpoint import saving
from test_grpo import Digits, fit, folder, weights  # noqa: F401 (a fixture)

from rlvr_lightning.__main__ import main
from rlvr_lightning.advantage import of_completions
from rlvr_lightning.cispo import CISPO
from rlvr_lightning.dapo import DAPO
from rlvr_lightning.data.arithmetic import Arithmetic
from rlvr_lightning.data.prompts import PromptData
from rlvr_lightning.delta.tensor import flat_bits
from rlvr_lightning.dr_grpo import DrGRPO
from rlvr_lightning.experience import Batching, Handling
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.gspo import GSPO
from rlvr_lightning.kept_batch import about_batch, save_batch
from rlvr_lightning.losses import Objective
from rlvr_lightning.optim import SGD
from rlvr_lightning.optim.release import GradientRelease
from rlvr_lightning.policy import LoRA
from rlvr_lightning.ppo import PPO, PPOObjective
from rlvr_lightning.prime import PRIME
from rlvr_lightning.reinforce_pp import ReinforcePP, ReinforcePPObjective
from rlvr_lightning.rewards.arithmetic import FinalAnswer
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rloo import RLOO, RLOOObjective
from rlvr_lightning.schema import Sampling

ALL = [RLOO, ReinforcePP, DrGRPO, DAPO, GSPO, CISPO, PPO, PRIME]
WHOLE = Batching(micro_batch=24)
MODES = {
    "sgd": {"optimizer": partial(torch.optim.SGD, lr=0.5)},
    "adamw": {"optimizer": partial(torch.optim.AdamW, lr=1e-2)},
    "split released": {
        "optimizer": partial(SGD, lr=0.5),
        "dtype": "bfloat16",
        "gradient_release": GradientRelease(),
        "batching": WHOLE,
    },
    "stochastic": {"optimizer": partial(SGD, lr=0.5, master="none", rounding="stochastic"), "dtype": "bfloat16"},
    "lora": {"optimizer": partial(torch.optim.SGD, lr=0.5), "lora": LoRA(rank=2)},
}


class Odd(Reward):
    """1 where the digits of a completion are odd in number, a verifier that says yes and no."""

    def __call__(self, samples):
        return [float(sum(c.isdigit() for c in s.text) % 2) for s in samples]


def module(kind: type[GRPO], model: str, **settings) -> GRPO:
    """As in `test_grpo`, of any algorithm."""
    defaults = {"model": model, "rewards": {"odd": Odd()}, "optimizer": partial(torch.optim.SGD, lr=0.5)}
    defaults |= {"group_size": 4, "sampling": Sampling(max_tokens=9, temperature=0.8)}
    return kind(**defaults | settings)


def recording(kind: type[GRPO]) -> type[GRPO]:
    """The algorithm, remembering what it learned from and what it logged."""

    class Recording(kind):
        def learn(self, experience) -> None:
            self.seen = [*getattr(self, "seen", []), experience]
            super().learn(experience)

        def log(self, name, value, *args, **kwargs) -> None:
            self.told = getattr(self, "told", {})
            self.told.setdefault(name, []).append(float(value))
            super().log(name, value, *args, **kwargs)

    return Recording


def rewards_of(model: GRPO, step: int = 0) -> list[float]:
    """Of the batch that an experience is of, scored again."""
    rollouts = model.seen[step].rollouts
    texts = model.tokenizer.batch_decode(
        [ids[:n] for ids, n in zip(rollouts.completion_ids.tolist(), rollouts.lengths.tolist(), strict=True)],
        skip_special_tokens=True,
    )
    return [float(sum(c.isdigit() for c in text) % 2) for text in texts]


def rows(x: torch.Tensor, mask: torch.Tensor) -> list[list[float]]:
    return [row[on].tolist() for row, on in zip(x, mask, strict=True)]


# ---- every algorithm, every precision mode ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_takes_every_optimizer_and_precision(kind, mode: str, folder, tmp_path: Path) -> None:  # noqa: F811
    model = module(recording(kind), folder, **MODES[mode])
    model.configure_model()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trainable.items()}
    trainer = fit(model, tmp_path, steps=2)
    assert trainer.global_step == 2, "steps of the policy, however many models there are"
    moved = {n.split(".")[0] for n, p in trainable.items() if not torch.equal(flat_bits(p), flat_bits(before[n]))}
    assert moved == ({"policy", "prm"} if kind is PRIME else {"policy"})
    assert all(bool(p.isfinite().all()) for p in trainable.values())
    assert model.told["train/nonfinite_steps"] == [0.0, 0.0] and math.isfinite(model.told["train/loss"][1])
    if kind is PPO:
        head = [name for name in trainable if "value_head" in name]
        assert len(head) == 2 and not any(torch.equal(trainable[name], before[name]) for name in head)


# ---- settings ----


@pytest.mark.parametrize(
    ("path", "override", "expected"),
    [
        ("gspo.GSPO", "objective.kl_coef=0.5", {"ratio: sequence", "clip_low: 0.0003", "kl_coef: 0.5"}),
        ("rloo.RLOO", "objective.clip_low=0.1", {"kl_in: reward", "normalization: constant", "kl_coef: 0.001"}),
        ("dapo.DAPO", "handling.truncated=mask", {"clip_high: 0.28", "resample_rounds: 3", "truncated: mask"}),
        ("cispo.CISPO", "objective.entropy_coef=0.1", {"surrogate: weight", "clip_low: 1.0", "clip_high: 4.0"}),
        ("ppo.PPO", "value_lr=0.5", {"kl_in: reward", "value_lr: 0.5", "lam: 1.0"}),
    ],
)
def test_setting_one_field_keeps_the_algorithm(path: str, override: str, expected: set[str], capsys) -> None:
    argv = ["fit", "--config=sgd.yaml", f"--model=rlvr_lightning.{path}", f"--model.{override}", "--print_config"]
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code in (None, 0)
    lines = {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert expected <= lines, expected - lines


def test_what_makes_an_algorithm_cannot_be_set(capsys) -> None:
    argv = ["fit", "--config=sgd.yaml", "--model=rlvr_lightning.rloo.RLOO", "--model.advantage=mean"]
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "unknown option 'advantage' of RLOO; RLOO sets it itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PPO, {"lam": 1.5}, r"lam must lie in \[0, 1\], got 1.5"),
        (PPO, {"value_clip": -1.0}, "value_lr and value_clip must not be negative, got None and -1.0"),
        (PPO, {"group_size": 0}, "group_size must be at least 1, got 0"),
        (
            PPO,
            {"group_size": 1, "handling": Handling(resample_rounds=1)},
            "resample_rounds needs group_size of at least 2",
        ),
        (RLOO, {"group_size": 1}, "group_size must be at least 2, got 1: a group of one has no baseline"),
        (PRIME, {"reference": "none"}, "reference: none leaves PRIME nothing to compare with"),
        (PRIME, {"beta": 0.0}, "beta must be positive"),
        (ReinforcePP, {"group_size": 1, "baseline": "mean"}, "baseline: mean needs group_size of at least 2"),
        (DAPO, {"rewards": {"overlong": Odd()}}, "rewards.overlong is DAPO's own"),
    ],
)
def test_refuses(kind, settings, message: str, folder) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=message):
        module(kind, folder, **settings)


def test_prime_refuses_what_is_no_verdict(folder, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=r"PRIME: the first of rewards must say from 0 \(wrong\) to 1 \(right\)"):
        fit(module(PRIME, folder, rewards={"digits": Digits()}), tmp_path, steps=1)


# ---- what each makes of a batch ----


def test_rloo_compares_with_the_others_after_the_kl_penalty(folder, tmp_path: Path) -> None:  # noqa: F811
    model = module(recording(RLOO), folder, objective=RLOOObjective(kl_coef=0.3))
    fit(model, tmp_path, steps=2)
    seen = model.seen[1]  # the policy has left its reference
    gaps = rows(seen.rollouts.rollout_logprobs - seen.ref_logprobs, seen.mask)
    penalized = [reward - 0.3 * sum(gap) for reward, gap in zip(rewards_of(model, 1), gaps, strict=True)]
    assert max(abs(sum(gap)) for gap in gaps) > 1e-3
    assert seen.advantages.tolist() == pytest.approx(reference.advantages(penalized, 4, "leave_one_out"), abs=1e-5)
    assert model.told["policy/kl_k1"][1] != 0


@pytest.mark.parametrize("cut", [{"top_p": 0.6}, {"top_k": 2}])
@pytest.mark.parametrize("correction", ["none", "truncate"])
def test_a_sampler_that_cuts_tails_off_is_no_tax_on_length(cut, correction: str, folder, tmp_path: Path) -> None:  # noqa: F811
    objective = RLOOObjective(kl_coef=0.3, correction=correction)
    model = module(recording(RLOO), folder, objective=objective, sampling=Sampling(max_tokens=9, **cut))
    fit(model, tmp_path, steps=1)
    seen = model.seen[0]  # the policy is its reference
    assert (seen.rollouts.rollout_logprobs - seen.ref_logprobs)[seen.mask].mean() > 0.1
    expected = reference.advantages(rewards_of(model), 4, "leave_one_out")
    assert seen.advantages.tolist() == pytest.approx(expected, abs=1e-4)
    assert seen.old_logprobs is None


@pytest.mark.parametrize("baseline", ["none", "mean"])
def test_reinforce_pp_standardizes_returns_over_the_batch(baseline: str, folder, tmp_path: Path) -> None:  # noqa: F811
    model = module(recording(ReinforcePP), folder, objective=ReinforcePPObjective(kl_coef=0.3), baseline=baseline)
    fit(model, tmp_path, steps=2)
    seen, rewards = model.seen[1], rewards_of(model, 1)
    if baseline == "mean":
        rewards = reference.advantages(rewards, 4, "mean")
    returns = []
    for reward, gap in zip(rewards, rows(seen.rollouts.rollout_logprobs - seen.ref_logprobs, seen.mask), strict=True):
        returns.append([reward - 0.3 * sum(gap[t:]) for t in range(len(gap))])
    flat = torch.tensor([x for row in returns for x in row], dtype=torch.float64)
    expected = (flat - flat.mean()) / (flat.std() + 1e-4)
    assert seen.advantages[seen.mask].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_dapo_draws_again_what_is_all_right_or_all_wrong_whatever_its_length(folder, tmp_path: Path) -> None:  # noqa: F811
    """With a buffer of all tokens but one every completion is docked by its length, so all totals differ."""
    dull = {}
    for rounds in (0, 4):
        handling = Handling(resample_rounds=rounds)
        model = module(recording(DAPO), folder, group_size=2, handling=handling, overlong_tokens=8)
        fit(model, tmp_path, steps=1, prompts_per_step=12)
        found = torch.tensor(rewards_of(model)).view(-1, 2)
        dull[rounds] = int((found[:, 0] == found[:, 1]).sum())
        assert model.seen[0].ref_logprobs is None
        alike, advantages = found[:, 0] == found[:, 1], model.seen[0].advantages.view(-1, 2)
        assert advantages[~alike].any() and not advantages[alike].any(), "nothing is learned from length alone"
        lengths = model.seen[0].rollouts.lengths.view(-1, 2)
        assert rounds or (lengths[alike][:, 0] != lengths[alike][:, 1]).any()
        assert model.told["reward/no_signal_frac"][0] == pytest.approx(dull[rounds] / 12), "whatever their lengths"
    assert dull[0] > dull[4]
    assert model.told["reward/overlong"][0] < 0


def test_without_minibatches_gspo_is_grpo_by_sequence(folder, tmp_path: Path) -> None:  # noqa: F811
    grpo = module(GRPO, folder, objective=Objective(normalization="sequence"))
    gspo = module(GSPO, folder)
    for model, name in ((grpo, "grpo"), (gspo, "gspo")):
        fit(model, tmp_path / name, steps=1)
    start = module(GRPO, folder)
    start.configure_model()
    for a, b, c in zip(weights(grpo), weights(gspo), weights(start), strict=True):
        torch.testing.assert_close(a - c, b - c, atol=1e-6, rtol=1e-3)


def values_by_hand(model: PPO, seen) -> list[list[float]]:
    """Of every completion by itself, from full hidden states; with the weights of now."""
    out, rollouts = [], seen.rollouts
    for r, length in enumerate(rollouts.lengths.tolist()):
        prompt = rollouts.prompt_ids[r // rollouts.group]
        ids = torch.tensor([prompt + rollouts.completion_ids[r, :length].tolist()])
        with torch.no_grad():
            hidden = model.policy.causal_lm.base_model(input_ids=ids).last_hidden_state[0]
            out.append(model.policy.value_head(hidden[len(prompt) - 1 : -1]).tolist())
    return out


def test_ppo_estimates_advantages_of_tokens(folder, tmp_path: Path) -> None:  # noqa: F811
    settings = {"objective": PPOObjective(kl_coef=0.2), "gamma": 0.9, "lam": 0.8, "value_lr": 0.9}
    model = module(recording(PPO), folder, **settings)
    fit(model, tmp_path, steps=3)
    frozen = module(
        recording(PPO), folder, **settings | {"optimizer": partial(torch.optim.SGD, lr=0.0), "value_lr": 0.0}
    )
    frozen.configure_model()
    frozen.policy.load_state_dict(model.policy.state_dict())
    fit(frozen, tmp_path / "frozen", steps=1)
    seen, rewards = frozen.seen[0], rewards_of(frozen)
    values = values_by_hand(frozen, seen)
    assert max(abs(v) for row in values for v in row) > 0.05, "the head has learned something"
    gaps = rows(seen.rollouts.rollout_logprobs - seen.ref_logprobs, seen.mask)
    flat: list[float] = []
    for r, (own, gap) in enumerate(zip(values, gaps, strict=True)):
        earned = [-0.2 * g for g in gap]
        earned[-1] += rewards[r]
        flat += reference.gae(earned, own, 0.9, 0.8)
    x = torch.tensor(flat, dtype=torch.float64)
    expected = (x - x.mean()) / (x.std() + 1e-4)
    assert seen.advantages[seen.mask].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    targets = torch.tensor([v for row in values for v in row]).double() + x
    assert seen.returns[seen.mask].tolist() == pytest.approx(targets.tolist(), abs=1e-4)


def test_the_value_head_reads_the_policy_and_does_not_shape_it(folder, tmp_path: Path) -> None:  # noqa: F811
    """Whatever the head's rate, the policy's first update is the same; and it is counted apart."""
    quick, slow = (module(recording(PPO), folder, value_lr=lr, max_grad_norm=0.0) for lr in (0.9, 0.0))
    for model, name in ((quick, "a"), (slow, "b")):
        fit(model, tmp_path / name, steps=1)
    for (name, a), b in zip(quick.policy.model.named_parameters(), slow.policy.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert quick.told["memory/critic_bytes"] == [4 * (16 + 1)], "hidden size 16, float32"


@pytest.mark.parametrize("kind", [PPO, ReinforcePP, PRIME])
def test_micro_batches_change_no_update(kind, folder, tmp_path: Path) -> None:  # noqa: F811
    made = []
    for micro in (24, 4, 2):
        model = module(kind, folder, batching=Batching(micro_batch=micro), max_grad_norm=0.0)
        fit(model, tmp_path / str(micro), steps=2)
        made.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for other in made[1:]:
        for name, a in made[0].items():
            torch.testing.assert_close(a, other[name], atol=5e-6, rtol=1e-3, msg=name)


def test_ppo_takes_minibatches_and_passes(folder, tmp_path: Path) -> None:  # noqa: F811
    batching = Batching(micro_batch=4, minibatches=3, passes=2)
    model = module(recording(PPO), folder, batching=batching, value_lr=0.9, group_size=2)
    trainer = fit(model, tmp_path, steps=12)
    assert (trainer.global_step, model.rollout_step) == (12, 2)
    assert max(model.told["value/clip_frac"]) > 0, "a value may not move further than value_clip in one batch"


def test_prime_begins_as_rloo_and_then_has_rewards_of_tokens(folder, tmp_path: Path) -> None:  # noqa: F811
    """The reward model starts as its reference, so that its first rewards are 0."""
    prime, rloo = module(recording(PRIME), folder, prm_lr=20.0), module(recording(RLOO), folder)
    for model, name in ((prime, "prime"), (rloo, "rloo")):
        fit(model, tmp_path / name, steps=2)
    of_tokens, of_completions = prime.seen[0].advantages, rloo.seen[0].advantages
    assert torch.equal(of_tokens, of_completions[:, None] * prime.seen[0].mask)
    seen = prime.seen[1]
    inside = [max(row) - min(row) for row in rows(seen.advantages, seen.mask) if len(row) > 1]
    assert max(inside) > 1e-4


def test_the_reward_model_takes_the_step_of_a_bare_loop(folder, tmp_path: Path) -> None:  # noqa: F811
    """Second step: cross-entropy of what it was after the first, by plain autograd on full logits."""
    from transformers import AutoModelForCausalLM

    settings = {"prm_lr": 2.0, "beta": 0.5, "max_grad_norm": 0.0, "batching": Batching(micro_batch=8)}
    one, two = (module(recording(PRIME), folder, **settings) for _ in range(2))
    fit(one, tmp_path / "one", steps=1)
    fit(two, tmp_path / "two", steps=2)
    bare, ref = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    bare.load_state_dict(one.prm.model.state_dict())
    seen, labels, loss, process = two.seen[1], rewards_of(two, 1), 0.0, []
    for r, length in enumerate(seen.rollouts.lengths.tolist()):
        prompt = seen.rollouts.prompt_ids[r // 4]
        ids = torch.tensor([prompt + seen.rollouts.completion_ids[r, :length].tolist()])

        def logprobs(lm, ids=ids, prompt=prompt):
            n = len(prompt)
            return (lm(ids).logits[0] / 0.8).log_softmax(-1)[n - 1 : -1].gather(1, ids[0, n:, None])[:, 0]

        own = 0.5 * (logprobs(bare) - logprobs(ref).detach())
        process.append(own.tolist())
        p = own.sum().sigmoid()
        loss = loss - (labels[r] * p.log() + (1 - labels[r]) * (1 - p).log()) / len(labels)
    loss.backward()
    assert two.told["prm/loss"][1] == pytest.approx(float(loss), rel=1e-4)
    expected = reference.process_advantages(process, labels, 4, 1.0)
    flat = [x for row in expected for x in row]
    assert seen.advantages[seen.mask].tolist() == pytest.approx(flat, abs=1e-4)
    for (name, p), after in zip(bare.named_parameters(), two.prm.model.parameters(), strict=True):
        torch.testing.assert_close(p.detach() - 2.0 * p.grad, after.detach(), atol=2e-5, rtol=1e-3, msg=name)


# ---- checkpoints ----


@pytest.mark.parametrize("delta", [False, True], ids=["lightning", "delta"])
@pytest.mark.parametrize("kind", [PPO, PRIME])
def test_a_resumed_run_has_its_critic(kind, delta: bool, folder, tmp_path: Path, capsys) -> None:  # noqa: F811
    settings = {"optimizer": partial(torch.optim.AdamW, lr=1e-2)}
    if delta:
        settings = {"optimizer": partial(SGD, lr=0.5), "dtype": "bfloat16", "gradient_release": GradientRelease()}
    settings |= {"batching": WHOLE}
    ends = []
    for name, steps, resume in (("whole", 4, False), ("half", 2, False), ("half", 4, True)):
        keep = ModelCheckpoint(tmp_path / name, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        trainer = saving(tmp_path / name) | {"callbacks": [keep]}
        if not delta:
            del trainer["plugins"]
        model = module(kind, folder, **settings)
        fit(
            model,
            tmp_path / name,
            steps=steps,
            ckpt_path=str(tmp_path / name / "step=2.ckpt") if resume else None,
            **trainer,
        )
        ends.append(model)
    for (name, a), b in zip(ends[0].named_parameters(), ends[2].named_parameters(), strict=True):
        assert torch.equal(flat_bits(a), flat_bits(b[1])), name
    checkpoint, out = str(tmp_path / "whole" / "step=4.ckpt"), str(tmp_path / "out")
    assert main(["export", checkpoint, "--out", out]) == 0, capsys.readouterr().err
    assert main(["sparsity", folder, checkpoint]) == 0, capsys.readouterr().err
    assert "only there" not in capsys.readouterr().out, "the model alone is compared"
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in ends[0].policy.model.state_dict().items():
        assert torch.equal(tensor, exported[name]), name
    with pytest.raises(
        ValueError, match=rf"model.class_path: .* was made with .*{kind.__name__}\", now it is .*GRPO\""
    ):
        fit(
            module(GRPO, folder, **settings),
            tmp_path / "other",
            steps=6,
            ckpt_path=checkpoint,
            **(saving(tmp_path) if delta else {}),
        )


REFUSED = {
    "model.value_lr": (PPO, {"value_lr": 0.25}),
    "model.prm_lr": (PRIME, {"prm_lr": 0.25}),
}
SAID = {
    "model.gamma": (PPO, {"gamma": 0.9}),
    "model.lam": (PPO, {"lam": 0.9}),
    "model.value_clip": (PPO, {"value_clip": 0.0}),
    "model.baseline": (ReinforcePP, {"baseline": "mean"}),
    "model.overlong_tokens": (DAPO, {"overlong_tokens": 3}),
    "model.reward_weights": (PPO, {"reward_weights": {"odd": 2.0}}),
    "model.rewards": (PPO, {"rewards": {"digits": Digits()}}),
    "model.stop": (PPO, {"stop": ["="]}),
}


@pytest.mark.parametrize("field", REFUSED | SAID)
def test_no_changed_setting_of_an_algorithm_goes_unnoticed(field: str, folder, tmp_path: Path) -> None:  # noqa: F811
    kind, change = (REFUSED | SAID)[field]
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    fit(module(kind, folder), tmp_path, 1, callbacks=[keep], enable_checkpointing=True)
    noticed = (
        pytest.raises(ValueError, match=rf"^{field}: ") if field in REFUSED else pytest.warns(match=rf"^{field}: ")
    )
    with noticed:
        fit(module(kind, folder, **change), tmp_path, 2, ckpt_path=str(tmp_path / "last.ckpt"))


# ---- learning ----


class StartsEven(Reward):
    """1 where a completion begins with an even digit."""

    def __call__(self, samples):
        return [float(s.text[:1] in tuple("02468")) for s in samples]


STEPS = {GSPO: 3, CISPO: 3}  # minibatches: with one they are GRPO
RATES = {RLOO: 1.0, DrGRPO: 2.0, DAPO: 0.5, GSPO: 0.2, CISPO: 0.2}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_each_learns(kind, folder, tmp_path: Path) -> None:  # noqa: F811
    """A random model, thirty batches of six prompts."""
    settings = {"optimizer": partial(torch.optim.SGD, lr=RATES.get(kind, 0.5)), "group_size": 8}
    settings |= {"sampling": Sampling(max_tokens=4), "batching": Batching(minibatches=STEPS.get(kind, 1))}
    model = module(recording(kind), folder, rewards={"even": StartsEven()}, **settings)
    fit(model, tmp_path, steps=30 * STEPS.get(kind, 1))
    earned = model.told["reward/even"]
    assert len(earned) == 30 and mean(earned[-5:]) > mean(earned[:3]) + 0.3, earned
    if kind is PPO:
        assert mean(model.told["value/loss"][-5:]) < 0.5 * model.told["value/loss"][0]
    if kind is PRIME:
        assert mean(model.told["prm/loss"][-5:]) < 0.6 < math.log(2) == pytest.approx(model.told["prm/loss"][0])
        assert mean(model.told["prm/accuracy"][-5:]) > 0.8


TINY_RATES = {RLOO: 0.5, DrGRPO: 0.5, CISPO: 0.03}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_each_learns_on_the_tiny_model(kind, tmp_path: Path) -> None:
    """Arithmetic, twenty-five batches of 64 completions: their mean reward rises by a tenth.

    The standard error of a mean over five batches is 0.03.
    """
    minibatches = 4 if kind in STEPS else 1
    group = 1 if kind in (PPO, ReinforcePP) else 8
    settings = {"optimizer": partial(torch.optim.SGD, lr=TINY_RATES.get(kind, 0.06)), "group_size": group}
    settings |= {"sampling": Sampling(max_tokens=32), "batching": Batching(minibatches=minibatches)}
    torch.manual_seed(0)
    settings |= {"value_lr": 0.5} if kind is PPO else {}
    model = recording(kind)(model="tiny", rewards={"answer": FinalAnswer()}, **settings)
    data = PromptData("tiny", train=Arithmetic(split="train", num=500), prompts_per_step=64 // group, seed=0)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(max_steps=25 * minibatches, accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(model, datamodule=data)
    earned = model.told["reward/answer"]
    assert len(earned) == 25 and mean(earned[-5:]) > mean(earned[:5]) + 0.1, earned


# ---- around them ----


@pytest.mark.parametrize("kind", [PPO, DAPO], ids=["tokens", "completions"])
def test_a_kept_batch_can_be_replayed(kind, folder, tmp_path: Path, capsys) -> None:  # noqa: F811
    model = module(recording(kind), folder)
    fit(model, tmp_path, steps=1)
    save_batch(tmp_path / "kept", 0, model.seen[0], about_batch(model))
    assert main(["replay", str(tmp_path / "kept")]) == 0
    out = capsys.readouterr().out
    assert "0 of 24 completions are not finite" in out
    advantages = [float(line.split()[3]) for line in out.splitlines()[1:25]]
    own = of_completions(model.seen[0].advantages, model.seen[0].mask)
    assert advantages == pytest.approx(own.tolist(), rel=1e-2)


def test_a_value_that_is_not_finite_is_named_by_replay(folder, tmp_path: Path, capsys) -> None:  # noqa: F811
    model = module(recording(PPO), folder)
    fit(model, tmp_path, steps=1)
    save_batch(tmp_path / "whole", 0, model.seen[0], about_batch(model))
    assert main(["replay", str(tmp_path / "whole")]) == 0
    losses = [float(line.split()[4]) for line in capsys.readouterr().out.splitlines()[1:25]]
    assert sum(losses) == pytest.approx(model.told["train/loss"][0], abs=1e-3)
    assert model.told["value/loss"][0] > 0.1, "and so a part of it"
    broken = model.seen[0].old_values.clone()
    broken[2, 0] = math.nan
    save_batch(tmp_path / "broken", 0, replace(model.seen[0], old_values=broken), about_batch(model))
    assert main(["replay", str(tmp_path / "broken")]) == 0
    out = capsys.readouterr().out
    [amiss] = [line for line in out.splitlines() if "not finite:" in line]
    assert amiss.split()[1] == "2" and amiss.endswith("not finite: old_values, loss")


def test_a_dry_run_counts_the_reward_model(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    held = {}
    for config in ("sgd.yaml", "prime.yaml"):
        with pytest.raises(SystemExit):
            main(["fit", f"--config={config}", "--dry_run", "--data.train.num=64"])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        held[config] = {line[0]: float(line[-1]) for line in lines if line and line[0] in ("weights", "together,")}
        held[config]["model"] = next((float(line[2]) for line in lines if line[:2] == ["reward", "model"]), 0.0)
    assert held["prime.yaml"]["model"] == held["prime.yaml"]["weights"] == 1.70, "SGD has no state"
    assert held["prime.yaml"]["together,"] == pytest.approx(held["sgd.yaml"]["together,"] + 1.70, abs=0.01)
    assert held["sgd.yaml"]["model"] == 0.0
