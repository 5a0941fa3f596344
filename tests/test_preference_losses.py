"""Losses on pairs and labelled completions, against loops over floats and numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import reference
import torch

from rlvr_lightning.preference_losses import dpo_loss, kto_kl, kto_loss, orpo_loss, simpo_loss

PAIRS = 5


def pairs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities under the policy and the reference, and lengths."""
    torch.manual_seed(seed)
    lengths = torch.randint(1, 8, (PAIRS, 2))
    logprobs, ref = -torch.rand(PAIRS, 2) * lengths, -torch.rand(PAIRS, 2) * lengths
    return logprobs.requires_grad_(), ref, lengths


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_equals_the_naive_one(smoothing: float) -> None:
    policy, ref, _ = pairs()
    out = dpo_loss(policy, ref, 0.3, 7, "sigmoid", smoothing)
    assert float(out.loss) == pytest.approx(reference.dpo(policy.tolist(), ref.tolist(), 0.3, smoothing) / 7, rel=1e-5)


def test_dpo_by_hand() -> None:
    """h = (-1 - -2) - (-3 - -3) = 1; beta h = ln 3: sigmoid 3/4, the loss ln(4/3), d loss / d chosen = -beta / 4."""
    policy = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    out = dpo_loss(policy, torch.tensor([[-2.0, -3.0]]), math.log(3), 1)
    out.loss.backward()
    assert float(out.loss) == pytest.approx(math.log(4 / 3))
    assert policy.grad.tolist()[0] == pytest.approx([-math.log(3) / 4, math.log(3) / 4])
    told = {name: float(value) for name, value in out.metrics.items()}
    assert told == pytest.approx(
        {"chosen": math.log(3), "rejected": 0, "margin": math.log(3), "accuracy": 1, "pairs": 1}
    )


def test_ipo() -> None:
    """h = 1 and 1 / (2 beta) = 2.5: the loss (1 - 2.5)^2 = 2.25, and no gradient where h is 1 / (2 beta)."""
    policy = torch.tensor([[-1.0, -3.0], [0.5, -2.0]], requires_grad=True)
    out = dpo_loss(policy, torch.tensor([[-2.0, -3.0], [0.0, 0.0]]), 0.2, 1, "ipo")
    assert float(out.loss) == pytest.approx(2.25)
    out.loss.backward()
    assert policy.grad.tolist() == [pytest.approx([-3.0, 3.0]), pytest.approx([0.0, 0.0])]
    policy, ref, _ = pairs()
    assert float(dpo_loss(policy, ref, 0.3, 7, "ipo").loss) == pytest.approx(
        reference.ipo(policy.tolist(), ref.tolist(), 0.3) / 7, rel=1e-5
    )


def test_simpo() -> None:
    """Means -1 and -3, beta 0.5, margin 1: -log sigmoid(1 - 1) = ln 2."""
    out = simpo_loss(torch.tensor([[-2.0, -9.0]]), torch.tensor([[2, 3]]), 0.5, 1.0, 1)
    assert float(out.loss) == pytest.approx(math.log(2))
    assert float(out.metrics["margin"]) == pytest.approx(1.0)
    policy, _, lengths = pairs()
    naive = reference.simpo(policy.tolist(), lengths.tolist(), 2.0, 0.7) / 7
    assert float(simpo_loss(policy, lengths, 2.0, 0.7, 7).loss) == pytest.approx(naive, rel=1e-5)


def test_orpo() -> None:
    """One token each of probability 3/4 and 1/4: odds 3 and 1/3, -log sigmoid(log 9) = log(10/9)."""
    sides = torch.tensor([[0.75, 0.25]]).log()
    out = orpo_loss(sides, torch.ones(1, 2), 0.5, 1, 1)
    assert float(out.loss) == pytest.approx(math.log(4 / 3) + 0.5 * math.log(10 / 9))
    policy, _, lengths = pairs()
    naive = reference.orpo(policy.tolist(), lengths.tolist(), 0.3, 7, 11)
    assert float(orpo_loss(policy, lengths, 0.3, 7, 11).loss) == pytest.approx(naive, rel=1e-5)


def test_orpo_of_a_certain_side_is_finite() -> None:
    sides = torch.tensor([[0.0, -5.0]], requires_grad=True)
    out = orpo_loss(sides, torch.tensor([[2, 3]]), 0.5, 1, 2)
    out.loss.backward()
    assert math.isfinite(float(out.loss)) and bool(sides.grad.isfinite().all())


def test_kto_by_hand() -> None:
    """Beta ln 3, kl 1. Good with r = 2: 2 (1 - 3/4) = 1/2. Bad with r = 0: 1 - 3/4 = 1/4. Of 3: 1/4."""
    policy = torch.tensor([2.0, 0.0], requires_grad=True)
    good = torch.tensor([True, False])
    out = kto_loss(policy, torch.zeros(2), good, 1.0, math.log(3), (2.0, 1.0), 3)
    assert float(out.loss) == pytest.approx(0.25)
    assert float(out.metrics["accurate"]) == 2
    out.loss.backward()
    slope = math.log(3) * 3 / 16 / 3  # beta p (1 - p) / completions
    assert policy.grad.tolist() == pytest.approx([-2 * slope, slope])


def test_kto_equals_the_naive_one() -> None:
    policy, ref, _ = pairs()
    good = torch.tensor([True, False, False, True, False])
    out = kto_loss(policy[:, 0], ref[:, 0], good, 0.4, 0.3, (1.0, 1.3), 7)
    naive = reference.kto(policy[:, 0].tolist(), ref[:, 0].tolist(), good.tolist(), 0.4, 0.3, (1.0, 1.3)) / 7
    assert float(out.loss) == pytest.approx(naive, rel=1e-5)


def test_kto_kl_is_never_negative() -> None:
    assert float(kto_kl(torch.tensor([-3.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0, -2.0]))) == 0
    assert float(kto_kl(torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-2.0, -1.0, -3.0]))) == 1


@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo", "orpo", "kto"])
def test_parts_add_up_to_the_whole_and_inputs_stay(kind: str) -> None:
    policy, ref, lengths = pairs()
    good = torch.tensor([True, False, False, True, False])
    losses = {
        "dpo": lambda s: dpo_loss(policy[s], ref[s], 0.3, PAIRS),
        "ipo": lambda s: dpo_loss(policy[s], ref[s], 0.3, PAIRS, "ipo"),
        "simpo": lambda s: simpo_loss(policy[s], lengths[s], 2.0, 0.5, PAIRS),
        "orpo": lambda s: orpo_loss(policy[s], lengths[s], 0.5, PAIRS, int(lengths[:, 0].sum())),
        "kto": lambda s: kto_loss(policy[s, 0], ref[s, 0], good[s], 0.1, 0.3, (1.0, 2.0), PAIRS),
    }
    before = policy.detach().clone()
    whole = losses[kind](slice(None))
    parts = [losses[kind](s) for s in (slice(0, 2), slice(2, 3), slice(3, 3), slice(3, 5))]
    assert float(sum(part.loss for part in parts)) == pytest.approx(float(whole.loss), rel=1e-5)
    for name, value in whole.metrics.items():
        assert sum(float(part.metrics[name]) for part in parts) == pytest.approx(float(value), rel=1e-5), name
    assert torch.equal(before, policy)
