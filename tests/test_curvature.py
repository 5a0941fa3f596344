"""Curvature against exact Hessians: of a quadratic, of a small network, of a language model's losses."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import random_rollouts, tiny_causal_lm
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlvr_lightning.analysis.curvature import Hessian, top_eigenvalues
from rlvr_lightning.analysis.curvature_command import main
from rlvr_lightning.analysis.first_step import Known, watch_first_step
from rlvr_lightning.policy import Policy
from rlvr_lightning.schema import LossOutput


def of(loss, parameters, **settings) -> Hessian:
    return Hessian(parameters, lambda: loss().backward(), **settings)


def test_a_quadratic_has_the_eigenvalues_of_its_matrix():
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    matrix = turn @ torch.diag(torch.tensor([-9.0, 5.0, 3.0, 1.0, 0.5, 0.1, 0.0], dtype=torch.float64)) @ turn.T
    x = nn.Parameter(torch.randn(7, dtype=torch.float64))
    start = x.detach().clone()
    found = top_eigenvalues(of(lambda: x @ matrix @ x / 2, [x]), 3)
    assert [one.value for one in found] == pytest.approx([-9.0, 5.0, 3.0], rel=1e-6)  # by magnitude, with signs
    assert all(one.residual < 1e-5 for one in found)
    assert torch.equal(x, start)
    assert x.grad is None


def test_products_are_those_of_the_exact_hessian_of_a_small_network():
    """Two layers of odd sizes with a frozen one between them."""
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    net[2].requires_grad_(False)
    inputs, targets = torch.randn(11, 3).double(), torch.randn(11, 1).double()
    parameters = [p for p in net.parameters() if p.requires_grad]

    def loss():
        return (net(inputs) - targets).square().mean()

    def functional(*values):
        names = [name for name, p in net.named_parameters() if p.requires_grad]
        outputs = torch.func.functional_call(net, dict(zip(names, values, strict=True)), inputs)
        return (outputs - targets).square().mean()

    hessian = of(loss, parameters)
    vector = torch.randn(hessian.size).double()
    exact = torch.autograd.functional.hvp(functional, tuple(parameters), tuple(hessian._split(vector)))[1]
    assert torch.allclose(
        hessian.product(vector), torch.cat([part.reshape(-1) for part in exact]), rtol=1e-6, atol=1e-8
    )
    assert not hessian.product(torch.zeros_like(vector)).any()
    columns = torch.stack([hessian.product(unit) for unit in torch.eye(hessian.size).double()])
    exact_values = torch.linalg.eigvalsh((columns + columns.T) / 2)
    expected = exact_values[exact_values.abs().argsort(descending=True)][:4]
    assert [one.value for one in top_eigenvalues(of(loss, parameters), 4)] == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize("kind", ["likelihood", "policy gradient"])
def test_a_language_model_in_float32_against_the_second_derivative_of_its_logits(kind):
    """Our log-probs have one derivative; the model's own logits have two."""
    model = tiny_causal_lm("llama")
    policy, rollouts = Policy(model), random_rollouts()
    weight = torch.randn(len(rollouts.completion_ids), 1) if kind == "policy gradient" else torch.ones(1, 1)
    weight = -weight * rollouts.completion_mask / rollouts.completion_mask.sum()

    def exact_loss():
        total = 0.0
        for row, (ids, mask) in enumerate(zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)):
            prompt = rollouts.prompt_ids[row // rollouts.group]
            tokens = torch.tensor([prompt + ids[mask].tolist()])
            logprobs = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total = total + (logprobs.gather(1, ids[mask][:, None])[:, 0] * weight[row][mask]).sum()
        return total

    parameters = list(policy.parameters())
    hessian = of(lambda: (policy(rollouts).logprobs * weight).sum(), parameters)
    vector = torch.randn(hessian.size)
    found = hessian.product(vector)
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(exact_loss(), parameters, create_graph=True)
    along = sum((g * part).sum() for g, part in zip(gradients, hessian._split(vector), strict=True))
    exact = torch.cat([part.reshape(-1) for part in torch.autograd.grad(along, parameters)])
    assert float((found - exact).norm() / exact.norm()) < 0.01
    first = top_eigenvalues(hessian, 1)[0]
    assert first.residual < 0.01 * abs(first.value)


def test_a_step_that_is_too_large_shows_in_the_residual():
    x = nn.Parameter(torch.ones(5, dtype=torch.float64))
    small, large = (top_eigenvalues(of(lambda: x.pow(6).sum(), [x], step=step), 1)[0] for step in (1e-4, 0.3))
    assert small.residual < 1e-4
    assert abs(small.value - 30.0) < 1e-4
    assert large.residual > 0.2


def test_parts_of_a_step_add_up_and_the_step_is_not_made():
    x = nn.Parameter(torch.tensor([2.0, 3.0]))
    module, seen = nn.Module(), []
    watch_first_step(module, lambda step: seen.append(step.backward()))
    with pytest.raises(Known):
        module.take_step([1.0, 5.0], lambda part: LossOutput(loss=part * x.square().sum()))
    assert seen == [6 * 13.0]
    assert x.grad.tolist() == [24.0, 36.0]
    with pytest.raises(ValueError, match="nothing to learn from"):
        module.take_step([], lambda part: None)


def test_what_cannot_be_is_one_line():
    x = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="--top must be from 1 to 2"):
        top_eigenvalues(of(lambda: x.sum(), [x]), 3)
    with pytest.raises(ValueError, match=r"set model\.dtype: float32"):
        of(lambda: x.sum(), [nn.Parameter(torch.ones(3, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match="not finite"):
        top_eigenvalues(of(lambda: (x / 0).sum(), [x]), 1)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--config", "sgd.yaml", "--data.prompts_per_step=4", "--top=2", "--json=c.json"]) == 0
    assert "eigenvalue" in capsys.readouterr().out
    record = json.loads((tmp_path / "c.json").read_text())
    assert (record["algorithm"], record["parameters"]) == ("GRPO", 445760)
    first, second = record["eigenvalues"]
    assert abs(first["value"]) >= abs(second["value"]) > 0
    assert first["residual"] < 0.05 * abs(first["value"])
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
    for arguments, line in (
        (["nowhere.yaml"], "nowhere.yaml"),
        (["sgd.yaml", "--step=-1"], "--step must be positive, got -1.0"),
        (["sgd.yaml", "--json=no/c.json"], "--json: there is no folder no"),
    ):
        assert main(["--config", *arguments]) == 2
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1
