"""Estimates against enumeration, metrics against hand-worked numbers, and two processes against one."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from math import comb

import pytest
import torch
from conftest import random_rollouts

from rlvr_lightning.advantage import has_signal
from rlvr_lightning.estimates import interval, majority, majority_at_k, mcnemar_p, paired_p, pass_at_k, resampled_means
from rlvr_lightning.losses import Counts, Objective, policy_loss
from rlvr_lightning.metrics import (
    Attempts,
    MajorityAtK,
    MeanLength,
    PassAtK,
    RolloutMetrics,
    TokenMeans,
    TruncatedShare,
)
from rlvr_lightning.rewards.score import Scores


@pytest.mark.parametrize("correct", range(8))
@pytest.mark.parametrize("k", [1, 3, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(correct: int, k: int) -> None:
    tries = [i < correct for i in range(7)]
    subsets = list(itertools.combinations(tries, k))
    assert pass_at_k(correct, 7, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_is_stable_for_many_samples() -> None:
    exact = 1 - Fraction(comb(100_000 - 2, 1000), comb(100_000, 1000))
    assert pass_at_k(2, 100_000, 1000) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_more_than_there_are(k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be from 1 to the 4 samples, got {k}"):
        pass_at_k(1, 4, k)


def test_majority_by_hand() -> None:
    assert majority(["7", "8", "7", "8", None], [True, False, True, False, False]) == 0.5, "a tie counts half"
    assert majority(["8", "8", "7"], [False, False, True]) == 0.0
    assert majority(["7", None, None, None], [True, False, False, False]) == 1.0, "what states nothing has no vote"
    # runs of 2: (7 8) a tie, (8 8) wrong, (7 -) right; the seventh is left over
    answers, correct = ["7", "8", "8", "8", "7", None, "7"], [True, False, False, False, True, False, True]
    assert majority_at_k(answers, correct, 2) == 0.5


def test_the_interval_is_that_of_the_binomial_distribution() -> None:
    """Means of resampled zeros and ones are binomial: its exact percentiles are the bounds."""
    right, n = 13, 40
    below = itertools.accumulate(comb(n, i) * (right / n) ** i * (1 - right / n) ** (n - i) for i in range(n + 1))
    cumulative = list(below)
    low = next(i for i, total in enumerate(cumulative) if total >= 0.025) / n
    high = next(i for i, total in enumerate(cumulative) if total >= 0.975) / n
    assert interval(torch.tensor([1.0] * right + [0.0] * (n - right))) == pytest.approx((low, high), abs=1 / n)


def test_resampling_is_seeded_and_not_changed_by_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(7.0).double()
    one = resampled_means(values, num=50)
    assert torch.equal(one, resampled_means(values, num=50))
    assert not torch.equal(one, resampled_means(values, seed=1, num=50))
    monkeypatch.setattr("rlvr_lightning.estimates._DRAWN_AT_ONCE", 20)
    assert len(resampled_means(values, num=50)) == 50


@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 4), (2, 3), (0, 5), (6, 1)])
def test_mcnemar_is_the_share_of_all_outcomes_as_uneven(one: int, other: int) -> None:
    outcomes = list(itertools.product([0, 1], repeat=one + other))
    uneven = [abs(sum(each) - (one + other) / 2) >= abs(one - other) / 2 for each in outcomes]
    assert mcnemar_p(one, other) == pytest.approx(sum(uneven) / len(outcomes))


def test_one_in_twenty_equals_differ_at_five_per_cent() -> None:
    torch.manual_seed(3)
    draws = torch.randn(200, 25).double() ** 3  # not at all normal
    found = sum(paired_p(row) < 0.05 for row in draws)
    assert 2 <= found <= 20, found
    shifted = sum(paired_p(row + 3) < 0.05 for row in draws[:40])
    assert shifted > 15


def test_two_points_on_thirty_problems_could_be_chance() -> None:
    differences = torch.zeros(30)
    differences[:3], differences[3:5] = 0.5, -0.45  # of the sums, 1.5 - 0.9 = 2 % of 30
    assert float(differences.mean()) == pytest.approx(0.02)
    assert paired_p(differences) > 0.3


def test_rollout_metrics_by_hand() -> None:
    """Two groups of three: totals 1 0 2 and 1 1 1; answers 4 5 4 and 7 - -."""
    rollouts = random_rollouts(group=3)
    total = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 1.0])
    answers = ["4", "5", "4", "7", None, None]
    metric = RolloutMetrics()
    metric.update(
        rollouts, Scores(total=total, parts={"x": total * 3}, failed=1, answers=answers), has_signal(total, 3)
    )
    found = metric.compute()
    assert found == {
        "reward/mean": 1.0,
        "reward/std": pytest.approx(math.sqrt(2 / 5)),
        "reward/no_signal_frac": 0.5,
        "reward/failed": 1.0,
        "reward/x": 3.0,
        "response/length_mean": pytest.approx(float(rollouts.lengths.sum()) / 6),
        "response/truncated_frac": 0.0,
        "response/distinct_answers": 1.5,
    }
    silent = RolloutMetrics()
    docked = total - torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    silent.update(rollouts, Scores(total=total, parts={}, failed=0), has_signal(docked, 3))
    assert "response/distinct_answers" not in silent.compute()
    assert silent.compute()["reward/no_signal_frac"] == 0, "the penalty tells the second group's apart"
    alone, single = random_rollouts(group=1), RolloutMetrics()
    ones = torch.ones(len(alone.truncated))
    single.update(alone, Scores(total=ones, parts={}, failed=0), has_signal(ones, 1))
    assert "reward/no_signal_frac" not in single.compute()


def test_policy_metrics_are_means_over_tokens() -> None:
    """d = log policy - log reference is 0.5, -1 and 0 on the three tokens that count."""
    policy, mask = torch.zeros(2, 2), torch.tensor([[True, True], [True, False]])
    ref = torch.tensor([[-0.5, 1.0], [0.0, 9.0]])
    old = torch.tensor([[math.log(2), 0.0], [0.0, 0.0]])  # the first ratio is 1/2, clipped where the advantage is < 0
    out = policy_loss(
        policy,
        old,
        torch.tensor([-1.0, 1.0]),
        mask,
        Objective(kl_coef=0.1),
        Counts(tokens=3, completions=2, max_tokens=2),
        entropy=torch.tensor([[0.5, 1.0], [1.5, 7.0]]),
        ref_logprobs=ref,
    )
    metric = TokenMeans()
    metric.update({name: float(value) for name, value in out.metrics.items()} | {"tokens": 3.0})
    found = metric.compute()
    assert found["policy/kl_k1"] == pytest.approx((0.5 - 1.0) / 3)
    assert found["policy/kl_k2"] == pytest.approx((0.125 + 0.5) / 3)
    assert found["policy/kl"] == pytest.approx((math.exp(-0.5) - 0.5 + math.e - 2) / 3)
    assert found["policy/entropy"] == pytest.approx(1.0)
    assert found["policy/clip_frac"] == pytest.approx(1 / 3)
    assert found["policy/ratio_mean"] == pytest.approx((0.5 + 2) / 3)


def test_what_no_token_had_is_not_a_metric() -> None:
    metric = TokenMeans()
    metric.update({"tokens": 0.0})
    assert metric.compute() == {}


def test_problem_metrics_by_hand() -> None:
    tries = [
        Attempts(
            correct=[True, False, True], lengths=[1, 2, 3], truncated=[False, False, True], answers=["1", "2", "1"]
        ),
        Attempts(correct=[False, False, True], lengths=[4, 4, 4], truncated=[False] * 3, answers=["2", "2", "1"]),
    ]
    for metric, expected in [(PassAtK(1), 0.5), (PassAtK(2), (1 + 2 / 3) / 2), (MajorityAtK(3), 0.5)]:
        metric.update([0, 1], tries)
        assert metric.compute().mean == pytest.approx(expected)
        assert metric.compute().problems == 2
    lengths, cut = MeanLength(), TruncatedShare()
    for metric in (lengths, cut):
        metric.update([0, 1], tries)
    assert (lengths.compute().mean, cut.compute().mean) == (3.0, pytest.approx(1 / 6))
