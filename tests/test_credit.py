"""Advantages and losses of single tokens against loops over scalars and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from test_losses import random_case

from rlvr_lightning.advantage import gae, process_advantages, standardized, teaches, token_rewards
from rlvr_lightning.losses import Counts, Objective, outcome_loss, policy_loss, value_loss

LENGTHS = [7, 3, 1, 5, 2, 4]
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]


def tokens(x: torch.Tensor) -> list[list[float]]:
    """Of each completion those that count."""
    return [row[:n] for row, n in zip(x.tolist(), LENGTHS, strict=True)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.0), (0.9, 0.8)])
def test_gae_equals_naive(gamma: float, lam: float) -> None:
    rewards, values = torch.randn(6, 7).double(), torch.randn(6, 7).double()
    out = gae(rewards, values, MASK, gamma, lam)  # what lies behind the ends is not looked at
    for r, n in enumerate(LENGTHS):
        expected = reference.gae(rewards[r, :n].tolist(), values[r, :n].tolist(), gamma, lam)
        assert out[r, :n].tolist() == pytest.approx(expected, abs=1e-12)
        assert not out[r, n:].any()


def test_gae_with_lambda_1_gives_returns_to_go() -> None:
    """Rewards 0, 0, 4 discounted by half: returns 1, 2, 4, whatever the values."""
    rewards, values = torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[3.0, -1.0, 5.0]])
    out = gae(rewards, values, torch.ones(1, 3).bool(), gamma=0.5, lam=1.0)
    assert (out + values).tolist() == [[1.0, 2.0, 4.0]]


def test_rewards_of_tokens_by_hand() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    penalty = torch.full((3, 3), 0.25)
    out = token_rewards(torch.tensor([1.0, 0.0, 9.0]), mask, penalty)
    assert out.tolist() == [[-0.25, 0.75, 0.0], [-0.25, -0.25, -0.25], [0.0, 0.0, 0.0]]


class TwoRanks:
    """What a rank hears that calls `sum` beside another, in turn; the other's numbers are noted first."""

    def __init__(self, others: list[torch.Tensor]) -> None:
        self.others = iter(others)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + next(self.others)


def test_standardized_is_over_all_tokens() -> None:
    x = torch.randn(6, 7) * 3 + 2
    flat = x[MASK]
    expected = (x - flat.mean()) / flat.std()
    torch.testing.assert_close(standardized(x, MASK, eps=0.0)[MASK], expected[MASK])
    assert not standardized(x, MASK)[~MASK].any()
    assert not standardized(torch.full((6, 7), 0.1), MASK).any(), "exactly: the mean of equal values is that value"
    assert not standardized(x[:1, :1], torch.ones(1, 1).bool()).any(), "a single token"


def test_standardized_over_ranks_is_that_of_the_whole() -> None:
    x = torch.randn(6, 7)
    a, b, flat = x[:2][MASK[:2]].double(), x[2:][MASK[2:]].double(), x[MASK].double()
    mean = flat.mean()
    others = [torch.stack([torch.tensor(float(len(b))).double(), b.sum()]), (b - mean).square().sum()]
    part = standardized(x[:2], MASK[:2], TwoRanks(others))  # type: ignore[arg-type]
    torch.testing.assert_close(part, standardized(x, MASK)[:2])
    assert len(a) != len(b), "so that a mean of means would differ"


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("group", [2, 3])
def test_process_advantages_equal_naive(gamma: float, group: int) -> None:
    process, rewards = torch.randn(6, 7).double(), torch.randn(6).double()
    out = process_advantages(process, rewards, MASK, group, gamma)
    expected = reference.process_advantages(tokens(process), rewards.tolist(), group, gamma)
    for own, right in zip(tokens(out), expected, strict=True):
        assert own == pytest.approx(right, abs=1e-12)
    assert not out[~MASK].any()


def test_a_masked_completion_is_no_zero_among_the_others() -> None:
    """Three completions with process rewards 2, 4 and none: the baselines are 4, 2 and 3, not 2, 1 and 2."""
    process = torch.tensor([[2.0, 2.0], [4.0, 4.0], [9.0, 9.0]])
    mask = torch.tensor([[True, True], [True, True], [False, False]])
    out = process_advantages(process, torch.ones(3), mask, 3)
    assert out.tolist() == [[-4.0, -2.0], [4.0, 2.0], [0.0, 0.0]]
    mask[1] = False
    assert process_advantages(process, torch.ones(3), mask, 3)[0].tolist() == [4.0, 2.0], "no others: no baseline"


