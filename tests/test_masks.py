"""Masks of subnetworks against naive ones, and the command as a user types it, mistakes included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_causal_lm
from safetensors.torch import load_file, save_file
from test_grpo import fit, folder, module  # noqa: F401 (a fixture)

from rlvr_lightning.analysis import masks, subnetwork_check
from rlvr_lightning.analysis.first_step import FirstStep, Known, watch_first_step
from rlvr_lightning.analysis.opening import open_weights
from rlvr_lightning.analysis.subnetwork_command import main, pairs
from rlvr_lightning.experience import Handling
from rlvr_lightning.optim.subnetwork import load_subnetwork
from rlvr_lightning.policy import TINY
from rlvr_lightning.schema import Sampling
from rlvr_lightning.study.plan import Sweep
from rlvr_lightning.study.running import describe


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory) -> tuple[str, dict[str, torch.Tensor]]:  # noqa: F811
    """A model that differs from the other in about a fifth of its entries; half of those by less than bf16 tells."""
    path = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(folder, path)
    weights, where = load_file(path / "model.safetensors"), {}
    dice = torch.Generator().manual_seed(3)
    for name, tensor in weights.items():
        where[name] = torch.rand(tensor.shape, generator=dice) < 0.2
        factor = torch.where(torch.rand(tensor.shape, generator=dice) < 0.5, 1.5, 1 + 1e-6)
        weights[name] = torch.where(where[name], tensor * factor, tensor)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return str(path), weights


def trained(subnetwork) -> dict[str, int]:
    return {name: count for name, (count, _) in subnetwork.counts().items()}


@pytest.mark.parametrize("view", ["bf16", "stored"])
def test_a_mask_of_what_changed(folder, tuned, view):  # noqa: F811
    found = masks.changed(open_weights("BASE", folder), open_weights("TUNED", tuned[0]), view)
    before, after = load_file(Path(folder) / "model.safetensors"), tuned[1]
    assert set(found.shapes) == set(before)
    for name, old in before.items():
        new = after[name]
        expected = (old.bfloat16() != new.bfloat16()) if view == "bf16" else old != new
        assert torch.equal(found.mask(name), expected)
    assert 0 < sum(trained(found).values()) < sum(t.numel() for t in before.values()) / 4


def test_masks_like_another_have_as_many_entries_of_each_tensor(folder, tuned):  # noqa: F811
    base = open_weights("BASE", folder)
    like = masks.changed(base, open_weights("TUNED", tuned[0]))
    first, again, other = (masks.at_random(like, seed) for seed in (0, 0, 1))
    small, large = (masks.by_magnitude(base, like, None, largest) for largest in (False, True))
    for made in (first, other, small, large):
        assert trained(made) == trained(like)
    assert all(torch.equal(bits, again.bits[name]) for name, bits in first.bits.items())
    assert any(not torch.equal(bits, other.bits[name]) for name, bits in first.bits.items())
    for name, weight in load_file(Path(folder) / "model.safetensors").items():
        inside, size = small.mask(name), weight.abs()
        if 0 < int(inside.sum()) < weight.numel():
            assert float(size[inside].max()) <= float(size[~inside].min())
            inside = large.mask(name)
            assert float(size[inside].min()) >= float(size[~inside].max())


def test_a_density_is_a_share_of_each_tensor_and_at_least_one_entry():
    shapes = {"a": (7, 5), "b": (3,), "c": (0, 2)}
    assert masks.shares(None, 0.2, shapes) == {"a": 7, "b": 1, "c": 0}
    for density in (0.0, 1.5, None):
        with pytest.raises(ValueError, match=f"--density must be above 0 and at most 1, got {density}"):
            masks.shares(None, density, shapes)


def test_completions_that_do_not_count_have_no_fisher_information(folder, tmp_path):  # noqa: F811
    """All are cut after two tokens, and cut ones are masked, but for those that end before."""
    seen: list[FirstStep] = []
    model = module(folder, sampling=Sampling(max_tokens=2), handling=Handling(truncated="mask"), group_size=8)
    watch_first_step(model, seen.append)
    with pytest.raises(Known):
        fit(model, tmp_path, steps=1)
    of_batch = [bool(mask.any()) for part in seen[0].parts for mask in part.mask]
    found = list(masks.completions(seen[0]))
    assert 0 < len(found) == sum(of_batch) < len(of_batch)
    assert not any(bool(one.truncated.any()) for one in found)


def test_fisher_information_against_gradients_of_one_completion_at_a_time(folder, tmp_path):  # noqa: F811
    """By the model's own logits; the chosen entries of each tensor are those with most."""
    seen: list[FirstStep] = []
    model = module(folder)
    watch_first_step(model, seen.append)
    with pytest.raises(Known):
        fit(model, tmp_path, steps=1)
    found = masks.fisher(seen[0], None, 0.25)
    lm, squares = model.policy.causal_lm, {}
    for part in seen[0].parts:
        rollouts = part.rollouts
        for row, (ids, mask) in enumerate(zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)):
            prompt, own = rollouts.prompt_ids[row // rollouts.group], ids[mask]
            logits = lm(torch.tensor([prompt + own.tolist()])).logits[0, len(prompt) - 1 : -1] / 0.8  # the temperature
            logprob = logits.log_softmax(-1).gather(1, own[:, None]).sum()
            lm.zero_grad()
            logprob.backward()
            for name, p in lm.named_parameters():
                squares[name] = squares.get(name, 0.0) + p.grad.square()
    assert set(squares) == set(found.shapes)
    for name, score in squares.items():
        inside = found.mask(name)
        assert int(inside.sum()) == round(0.25 * score.numel())
        assert float(score[inside].min()) >= 0.99 * float(score[~inside].max())


def test_what_rounding_at_the_start_changed_is_no_change(folder, tmp_path):  # noqa: F811
    """An fp32 base, and a run in bf16 that has moved one entry."""
    base = open_weights("BASE", folder)
    shutil.copytree(folder, tmp_path / "run")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(Path(folder) / "model.safetensors").items()}
    weights["model.norm.weight"][3] += 1
    save_file(weights, tmp_path / "run" / "model.safetensors", {"format": "pt"})
    run = open_weights("RUN", str(tmp_path / "run"))
    mask = masks.changed(base, run, "stored")
    assert sum(trained(mask).values()) == 1 and bool(mask.mask("model.norm.weight")[3])
    record = subnetwork_check.compare(base, run, run, mask)
    assert (record["frozen_but_moved"], record["changed_outside"]) == (0, 0)


