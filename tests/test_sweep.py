"""Sweeps with a stand-in for `fit`; tables and figures from records with numbers worked out by hand."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlvr_lightning.study import plots, running, sweep
from rlvr_lightning.study.plan import Run, Sweep, read_sweep
from rlvr_lightning.study.rates import Line, Point, swept
from rlvr_lightning.study.records import Cell, best_cells, cells, curves, load_records, summaries
from rlvr_lightning.study.tables import fill_blocks, rows

LR = "model.init_args.optimizer.init_args.lr"
GOING = Path("results/s/runs/sgd-lr=23-seed=0")

# Writes what a run with this rate and seed would have logged: reward = rate + seed / 100 at its end.
STAND_IN = """
import sys, pathlib, time
rate, seed, folder = float(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
if rate == 13:
    sys.exit("the weights are NaN")
if rate == 17:
    sys.exit(130)
if rate == 19:
    time.sleep(1)
if rate == 29:
    rate = float("nan")
if rate == 23:
    (folder / "started").touch()
    time.sleep(600)
with open(folder / "metrics.csv", "w") as file:
    file.write("epoch,reward/mean,step,val/x/pass@1\\n0,,0,0.25\\n0,0.5,0,\\n")
    file.write(f"0,{rate + seed / 100},1,\\n0,,1,{rate / 2}\\n")
with open(folder / "calls.txt", "a") as file:
    file.write("x")
(folder / "checkpoints").mkdir(exist_ok=True)
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """`Run.command` starts the stand-in; the working directory is a fresh folder with a config."""
    script = tmp_path / "fit.py"
    script.write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("a: 1\n")

    def command(self, folder):
        return [sys.executable, str(script), str(self.point[LR]), str(self.seed), str(folder)]

    monkeypatch.setattr(Run, "command", command)


def a_sweep(**changes) -> Sweep:
    settings = {
        "name": "s",
        "configs": {"sgd": ["base.yaml"]},
        "grid": {"sgd": {LR: [0.1, 1.0]}},
        "seeds": [0, 2],
        "metrics": ["val/x/pass@1", "reward/mean"],
        "parallel": 2,
    }
    return Sweep(**settings | changes)


def write(path: str, value: dict) -> Path:
    Path(path).write_text(json.dumps(value))  # JSON is YAML
    return Path(path)


def as_file(**changes) -> Path:
    made = a_sweep(**changes)
    return write("sweep.yaml", {name: getattr(made, name) for name in made.__dataclass_fields__})


def test_the_command_of_a_run():
    run = Run("sgd", ("a.yaml", "b.yaml"), {LR: 1e-5}, {"trainer.max_steps": 3, "data.x": [1, 2]}, seed=7)
    assert run.key == "sgd-lr=1e-05-seed=7"
    assert run.command(Path("out"))[1:] == [
        "-m", "rlvr_lightning", "fit", "--config", "a.yaml", "--config", "b.yaml",
        "--trainer.max_steps=3", "--data.x=[1, 2]", f"--{LR}=1e-05", "--seed_everything=7",
        "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=out",
        "--trainer.logger.name=", "--trainer.logger.version=",
    ]  # fmt: skip


def test_a_label_s_settings_hold_for_its_runs_alone():
    sgd, adamw = a_sweep(
        configs={"sgd": ["a.yaml"], "adamw": ["a.yaml"]}, grid={}, seeds=[0], settings={"adamw": {"x": 1}}
    ).runs()
    assert "--x=1" in adamw.arguments() and "--x=1" not in sgd.arguments()
    assert adamw.key == "adamw-seed=0"
    with pytest.raises(ValueError, match=r"sweep.settings: \['adam'\] are no labels of sweep.configs \['sgd'\]"):
        a_sweep(settings={"adam": {"x": 1}})


def test_curves_count_batches_and_start_before_training(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,reward/mean,step,val/x\n0,,0,0.25\n0,0.5,0,\n0,nan,1,\n0,,1,0.75\n")
    found = curves(path, ["val/x", "reward/mean", "absent"])
    assert found["val/x"] == [(0, 0.25), (2, 0.75)]
    assert [step for step, _ in found["reward/mean"]] == [1, 2]
    assert summaries(found)["reward/mean"] == {"start": 0.5, "final": None, "best": 0.5, "curve": [[1, 0.5], [2, None]]}
    assert "absent" not in found


def test_a_sweep_writes_a_record_for_each_run_and_skips_finished_ones(stand_in, capsys):
    path = as_file()
    assert sweep.main(["--config", str(path)]) == 0
    records = load_records(Path("results/s"))
    assert sorted(records) == ["sgd-lr=0.1-seed=0", "sgd-lr=0.1-seed=2", "sgd-lr=1.0-seed=0", "sgd-lr=1.0-seed=2"]
    record = records["sgd-lr=1.0-seed=2"]
    assert record["metrics"]["reward/mean"]["final"] == 1.02
    assert record["metrics"]["val/x/pass@1"]["curve"] == [[0, 0.25], [2, 0.5]]
    assert record["command"].startswith("python -m rlvr_lightning fit --config base.yaml")
    assert record["environment"]["torch"]
    assert "1.02" in capsys.readouterr().out

    assert sweep.main(["--config", str(path)]) == 0
    assert "0 runs to do" in capsys.readouterr().out
    assert Path("results/s/runs/sgd-lr=1.0-seed=2/calls.txt").read_text() == "x"


def test_a_changed_command_runs_again_a_changed_config_warns(stand_in, capsys):
    sweep.main(["--config", str(as_file())])
    Path("base.yaml").write_text("a: 2\n")
    sweep.main(["--config", str(as_file(grid={"sgd": {LR: [0.1, 2.0]}}))])
    captured = capsys.readouterr()
    assert "2 runs to do" in captured.out
    assert "sgd-lr=0.1-seed=0: its configs have changed since" in captured.err
    sweep.main(["--config", str(as_file(overrides={"trainer.max_steps": 5}))])
    assert "4 runs to do" in capsys.readouterr().out


def test_metrics_added_later_are_read_from_the_logs(stand_in, capsys):
    assert sweep.main(["--config", str(as_file(metrics=["val/x/pass@1"]))]) == 0
    assert "reward/mean" not in load_records(Path("results/s"))["sgd-lr=1.0-seed=2"]["metrics"]
    assert sweep.main(["--config", str(as_file())]) == 0
    told = capsys.readouterr().out
    assert "0 runs to do" in told and "4 records: metrics that the sweep names now" in told
    assert load_records(Path("results/s"))["sgd-lr=1.0-seed=2"]["metrics"]["reward/mean"]["final"] == 1.02


def test_failures_are_records_and_run_again(stand_in, capsys):
    path = as_file(grid={"sgd": {LR: [0.1, 13]}}, seeds=[0])
    assert sweep.main(["--config", str(path)]) == 1
    record = load_records(Path("results/s"))["sgd-lr=13-seed=0"]
    assert (record["status"], record["exit_code"], record["last_lines"]) == ("failed", 1, ["the weights are NaN"])
    assert "FAILED" in capsys.readouterr().out
    sweep.main(["--config", str(path), "--dry_run"])
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("keep", [True, False])
def test_checkpoints_of_finished_runs_are_kept_or_not(stand_in, keep):
    sweep.main(["--config", str(as_file(seeds=[0], keep_checkpoints=keep))])
    assert Path("results/s/runs/sgd-lr=0.1-seed=0/checkpoints").exists() == keep


def test_an_interrupted_run_takes_no_other_s_record_with_it(stand_in, capsys):
    path = as_file(seeds=[0], grid={"sgd": {LR: [17, 19, 0.1]}})
    with pytest.raises(SystemExit, match="130"):
        sweep.main(["--config", str(path)])
    assert "sgd-lr=19-seed=0" in load_records(Path("results/s")), "it ended well after the other was interrupted"
    sweep.main(["--config", str(path), "--dry_run"])
    assert "sgd-lr=19" not in capsys.readouterr().out


@pytest.fixture
def going(stand_in, tmp_path):
    """A sweep in a process of its own, whose only run has begun and does not end; it starts the stand-in."""
    path = as_file(seeds=[0], grid={"sgd": {LR: [23]}})
    code = f"""import sys
from rlvr_lightning.study import sweep
from rlvr_lightning.study.plan import Run
Run.command = lambda self, folder: [sys.executable, "fit.py", "23", "0", str(folder)]
sys.exit(sweep.main(["--config", {str(path)!r}]))"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (GOING / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    yield process
    subprocess.run(["pkill", "-f", f"fit.py 23 0 {GOING}"], check=False)
    process.kill()
    process.communicate()


def test_sigterm_ends_the_runs_too(going):
    going.terminate()
    assert "interrupted: the same command goes on" in going.communicate(timeout=60)[1].decode()
    assert going.returncode == 130 and not load_records(Path("results/s"))
    with running.held(GOING):
        pass  # nobody has it any more


def test_a_run_that_outlives_its_sweep_is_not_begun_beside_it(going, capsys):
    going.kill()
    going.wait()
    assert sweep.main(["--config", "sweep.yaml"]) == 2
    assert f"error: {GOING} is in use by a run or sweep still going; wait" in capsys.readouterr().err
    assert not load_records(Path("results/s"))


def test_a_sweep_is_not_begun_beside_itself(going, capsys):
    """Not even on the runs that the other has not come to: it would redo what that one has done meanwhile."""
    path = as_file(seeds=[0], grid={"sgd": {LR: [0.1, 23]}})
    assert sweep.main(["--config", str(path)]) == 2
    assert "error: results/s is in use by a run or sweep still going" in capsys.readouterr().err
    assert not load_records(Path("results/s"))


@pytest.mark.parametrize("late", [False, True])
def test_no_run_begins_when_all_are_to_stop(late, monkeypatch):
    """Also not one whose process was started just before the others were told, of which it is not yet one."""
    processes = running.Processes()
    start = subprocess.Popen

    def popen(*args, **kwargs):
        process = start(*args, **kwargs)
        processes.stop()
        return process

    if late:
        monkeypatch.setattr(subprocess, "Popen", popen)
    else:
        processes.stop()
    process = processes.begin(["sleep", "60"])
    assert process.wait(timeout=30) == -signal.SIGTERM if late else process is None


def test_the_record_of_a_run_that_is_redone_and_interrupted_is_gone(stand_in):
    (run,) = a_sweep(seeds=[0], grid={"sgd": {LR: [17]}}).runs()
    old = Path("results/s/records") / f"{run.key}.json"
    old.parent.mkdir(parents=True)
    old.write_text("of files that are there no more")
    assert running.execute(run, a_sweep(), running.Processes()) is None
    assert not old.exists()


def test_a_run_that_is_redone_keeps_nothing_of_the_earlier_one(stand_in):
    path = as_file(seeds=[0])
    sweep.main(["--config", str(path)])
    run = Path("results/s/runs/sgd-lr=0.1-seed=0")
    old = [run / name for name in ("checkpoints/step=60.ckpt", "curvature.json", "problems_val.jsonl")]
    for file in old:
        file.write_text("of the run that took 60 steps")
    sweep.main(["--config", str(path)])
    assert all(file.exists() for file in old), "it was not redone"
    sweep.main(["--config", str(path), "--redo"])
    assert not any(file.exists() for file in old) and (run / "checkpoints").is_dir()


def test_a_run_that_ends_in_nan_is_told_and_the_others_go_on(stand_in, capsys):
    assert sweep.main(["--config", str(as_file(seeds=[0], grid={"sgd": {LR: [29, 1.0]}}))]) == 0
    told = capsys.readouterr().out
    assert "val/x/pass@1 0.250 -> not finite" in told and "[2/2]" in told and "take 1" in told


def test_records_of_other_runs_are_no_part_of_the_advice(stand_in, capsys):
    """A rate that was swept with other settings: it stays in the folder, and is of another line."""
    sweep.main(["--config", str(as_file(seeds=[0], grid={"sgd": {LR: [0.97, 1.0]}}, overrides={"trainer.x": 1}))])
    assert "stable from 0.97 to 1, the highest" in capsys.readouterr().out
    sweep.main(["--config", str(as_file(seeds=[0], grid={"sgd": {LR: [1.0]}}))])
    told = capsys.readouterr().out
    assert "left out: 1 records in results/s are of other runs" in told and "sgd: stable at 1" in told
    assert len(load_records(Path("results/s"))) == 2


def test_only_learning_rates_are_judged(stand_in, capsys):
    grid = {"sgd": {"model.kl": [0.0, 0.5], LR: [0.1]}}
    sweep.main(["--config", str(as_file(seeds=[0], grid=grid))])
    told = capsys.readouterr().out
    assert "sgd, kl 0: " in told and "sgd, kl 0.5: " in told and "take 0.5" not in told


def test_the_best_cell_is_a_whole_one_and_has_less_of_a_loss():
    def cell(lr, *values, metric):
        kept = [{"metrics": {metric: {"final": value}}, "status": "ok"} for value in values if value is not None]
        return Cell("a", {"lr": lr}, kept + [{"status": "failed"}] * values.count(None))

    assert best_cells([cell(1, 0.5, metric="sft/nll"), cell(2, 7.0, metric="sft/nll")], "sft/nll")[0].point["lr"] == 1
    found = [cell(1, 0.8, 0.8, metric="pass@1"), cell(2, 0.9, None, metric="pass@1")]
    assert best_cells(found, "pass@1")[0].point["lr"] == 1, "half of the other failed"


def test_a_dry_run_of_what_is_done_says_so(stand_in, capsys):
    sweep.main(["--config", str(as_file(seeds=[0], grid={"sgd": {LR: [0.1]}}))])
    capsys.readouterr()
    assert sweep.main(["--config", "sweep.yaml", "--dry_run"]) == 0
    assert capsys.readouterr().out == "nothing to do: all runs have their records in results/s\n"


def test_a_run_without_the_metric_is_a_failure(stand_in):
    assert sweep.main(["--config", str(as_file(metrics=["absent"], seeds=[0]))]) == 1
    record = load_records(Path("results/s"))["sgd-lr=0.1-seed=0"]
    assert record["last_lines"] == ["metrics.csv has no absent"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "sweep.seeds must not be empty"),
        ({"parallel": 0}, "sweep.parallel must be at least 1, got 0"),
        ({"grid": {"adam": {LR: [1]}}}, r"sweep.grid: \['adam'\] are no labels of sweep.configs \['sgd'\]"),
        ({"grid": {"sgd": {LR: 0.1}}}, "must be a list of values, got 0.1"),
        ({"configs": {"sgd": ["nowhere.yaml"]}}, "no file 'nowhere.yaml'"),
        ({"grid": {"sgd": {"a.lr": [1], "b.lr": [1, 1]}}}, "several runs would be named sgd-lr=1-lr=1-seed=0"),
        ({"colour": 1}, r"unknown \['colour'\]"),
    ],
)
def test_bad_sweep_files_are_one_line(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("a: 1\n")
    good = {"name": "s", "configs": {"sgd": ["base.yaml"]}, "grid": {"sgd": {LR: [0.1]}}, "metrics": ["m"]}
    with pytest.raises(ValueError, match=message):
        read_sweep(write("s.yaml", good | changes))


def test_a_sweep_file_that_is_no_yaml_is_one_line(tmp_path):
    (tmp_path / "s.yaml").write_text("configs: {sgd: [base.yaml}")
    with pytest.raises(ValueError, match=r"s.yaml: while parsing a flow sequence.*line 1, column 16") as told:
        read_sweep(tmp_path / "s.yaml")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("text", ["5", "- sgd", "sgd", ""])
def test_a_sweep_file_of_something_else_is_one_line(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"s\.yaml"):
        read_sweep(tmp_path / "s.yaml")


def test_rates_are_numbers_as_fit_reads_them(tmp_path, monkeypatch):
    """YAML 1.1 takes 1e-3, without a dot, for a word."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("a: 1\n")
    Path("s.yaml").write_text(
        f"name: s\nconfigs: {{sgd: [base.yaml]}}\nmetrics: [m]\ngrid: {{sgd: {{{LR}: [1e-3]}}}}\n"
    )
    (run,) = read_sweep(Path("s.yaml")).runs()
    assert run.point == {LR: 0.001} and run.key == "sgd-lr=0.001-seed=0"
    assert swept(Cell("sgd", dict(run.point), [])) == LR
    assert swept(Cell("sgd", {LR: "1e-3"}, [])) is None, "of a record that was made before"


# ---- tables and figures ------------------------------------------------------------------------------------------


def record(label, lr, seed, final, status="ok"):
    curve = [[0, 0.25], [10, final]]
    return {
        "label": label,
        "point": {LR: lr},
        "seed": seed,
        "status": status,
        "wall_s": 100.0 + seed,
        "metrics": {"val/x/pass@1": {"start": 0.25, "final": final, "best": final, "curve": curve}},
        "memory": {"peak_bytes": 3 << 29, "optimizer_state": {"global_bytes": 1234}},
    }


RECORDS = [
    record("sgd", 1.0, 0, 0.5),
    record("sgd", 0.1, 0, 0.75),
    record("sgd", 0.1, 2, 1.0),
    record("adamw", 1e-4, 0, 0.625),
    record("adamw", 1e-4, 1, None, status="failed"),
]


def save(folder: Path) -> None:
    (folder / "records").mkdir(parents=True)
    for number, item in enumerate(RECORDS):
        (folder / "records" / f"{number}.json").write_text(json.dumps(item))


def test_rows_by_hand():
    heading, *body = rows(RECORDS, ["val/x/pass@1"])
    assert heading[:4] == ["run", "seeds", "val/x/pass@1 start", "val/x/pass@1 end"]
    assert body == [
        ["adamw, lr 0.0001", "1 (1 failed)", "0.250", "0.625", "100", "1.50", "1,234"],
        ["sgd, lr 0.1", "2", "0.250", "0.875 (0.750 to 1.000)", "101 (100 to 102)", "1.50", "1,234"],
        ["sgd, lr 1", "1", "0.250", "0.500", "100", "1.50", "1,234"],
    ]
    assert [cell.name for cell in best_cells(cells(RECORDS), "val/x/pass@1")] == ["adamw, lr 0.0001", "sgd, lr 0.1"]


def test_runs_that_end_in_nan_are_counted_and_ranked_last():
    found = [record("sgd", 1.0, 0, 0.9), record("sgd", 1.0, 1, None), record("sgd", 0.1, 0, 0.5)]
    steady, diverged = rows(found, ["val/x/pass@1"])[1:]
    assert steady[1:4] == ["1", "0.250", "0.500"]
    assert diverged[1:4] == ["2", "0.250", "0.900 (1 not finite)"]
    assert [cell.name for cell in best_cells(cells(found), "val/x/pass@1")] == ["sgd, lr 0.1"]
    assert [cell.name for cell in best_cells(cells(found[1:2]), "val/x/pass@1")] == ["sgd, lr 1"]


def test_blocks_are_filled_checked_and_found_stale(tmp_path, capsys):
    save(tmp_path / "results" / "tiny")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table:tiny best val/x/pass@1 -->\nold\n<!-- end -->\nafter\n")
    assert plots.main([str(readme), "--check"]) == 1
    assert plots.main([str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- table:tiny best val/x/pass@1 -->\n| run | seeds |")
    assert "| sgd, lr 0.1 | 2 | 0.250 | 0.875 (0.750 to 1.000) |" in text
    assert "sgd, lr 1 " not in text
    assert text.endswith("|\n<!-- end -->\nafter\n")
    assert plots.main([str(readme), "--check"]) == 0
    readme.write_text(text.replace("0.875", "0.975"))
    assert plots.main([str(readme), "--check"]) == 1
    assert "does not show what the records say" in capsys.readouterr().err


def test_blocks_without_records_or_with_unknown_metrics_are_errors(tmp_path):
    save(tmp_path / "tiny")
    with pytest.raises(ValueError, match="table:other: no records"):
        fill_blocks("<!-- table:other -->\n<!-- end -->", tmp_path)
    with pytest.raises(ValueError, match=r"no record keeps \['val/y'\]"):
        fill_blocks("<!-- table:tiny val/y -->\n<!-- end -->", tmp_path)
    with pytest.raises(ValueError, match=r"table:tiny: no record of \['lion'\]"):
        fill_blocks("<!-- table:tiny only:sgd,lion -->\n<!-- end -->", tmp_path)


def test_a_block_may_show_some_labels_only(tmp_path):
    save(tmp_path / "tiny")
    text = fill_blocks("<!-- table:tiny only:adamw val/x/pass@1 -->\n<!-- end -->", tmp_path)
    assert "| adamw" in text and "| sgd" not in text


def test_figures_hold_the_records_numbers(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    drawn = plots.figures(RECORDS, ["val/x/pass@1"])
    curve_lines = drawn["curves"].axes[0].get_lines()
    labelled = {line.get_label(): line for line in curve_lines if not line.get_label().startswith("_")}
    assert list(labelled) == ["adamw, lr 0.0001", "sgd, lr 0.1 (2 seeds)"]
    assert list(labelled["sgd, lr 0.1 (2 seeds)"].get_ydata()) == [0.25, 0.875]
    assert len(curve_lines) == 2 + 2  # and the two seeds as thin lines
    rates = [line for line in drawn["rates"].axes[0].get_lines() if list(line.get_xdata()) == [0.1, 1.0]]
    assert list(rates[0].get_ydata()) == [0.875, 0.5]
    assert drawn["rates"].axes[0].get_xscale() == "log"
    save(tmp_path / "s")
    assert plots.main([str(tmp_path / "s")]) == 0
    names = {Path(line).name for line in capsys.readouterr().out.split()}
    assert names == {"curves.png", "curves.svg", "rates.png", "rates.svg", "table.md"}
    assert plots.main([str(tmp_path / "nothing")]) == 2


def test_one_legend_for_all_panels_covers_no_curve():
    pytest.importorskip("matplotlib")
    figure = plots.figures(RECORDS, ["val/x/pass@1", "val/x/pass@1"])["curves"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["adamw, lr 0.0001", "sgd, lr 0.1 (2 seeds)"]
    figure.draw_without_rendering()
    assert legend.get_window_extent().y1 <= min(axes.get_window_extent().y0 for axes in figure.axes)


def a_line(*values, start=0.4, lower=False, failed=()):
    points = [Point(10.0**i, [] if value is None else [value], i in failed) for i, value in enumerate(values)]
    return Line("sgd", points, start, lower)


def test_the_band_is_the_run_of_stable_rates_around_the_best():
    # gains over 0.4: 0.1, 0.46, 0.5, 0.47, 0.1; nine tenths of the best are 0.45
    line = a_line(0.5, 0.86, 0.9, 0.87, 0.5)
    assert [point.rate for point in line.band()] == [10, 100, 1000]
    assert line.suggestion() == 100
    assert line.advice() == "sgd: stable from 10 to 1000; take 100"
    assert a_line(0.9, 0.9, 0.5).suggestion() == 1, "of two the lower one"
    assert a_line(0.9, 0.5, 0.9, 0.9).suggestion() == 1, "an island does not count, the first of equals does"
    assert a_line(0.9, 0.91, None).suggestion() == 1


def test_a_rate_at_which_a_seed_fails_is_not_stable():
    assert [point.rate for point in a_line(0.84, 0.85, 0.9, failed=[2]).band()] == [1, 10]
    assert a_line(None, None, start=None, failed=[0, 1]).advice() == "sgd: no rate ran"


def test_less_is_better_where_the_metric_is_a_loss():
    assert a_line(0.39, 0.2, 0.21, 3.0, lower=True).suggestion() == 10
    assert a_line(0.5, 0.6, lower=True).advice() == "sgd: no rate gained on the start (0.4)"


def test_rates_of_one_config_are_swept_from_the_command_line(stand_in, capsys):
    command = ["--config", "base.yaml", "--lr", "0.1..1", "--per_decade", "1", "--seeds", "0,2"]
    assert sweep.main([*command, "--metric", "val/x/pass@1", "--trainer.max_steps", "7", "--data.x=3"]) == 0
    records = load_records(Path("runs/base_lr"))
    assert sorted(records) == [f"base-lr={rate}-seed={seed}" for rate in ("0.1", "1.0") for seed in (0, 2)]
    assert "--trainer.max_steps=7 --data.x=3" in records["base-lr=0.1-seed=2"]["command"]
    # the stand-in ends at rate / 2 and starts at 0.25
    assert "base: stable at 1, the highest rate swept: widen --lr; take 1" in capsys.readouterr().out
    assert Path("runs/base_lr/rates.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "3..1"], "--lr must be LOW..HIGH with 0 < LOW < HIGH, or rates with commas between, got '3..1'"),
        (["--lr", "0..1"], "--lr must be LOW..HIGH"),
        (["--lr", "0.1,0.1"], "sweep: several runs would be named base-lr=0.1-seed=0"),
        (["--lr", "0.1", "--seeds", "1,1"], "sweep: several runs would be named base-lr=0.1-seed=1"),
        (["--lr", "1..2", "--per_decade", "0"], "--per_decade must be at least 1, got 0"),
        (["--lr", "1..2", "--seeds", "a"], "--seeds must be whole numbers with commas between, got 'a'"),
        (["--lr", "1..2", "--trainer.max_steps"], "settings of fit come as --name value, got --trainer.max_steps"),
        (["--trainer.max_steps", "1"], "unknown --trainer.max_steps 1; settings of fit go into the sweep file"),
    ],
)
def test_a_bad_sweep_of_rates_is_one_line(stand_in, capsys, words, message):
    assert sweep.main(["--config", "base.yaml", *words]) == 2
    assert f"error: {message}" in capsys.readouterr().err
