"""`dissect` on sweeps of real runs of a small random model: against the commands of which it is made, and by hand."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_export import run as train
from test_grpo import folder  # noqa: F401 (a fixture)

from rlvr_lightning.__main__ import main
from rlvr_lightning.optim import SGD
from rlvr_lightning.study.change_tables import change_rows, fill_changes, overlap_rows

LABELS = {"slow": 0.05, "fast": 0.5}


@pytest.fixture
def sweep(folder, tmp_path: Path) -> Path:  # noqa: F811
    """Two rates by two seeds, and a run that failed."""
    (tmp_path / "records").mkdir()
    for label, lr in LABELS.items():
        for seed in (0, 1):
            key = f"{label}-seed={seed}"
            train(folder, tmp_path / "runs" / key, seed=seed, optimizer=partial(SGD, lr=lr))
            write(tmp_path, key, label=label, seed=seed)
    write(tmp_path, "fast-seed=2", label="fast", seed=2, status="failed")
    return tmp_path


def write(sweep: Path, key: str, **content) -> None:
    record = {"label": "", "point": {}, "seed": 0, "started": "noon", "status": "ok"} | content
    (sweep / "records" / f"{key}.json").write_text(json.dumps(record))


def test_it_says_what_the_single_commands_say(sweep, folder, tmp_path, capsys):  # noqa: F811
    assert main(["dissect", str(sweep), "--base", folder]) == 0
    out, err = capsys.readouterr()
    assert "4 runs, 4 pairs; 8 records made" in out and "1 of 5 runs failed or kept no checkpoint" in err
    for command, arguments, made, parts in (
        ("sparsity", [folder, "runs/fast-seed=1"], "fast-seed=1", ["parts", "kinds"]),
        ("overlap", ["runs/fast-seed=1", "runs/slow-seed=1"], "fast-seed=1+slow-seed=1", ["parts"]),
        ("spectrum", [folder, "runs/fast-seed=1"], "fast-seed=1", []),
    ):
        words = [word if word == folder else str(sweep / word) for word in arguments]
        base = ["--base", folder] if command == "overlap" else []
        assert main([command, *words, *base, "--json", str(tmp_path / "one.json")]) == 0
        files = (tmp_path / "one.json", sweep / ("overlaps.json" if "+" in made else "changes.json"))
        alone, kept = (json.loads(path.read_text()) for path in files)
        kept = kept[made]
        assert all(alone[part] == kept[part] for part in parts)
        if command == "spectrum":
            assert kept["spectrum"] == alone["groups"]["all"]["all"]
    assert kept["runs"] == [{"label": "fast", "point": {}, "seed": 1}]
    assert 0 < kept["matrix_rank_frac"][0] <= kept["matrix_rank_frac"][1] <= 1


def test_only_runs_that_ran_again_are_looked_at_again(sweep, folder, capsys):  # noqa: F811
    main(["dissect", str(sweep), "--base", folder])
    capsys.readouterr()
    assert main(["dissect", str(sweep), "--base", folder]) == 0
    assert "; 0 records made" in capsys.readouterr().out
    write(sweep, "slow-seed=0", label="slow", started="later")
    main(["dissect", str(sweep), "--base", folder])
    assert "; 3 records made" in capsys.readouterr().out, "itself, and two pairs"
    write(sweep, "fast-seed=1", label="fast", seed=1, started="later")
    main(["dissect", str(sweep), "--base", folder, "--only_changes"])
    assert "4 runs, 0 pairs; 1 records made" in capsys.readouterr().out


def test_records_of_another_base_and_of_runs_that_are_gone_are_dropped(sweep, folder, tmp_path, capsys):  # noqa: F811
    def names(what: str) -> list[str]:
        return list(json.loads((sweep / f"{what}.json").read_text()))

    wrong = tmp_path / "wrong"
    tiny = load_file(Path(folder) / "model.safetensors")
    shutil.copytree(folder, wrong)
    save_file({name: tensor + 1 for name, tensor in tiny.items()}, wrong / "model.safetensors", {"format": "pt"})
    assert main(["dissect", str(sweep), "--base", str(wrong)]) == 0
    write(sweep, "slow-seed=1", label="slow", seed=1, status="failed")
    capsys.readouterr()
    assert main(["dissect", str(sweep), "--base", folder, "--only_changes"]) == 0
    out, err = capsys.readouterr()
    assert "3 runs, 0 pairs; 3 records made" in out
    assert "changes.json: 4 records are of other runs or of another base, and dropped" in err
    assert (names("changes"), names("overlaps")) == (["fast-seed=0", "fast-seed=1", "slow-seed=0"], [])
    assert main(["dissect", str(sweep), "--base", folder]) == 0
    assert names("overlaps") == ["fast-seed=0+fast-seed=1", "fast-seed=0+slow-seed=0"]
    assert json.loads((sweep / "overlaps.json").read_text())["fast-seed=0+slow-seed=0"]["base"]["label"] == folder
    shutil.rmtree(sweep / "runs" / "slow-seed=0" / "checkpoints")
    assert main(["dissect", str(sweep), "--base", folder]) == 0
    assert len(names("overlaps")) == 2, "of a run that is as it was, without its checkpoint"
    (sweep / "records" / "fast-seed=1.json").unlink()
    assert main(["dissect", str(sweep), "--base", folder]) == 0
    assert (names("changes"), names("overlaps")) == (["fast-seed=0", "slow-seed=0"], ["fast-seed=0+slow-seed=0"])


def test_tables_are_means_over_seeds_and_pairs(tmp_path):
    found: dict[str, dict] = {"changes": {}, "overlaps": {}}
    for seed, frac in ((0, 0.25), (1, 0.75)):
        counts = {"changed_frac": dict.fromkeys(("bf16", "tol1e-5", "fp32"), frac)}
        found["changes"][str(seed)] = {"runs": [{"label": "a", "point": {}, "seed": seed}], "parts": {"all": counts}}
        runs = [{"label": label, "point": {"x.lr": 0.5}, "seed": seed} for label in "ab"]
        row = dict.fromkeys(("density_a", "density_b", "a_in_b", "a_in_b_equal", "jaccard", "jaccard_equal"), frac)
        row |= {f"{name}_by_chance": [0, 0.5, 1] for name in ("a_in_b", "jaccard")}
        found["overlaps"][str(seed)] = {"runs": runs, "parts": {"all": row}}
    (tmp_path / "s").mkdir()
    for kind, records in found.items():
        (tmp_path / "s" / f"{kind}.json").write_text(json.dumps(records))
    assert change_rows(tmp_path / "s")[1][:6] == ["a", "2", *["50.0 (25.0 to 75.0)"] * 3, "-"]
    expected = ["a, lr 0.5", "b, lr 0.5", "same", "2", "50.0", "50.0", "50.0", "50.0"]
    assert overlap_rows(tmp_path / "s")[1][:8] == expected
    text = fill_changes("<!-- changes:s -->\nold\n<!-- end -->", tmp_path)
    assert "| a | 2 | 50.0 (25.0 to 75.0) |" in text and "old" not in text
    with pytest.raises(ValueError, match="overlaps:t: no records; python -m rlvr_lightning dissect makes them"):
        fill_changes("<!-- overlaps:t -->\n<!-- end -->", tmp_path)


def test_a_sweep_without_checkpoints(tmp_path, folder, capsys):  # noqa: F811
    (tmp_path / "records").mkdir()
    write(tmp_path, "a")
    assert main(["dissect", str(tmp_path), "--base", folder]) == 2
    message = f"error: dissect: {tmp_path} has no run with a checkpoint; sweep with keep_checkpoints: true\n"
    assert capsys.readouterr().err == message