def test_weights_are_compared_entry_by_entry(folder, tuned, tmp_path):  # noqa: F811
    """The subnetwork's run stands where the full one does, but for one entry outside of the mask that moved."""
    base, full = open_weights("BASE", folder), open_weights("FULL", tuned[0])
    mask = masks.changed(base, full, "stored")
    shutil.copytree(tuned[0], tmp_path / "alone")
    weights = dict(tuned[1])
    name = "model.layers.0.mlp.up_proj.weight"
    outside = (~mask.mask(name)).nonzero()[0]
    weights[name] = weights[name].clone()
    weights[name][tuple(outside)] += 0.5
    save_file(weights, tmp_path / "alone" / "model.safetensors", {"format": "pt"})
    record = subnetwork_check.compare(base, full, open_weights("ALONE", str(tmp_path / "alone")), mask)
    entries = sum(tensor.numel() for tensor in weights.values())
    assert (record["entries"], record["trained"]) == (entries, sum(trained(mask).values()))
    assert record["close"] == record["identical"] == entries - 1
    assert (record["frozen_but_moved"], record["changed_outside"]) == (1, 0)
    assert record["max_difference"] == pytest.approx(0.5)


def test_the_command_makes_masks(folder, tuned, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert main(["changed", folder, tuned[0], "--out", "m"]) == 0
    out = capsys.readouterr().out
    assert "trained entries, by matrix" in out
    assert "--model.subnetwork m" in out
    for arguments in (["random", "--seed=3"], ["magnitude", folder], ["magnitude", folder, "--largest"]):
        assert main([*arguments, "--like=m", "--out=x"]) == 0
        assert trained(load_subnetwork(Path("x"))) == trained(load_subnetwork(Path("m")))
    assert main(["fisher", "--config=sgd.yaml", "--data.prompts_per_step=2", "--density=0.01", "--out=f"]) == 0
    assert load_subnetwork(Path("f")).made == f"diagonal Fisher information of 16 completions, {TINY}"
    assert main(["info", "f"]) == 0
    assert "diagonal Fisher information" in capsys.readouterr().out


def test_mistakes_are_one_line(folder, tuned, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert main(["changed", folder, tuned[0], "--out=m"]) == 0
    other = tiny_causal_lm("llama", vocab_size=23)
    other.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    for arguments, says in (
        (["changed", folder, folder, "--out=x"], "nothing differs"),
        (["changed", folder, "nowhere", "--out=x"], "TUNED: "),
        (["changed", folder, tuned[0], "--out=no/x"], "--out: there is no folder no for a file 'x'"),
        (["changed", folder, tuned[0], "--out=x", "--what=3"], "unknown arguments --what=3; see --help"),
        (["random", "--like=nowhere", "--out=x"], "there is no file nowhere"),
        (["random", f"--like={folder}/model.safetensors", "--out=x"], "holds no mask"),
        (["magnitude", str(tmp_path / "other"), "--like=m", "--out=x"], "it is of another model"),
        (["magnitude", folder, "--density=2", "--out=x"], "--density must be above 0 and at most 1, got 2.0"),
        (["info", "nowhere"], "there is no file nowhere"),
        (["check", "--config=nowhere.yaml", "--out=c"], "nowhere.yaml"),
        (
            ["check", "--config=tiny_sft.yaml", "--out=c", "--model.optimizer.weight_decay=0"],
            "model.from_scratch: the weights the run begins with are",
        ),
        (["check", "--config=sgd.yaml", "--out=c", "word"], "unknown arguments word; settings of `fit` are given as"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert says in error, error
        assert error.count("\n") == 1, error
        assert not Path("x").exists()


def test_settings_behind_the_command():
    assert pairs(["--a.b", "1", "--c=d=e"]) == {"a.b": "1", "c": "d=e"}


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4])
def test_a_mask_of_all_that_changed_in_fp32_gives_the_full_run(tmp_path, monkeypatch, steps):
    """To the bit after one step; after several there are entries that moved and came back, and those are frozen."""
    monkeypatch.chdir(tmp_path)
    small = [f"--trainer.max_steps={steps}", "--trainer.val_check_interval=1", "--data.prompts_per_step=4"]
    small += ["--data.val.arithmetic.num=8", "--model.max_grad_norm=0"]  # unclipped: clipping sees what is frozen
    assert main(["check", "--config=sgd.yaml", "--out=c", "--view=stored", *small]) == 0
    record = json.loads(Path("c/check.json").read_text())
    assert 0 < record["trained"] < record["entries"] == record["close"]
    assert (record["frozen_but_moved"], record["changed_outside"]) == (0, 0)
    assert record["max_difference"] < 1e-6
    if steps == 1:
        assert record["identical"] == record["entries"]
        assert record["metrics"]["full"] == record["metrics"]["subnetwork"]
        assert main(["check", "--config=sgd.yaml", "--out=c", "--view=bf16", *small]) == 0
        other = json.loads(Path("c/check.json").read_text())
        assert 0 < other["trained"] < record["trained"], "another mask"
        assert other["frozen_but_moved"] == 0, "and a run of that mask, not of the one before"


def test_a_check_that_cannot_be_is_refused_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["check", "--config=adamw.yaml", "--out=d", "--model.optimizer.init_args.weight_decay=0.01"]
    assert main(arguments) == 2
    assert "with weight_decay 0.01 would move what is frozen" in capsys.readouterr().err
    assert not list(Path("d").iterdir())


def test_a_check_does_not_go_on_with_runs_of_another_version_of_its_config(tmp_path):
    sweep = Sweep(name="s", configs={"full": ["sgd.yaml"]}, metrics=["update/lr"], out=str(tmp_path))
    (run,) = sweep.runs()
    record = describe(run, sweep) | {"status": "ok", "configs_sha256": {"sgd.yaml": "0"}}
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / f"{run.key}.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"holds a full run of another version of sgd.yaml; choose another folder"):
        subnetwork_check._train("full", "sgd.yaml", {}, tmp_path, 0)
