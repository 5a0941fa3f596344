"""Advantages, KL estimators and the clipped surrogate against loops over scalars and numbers worked by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import reference
import torch

from rlvr_lightning.advantage import group_advantages, has_signal
from rlvr_lightning.losses import Counts, Objective, kl_divergence, policy_loss, token_weights


@pytest.mark.parametrize("baseline", ["mean", "mean_std", "leave_one_out"])
@pytest.mark.parametrize("group", [2, 3, 5])
def test_advantages_equal_naive(baseline: str, group: int) -> None:
    rewards = torch.randn(7 * group).double()
    expected = reference.advantages(rewards.tolist(), group, baseline)
    assert group_advantages(rewards, group, baseline).tolist() == pytest.approx(expected, abs=1e-12)


def test_advantages_by_hand() -> None:
    # rewards 1, 0, 0: mean 1/3, sample std sqrt(((2/3)^2 + 2 (1/3)^2) / 2) = sqrt(1/3)
    out = group_advantages(torch.tensor([1.0, 0.0, 0.0]), 3, "mean_std", eps=0.0)
    assert out.tolist() == pytest.approx([2 / 3 * math.sqrt(3), -math.sqrt(3) / 3, -math.sqrt(3) / 3], abs=1e-6)


def test_equal_rewards_give_exactly_zero() -> None:
    rewards = torch.full((7,), 0.1)  # the fp32 mean of seven 0.1 is not 0.1
    assert group_advantages(rewards, 7, "mean_std").abs().max() == 0
    assert has_signal(torch.tensor([0.1, 0.1, 0.1, 0.2]), 2).tolist() == [False, True]


@pytest.mark.parametrize(
    ("rewards", "group", "message"), [([1.0], 1, "group_size"), ([1.0, 2.0, 3.0], 2, "whole groups")]
)
def test_advantages_refuse(rewards: list[float], group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.tensor(rewards), group)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_equals_naive(estimator: str) -> None:
    policy, ref = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    out = kl_divergence(policy, ref, estimator)
    for r, t in itertools.product(range(3), range(5)):
        assert float(out[r, t]) == pytest.approx(reference.kl(float(policy[r, t]), float(ref[r, t]), estimator))


def test_kl_estimates_are_right_on_average() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    exact = float((p * (p / q).log()).sum())
    for estimator in ("k1", "k3"):  # expectation over tokens drawn from the policy p
        assert float((p * kl_divergence(p.log(), q.log(), estimator)).sum()) == pytest.approx(exact, abs=1e-12)


def random_case(rows: int = 6, width: int = 7):
    mask = torch.arange(width) < torch.tensor([7, 3, 1, 5, 0, 4])[:rows, None]
    policy, old, ref = (-torch.rand(rows, width).double() * 2 for _ in range(3))
    return policy, old, ref, torch.randn(rows).double(), torch.rand(rows, width).double(), mask


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_policy_loss_equals_naive(ratio: str, normalization: str, estimator: str) -> None:
    policy, old, ref, adv, ent, mask = random_case()
    objective = Objective(
        ratio=ratio, normalization=normalization, kl_estimator=estimator, kl_coef=0.3, entropy_coef=0.1, clip_high=0.28
    )
    counts = Counts(tokens=31, completions=9, max_tokens=11)  # of a larger step than these rows
    out = policy_loss(policy, old, adv, mask, objective, counts, entropy=ent, ref_logprobs=ref)
    lists = [x.tolist() for x in (policy, old, adv, mask)]
    assert float(out.loss) == pytest.approx(
        reference.policy_loss(*lists, objective, counts, ent.tolist(), ref.tolist()), abs=1e-7
    )


def test_policy_loss_by_hand() -> None:
    # ratio e^0.5 = 1.6487 clipped to 1.2 for A = 2; ratio e^-0.5 = 0.6065 for A = -1 clipped to 0.8
    policy, old = torch.tensor([[-0.5], [-1.5]]), torch.tensor([[-1.0], [-1.0]])
    out = policy_loss(
        policy,
        old,
        torch.tensor([2.0, -1.0]),
        torch.ones(2, 1, dtype=torch.bool),
        Objective(),
        Counts(tokens=2, completions=2, max_tokens=1),
    )
    assert float(out.loss) == pytest.approx((-2.4 + 0.8) / 2)
    assert float(out.metrics["clipped"]) == 2
    assert float(out.metrics["ratio"]) == pytest.approx(math.exp(0.5) + math.exp(-0.5))


def test_gradient_is_the_policy_gradient_on_policy() -> None:
    policy, _, _, adv, _, mask = random_case()
    policy.requires_grad_()
    counts = Counts(tokens=int(mask.sum()), completions=5, max_tokens=7)
    policy_loss(policy, policy.detach(), adv, mask, Objective(), counts).loss.backward()
    expected = -adv[:, None] * mask / counts.tokens
    torch.testing.assert_close(policy.grad, expected)


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_micro_batches_add_up(normalization: str) -> None:
    policy, old, _, adv, _, mask = random_case()
    counts = Counts(tokens=int(mask.sum()), completions=int(mask.any(1).sum()), max_tokens=7)
    objective = Objective(normalization=normalization)
    whole = policy_loss(policy, old, adv, mask, objective, counts)
    parts = [
        policy_loss(policy[i : i + 2], old[i : i + 2], adv[i : i + 2], mask[i : i + 2], objective, counts)
        for i in (0, 2, 4)
    ]
    assert float(sum(p.loss for p in parts)) == pytest.approx(float(whole.loss))
    for name, value in whole.metrics.items():
        assert float(sum(p.metrics[name] for p in parts)) == pytest.approx(float(value))
    if normalization != "constant":
        assert float(token_weights(mask, normalization, counts).sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["truncate", "mask"])
@pytest.mark.parametrize("first", [True, False], ids=["first update", "later"])
def test_corrections_equal_naive(ratio: str, correction: str, first: bool) -> None:
    policy, rollout, ref, adv, _, mask = random_case()
    trainer = policy.clone() if first else policy + 0.3 * torch.randn(policy.shape)
    objective = Objective(ratio=ratio, correction=correction, correction_cap=1.3, kl_coef=0.1)
    counts = Counts(tokens=20, completions=5, max_tokens=7)
    lists = [x.tolist() for x in (policy, rollout, adv, mask)]
    expected = reference.policy_loss(*lists, objective, counts, ref=ref.tolist(), trainer=trainer.tolist())
    old = None if first else trainer
    out = policy_loss(policy, rollout, adv, mask, objective, counts, ref_logprobs=ref, old_logprobs=old)
    assert float(out.loss) == pytest.approx(expected, rel=1e-5)
    apart = (trainer - rollout).exp()[mask]
    outside = (apart > 1.3) | ((apart < 1 / 1.3) & (correction == "mask"))
    assert int(out.metrics["corrected"]) == int(outside.sum()) > 0
    assert float(out.maxima["rollout_gap"]) == pytest.approx(float((policy - rollout)[mask].abs().max()))


def test_a_correction_gives_the_gradient_of_the_policy_not_of_its_own_weights() -> None:
    """One token, sampled with 1/4, under the policy 1/2: weight 2, cut to 1.5; d/dlogp of -2 * 1.5 * ratio is -3."""
    policy = torch.tensor([[0.5]]).log().requires_grad_()
    one = Counts(tokens=1, completions=1, max_tokens=1)
    args = (torch.tensor([[0.25]]).log(), torch.tensor([2.0]), torch.tensor([[True]]))
    out = policy_loss(policy, *args, Objective(correction="truncate", correction_cap=1.5), one)
    out.loss.backward()
    assert float(out.loss) == pytest.approx(-3.0) and float(policy.grad) == pytest.approx(-3.0)
    assert float(out.metrics["ratio"]) == pytest.approx(2.0), "of the policy over the sampler, to be looked at"
    with pytest.raises(ValueError, match=r"objective.correction_cap must be at least 1, got 0.5"):
        Objective(correction_cap=0.5)


def test_masked_infinities_do_no_harm() -> None:
    policy, old, _, adv, _, mask = random_case()
    policy = policy.clone()
    policy[4] = float("-inf")
    policy.requires_grad_()
    out = policy_loss(policy, old, adv, mask, Objective(), Counts(tokens=20, completions=5, max_tokens=7))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert torch.isfinite(policy.grad).all()


def test_inputs_are_not_written_to() -> None:
    case = random_case()
    before = [x.clone() for x in case]
    policy, old, ref, adv, ent, mask = case
    policy_loss(
        policy,
        old,
        adv,
        mask,
        Objective(kl_coef=1.0),
        Counts(tokens=9, completions=3, max_tokens=7),
        entropy=ent,
        ref_logprobs=ref,
    )
    assert all(torch.equal(a, b) for a, b in zip(before, case, strict=True))


def test_objective_refuses_negative_settings() -> None:
    with pytest.raises(ValueError, match=r"objective\.kl_coef must not be negative, got -1"):
        Objective(kl_coef=-1)