def test_groups_that_teach() -> None:
    """Three groups of two: tokens differ, only a masked one does, none does."""
    advantages = torch.zeros(6, 7)
    advantages[1, 2], advantages[2, 6] = 1.0, 1.0
    assert teaches(advantages, MASK, 2).tolist() == [True, False, False]
    advantages[4, 0] = math.nan  # must be seen to be not finite
    assert teaches(advantages, MASK, 2).tolist() == [True, False, True]


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_value_loss_equals_naive(clip: float) -> None:
    values, old, returns = (torch.randn(6, 7).double() for _ in range(3))
    weights = torch.rand(6, 7).double() * MASK
    values[~MASK] = math.inf  # a masked value does no harm
    values.requires_grad_()
    out = value_loss(values, old, returns, weights, clip)
    lists = [x.tolist() for x in (values, old, returns, weights)]
    assert float(out.loss) == pytest.approx(reference.value_loss(*lists, clip))
    out.loss.backward()
    assert torch.isfinite(values.grad).all() and not values.grad[~MASK].any()


def test_a_value_that_has_moved_far_enough_has_no_gradient() -> None:
    """From 0 towards 1: at 0.5 it is held at 0.2, of error 0.8 > 0.5; away from it, at -0.5, it is not held."""
    for value, gradient in ((0.5, 0.0), (-0.5, -1.5), (0.1, -0.9)):
        v = torch.tensor([[value]], requires_grad=True)
        value_loss(v, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), clip=0.2).loss.backward()
        assert float(v.grad) == pytest.approx(gradient)


def test_outcome_loss_equals_naive() -> None:
    process, labels = torch.randn(6, 7).double(), torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 0.0]).double()
    mask = MASK.clone()
    mask[4] = False
    out = outcome_loss(process, labels, mask, completions=9)
    rows = tokens(process)
    rows[4] = []
    assert float(out.loss) == pytest.approx(reference.outcome_loss(rows, labels.tolist(), 9))
    right = sum((sum(row) > 0) == (label > 0.5) for row, label in zip(rows, labels.tolist(), strict=True) if row)
    assert int(out.metrics["prm_right"]) == right
    even = outcome_loss(torch.zeros(3, 2), torch.tensor([1.0, 0.0, 0.0]), torch.ones(3, 2).bool(), completions=3)
    assert float(even.metrics["prm_right"]) == 1.5, "ties count one half"


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("surrogate", ["clip", "weight"])
@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_policy_loss_of_token_advantages_equals_naive(ratio: str, surrogate: str, kl_in: str) -> None:
    policy, old, ref, _, _, mask = random_case()
    objective = Objective(ratio=ratio, surrogate=surrogate, clip_high=0.3, kl_coef=0.2, kl_in=kl_in)
    adv = torch.randn(6, 7).double()
    counts = Counts(tokens=23, completions=6, max_tokens=7)
    out = policy_loss(policy, old, adv, mask, objective, counts, ref_logprobs=ref)
    lists = [x.tolist() for x in (policy, old, adv, mask)]
    expected = reference.policy_loss(*lists, objective, counts, ref=ref.tolist())
    assert float(out.loss) == pytest.approx(expected, rel=1e-6)
    assert "kl" in out.metrics, "measured in both cases"


def test_advantages_of_equal_tokens_are_those_of_the_completion() -> None:
    policy, old, _, adv, _, mask = random_case()
    counts = Counts(tokens=20, completions=5, max_tokens=7)
    one = policy_loss(policy, old, adv, mask, Objective(), counts).loss
    assert torch.equal(one, policy_loss(policy, old, adv[:, None].expand(6, 7), mask, Objective(), counts).loss)


def test_a_clipped_token_keeps_its_gradient_under_cispo_alone() -> None:
    """Ratio e, A = 2: clipped to 1.2, PPO's gradient is 0, CISPO's is -1.2 * 2 (and not -e * 2)."""
    for surrogate, gradient in (("clip", 0.0), ("weight", -2.4)):
        policy = torch.zeros(1, 1, requires_grad=True)
        args = (torch.full((1, 1), -1.0), torch.tensor([2.0]), torch.ones(1, 1).bool(), Objective(surrogate=surrogate))
        out = policy_loss(policy, *args, Counts(tokens=1, completions=1, max_tokens=1))
        out.loss.backward()
        assert float(policy.grad) == pytest.approx(gradient) and int(out.metrics["clipped"]) == 1


def test_the_weight_of_a_token_is_no_part_of_its_gradient() -> None:
    """Ratio 1.1, not clipped, A = 2, log p = -3: d/dlogp of -1.1 * 2 * log p is -2.2; of -ratio * 2 * log p, 4.4."""
    policy = torch.full((1, 1), -3.0, requires_grad=True)
    args = (
        policy.detach() - math.log(1.1),
        torch.tensor([2.0]),
        torch.ones(1, 1).bool(),
        Objective(surrogate="weight"),
    )
    policy_loss(policy, *args, Counts(tokens=1, completions=1, max_tokens=1)).loss.backward()
    assert float(policy.grad) == pytest.approx(-2.2)
