"""Reports of real runs: what they say, what they survive, and how the page looks and behaves in a browser."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_cli import rlvr

from rlvr_lightning.report.command import main, write
from rlvr_lightning.report.document import document, samples
from rlvr_lightning.report.finding import find_runs
from rlvr_lightning.report.memory import memory_table, predicted
from rlvr_lightning.report.page import charts
from rlvr_lightning.report.reading import FILES, Run, read_run
from rlvr_lightning.report.settings import differences

HOSTILE = (
    "<script>window.stolen=1</script></script></pre></td><img src=x onerror='window.stolen=1'>",
    "\u202ereversed\x1b[2J \U0001f600 \u4f60\u597d \ud800 ```\n</textarea><!-- --><svg onload='window.stolen=1'>",
    "long" * 25_000,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two real runs: under SGD 3 steps and, resumed, 2 more; under AdamW 3."""
    cwd = tmp_path_factory.mktemp("report")
    small = ["--data.val.arithmetic.num=24", "--trainer.val_check_interval=1", "--update_sparsity.every_n_steps=2"]
    small += ["--completions.every_n_steps=2", "--data.prompts_per_step=4"]
    for arguments in (
        ["sgd.yaml", "--trainer.max_steps=3"],
        ["sgd.yaml", "--trainer.max_steps=5", "--ckpt_path=last"],
        ["adamw.yaml", "--trainer.max_steps=3"],
    ):
        done = rlvr("fit", "--config", *arguments, *small, cwd=cwd)
        assert done.returncode == 0, done.stderr
    return cwd / "runs"


@pytest.fixture(scope="module")
def both(root: Path) -> Path:
    """Their page."""
    out = root / "both.html"
    write([root / "sgd", root / "adamw"], out)
    return out


def copy(run: Path, to: Path) -> Path:
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints", "events*"))
    return to


def write_csv(folder: Path, points: dict[int, float], config: str = "") -> Path:
    """A run whose reward has these values by the number of batches done."""
    folder.mkdir(parents=True)
    lines = [f"{value},{step - 1}" for step, value in points.items()]
    (folder / "metrics.csv").write_text("\n".join(["reward/mean,step", *lines]) + "\n")
    (folder / "config.yaml").write_text(config or "seed_everything: 0\n")
    return folder


# what is read


def test_a_resumed_run_shows_each_step_once(root: Path) -> None:
    (run,) = find_runs([root / "sgd"])
    assert run.name == "sgd/version_1"
    assert [step for step, _ in run.curves["reward/mean"]] == [1, 2, 3, 4, 5]
    assert [step for step, _ in run.curves["val/arithmetic/pass@1"]] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in run.sparsity] == [1, 3, 5]
    assert {line["step"] for line in run.completions} == {0, 4}
    assert run.origin["resumed from"] == str(root / "sgd" / "version_0")
    first = read_run("first", root / "sgd" / "version_0")
    assert run.curves["reward/mean"][:3] == first.curves["reward/mean"]
    assert run.memory["peak_bytes"] >= first.memory["peak_bytes"]


def test_what_came_after_the_checkpoint_is_not_shown(tmp_path: Path) -> None:
    """The first part went on to step 5, its last checkpoint was of step 3."""
    write_csv(tmp_path / "runs/x/version_0", {1: 0.1, 2: 0.2, 3: 0.3, 4: 9.0, 5: 9.0})
    path = "ckpt_path: runs/x/version_0/checkpoints/last.ckpt\n"  # relative to where the command was typed
    later = write_csv(tmp_path / "runs/x/version_1", {4: 0.4, 6: 0.6}, path)
    for folder, since, steps in (("version_0", 0, (1, 3, 5)), ("version_1", 3, (4, 6))):
        part = {"entries": 7, "changed": {"bf16": since}, "kinds": {}, "layers": {}}
        lines = [json.dumps({"step": step, "since_step": since, "last_step": part}) for step in steps]
        (tmp_path / "runs/x" / folder / "sparsity.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run("x", later)
    assert run.curves["reward/mean"] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (6, 0.6)]
    assert [line["step"] for line in run.sparsity] == [1, 3, 4, 6]
    assert any(
        "resumed after step 3; " in note for section in document([run]) for t in section.tables for note in t.notes
    )


def test_a_run_whose_beginning_is_gone_says_so(tmp_path: Path) -> None:
    later = write_csv(tmp_path / "version_1", {4: 0.4}, "ckpt_path: gone/version_0/checkpoints/last.ckpt\n")
    run = read_run("x", later)
    assert "what it was resumed from is not at gone/version_0: curves begin there" in run.missing


def test_damage_is_counted(root: Path, tmp_path: Path) -> None:
    """A kill cuts the last line of each file; a value is not finite."""
    folder = copy(root / "adamw" / "version_0", tmp_path / "cut")
    for name in ("metrics.csv", "sparsity.jsonl", "completions.jsonl", "memory.json"):
        text = (folder / name).read_text().rstrip()
        (folder / name).write_text(text[:-40])
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.reader(file))
    rows[2][rows[0].index("policy/kl")] = "nan"
    with (folder / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    run = read_run("cut", folder)
    assert {
        "metrics.csv: 1 damaged line left out",
        "sparsity.jsonl: 1 damaged line left out",
        "completions.jsonl: 1 damaged line left out",
        "memory.json is damaged",
        "policy/kl: 1 value not finite, a gap in the curve",
    } <= set(run.missing)
    assert len(run.curves["reward/mean"]) == 3  # the cut row was of the last validation
    assert write([folder], tmp_path / "cut.html").startswith("wrote")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_said(root: Path, tmp_path: Path, name: str) -> None:
    folder = copy(root / "adamw" / "version_0", tmp_path / "part")
    (folder / name).unlink()
    for out in ("part.html", "part.md"):
        write([folder], tmp_path / out)
        assert f"no {name}" in (tmp_path / out).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out", "a.html"], "there is no nowhere; give a run's folder, such as runs/sgd/version_0"),
        (["empty", "--out", "a.html"], "empty is no run's folder: it has none of metrics.csv, "),
        (["a", "a", "--out", "a.html"], "is named twice; give each run once"),
        (["a", "--out", "a.pdf"], "--out a.pdf must end in .html or .md"),
        (["a", "--out", "a/metrics.csv/b.html"], "report: a/metrics.csv"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_csv(tmp_path / "a", {1: 0.5})
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: report: ")
    assert said.count("\n") == 1


def test_without_plotly_markdown_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_csv(tmp_path / "a", {1: 0.5})
    monkeypatch.setitem(sys.modules, "plotly", None)
    for name in ("page", "figures"):
        monkeypatch.delitem(sys.modules, f"rlvr_lightning.report.{name}", raising=False)
    with pytest.raises(ValueError, match=r"a page needs plotly: pip install 'rlvr-lightning\[report\]'"):
        write([folder], tmp_path / "a.html")
    assert write([folder], tmp_path / "a.md").startswith("wrote")


def test_a_sweep_from_its_records_alone(tmp_path: Path) -> None:
    kept = Path(__file__).parent.parent / "results" / "tiny_seeds" / "records"
    (tmp_path / "sweep" / "records").mkdir(parents=True)
    for path in (*kept.glob("sgd-seed=*.json"), *kept.glob("adamw-seed=*.json")):
        shutil.copy(path, tmp_path / "sweep" / "records")
    runs = find_runs([tmp_path / "sweep"])
    assert [run.group for run in runs] == ["adamw"] * 5 + ["sgd"] * 5
    record = json.loads((kept / "sgd-seed=3.json").read_text())
    assert runs[8].curves["val/arithmetic/pass@1"][-1] == (100, record["metrics"]["val/arithmetic/pass@1"]["final"])
    assert runs[8].origin["run it again"] == record["command"]
    (figure,) = [chart.figure for chart in charts("Training", runs)][:1]
    assert {trace.name for trace in figure.data} == {"adamw (5 runs)", "sgd (5 runs)"}


# what is said


def test_predicted_bytes_are_the_measured_ones(root: Path) -> None:
    table = memory_table(find_runs([root / "sgd", root / "adamw"]))
    owners = [row for row in table.rows if row[1] != "peak"]
    assert len(owners) == 8
    assert all(predicted == measured and error == 0 for _, _, predicted, measured, error in owners), owners
    peaks = [row for row in table.rows if row[1] == "peak"]
    assert all(row[3] > row[2] > 0 and row[4] is None for row in peaks)  # a whole process is no sum of tensors
    assert any("which no prediction counts" in note for note in table.notes)


def test_on_a_gpu_the_peak_is_compared(root: Path) -> None:
    """The allocator's peak, as GPUMemory writes it, means what the predicted one does."""
    (run,) = find_runs([root / "adamw"])
    run.memory |= {"device": "a GPU", "method": "torch.cuda.max_memory_allocated, reset at each phase"}
    ledger = predicted(run).ledger
    assert ledger is not None
    run.memory["peak_bytes"] = ledger.peak_bytes * 4 // 5
    peak = next(row for row in memory_table([run]).rows if row[1] == "peak")
    assert peak[2] == ledger.peak_bytes
    assert peak[4] == pytest.approx(25, abs=1e-3)
    (line,) = [t for chart in charts("Memory", [run]) for t in chart.figure.data if "predicted" in t.name]
    assert list(line.x) == [1, 3]
    assert set(line.y) == {ledger.peak_bytes / 2**20}


def test_settings_that_differ(root: Path) -> None:
    table = differences(find_runs([root / "sgd" / "version_0", root / "adamw"]))
    found = {row[0]: row[1:] for row in table.rows}
    assert found["model.optimizer.class_path"] == ["torch.optim.SGD", "torch.optim.AdamW"]
    assert found["model.optimizer.lr"] == ["0.06", "0.0001"]
    assert found["model.optimizer.betas"] == [None, "[0.9, 0.999]"]
    assert all(name.startswith("model.optimizer.") for name in found), found


def test_heat_maps_by_hand() -> None:
    def counts(changed: int) -> dict[str, object]:
        return {"entries": 200, "changed": {"bf16": changed}}

    def step(number: int, low: int, high: int) -> dict[str, object]:
        layers = {"10": counts(high), "none": counts(0), "2": counts(low)}
        return {"step": number, "last_step": counts(low) | {"layers": layers, "kinds": {"mlp": counts(low)}}}

    run = Run("x", Path("x"), sparsity=[step(1, 2, 200), step(5, 0, 50)])
    heats = [t for chart in charts("Update sparsity", [run]) for t in chart.figure.data if t.type == "heatmap"]
    (layers,) = [trace for trace in heats if "layer 2" in trace.y]
    assert list(layers.y) == ["layer 2", "layer 10", "outside layers"]
    assert [list(row) for row in layers.z] == [[-2.0, None], [0.0, math.log10(0.25)], [None, None]]
    assert list(layers.text[0]) == ["2 of 200", "0 of 200"]


def test_of_many_measurements_a_heat_map_shows_some_without_gaps() -> None:
    """A gap of a pixel between cells of a pixel leaves nothing to see."""

    def part(changed: int) -> dict[str, object]:
        return {"entries": 7, "changed": {"bf16": changed}}

    lines = [{"step": k, "last_step": part(3) | {"layers": {}, "kinds": {"mlp": part(k % 5)}}} for k in range(1, 302)]
    chart = charts("Update sparsity", [Run("x", Path("x"), sparsity=lines)])[-1]
    (heat,) = chart.figure.data
    assert list(heat.x[:3]) == [1, 4, 7]
    assert len(heat.x) == 101
    assert heat.xgap == heat.ygap == 0
    assert chart.caption.endswith("one of 3 measurements shown.")


def why_line(step: int, absorbed: float | None, since: int = 0) -> dict[str, object]:
    part = {
        "update": {
            "entries": 7,
            "absorbed_frac": absorbed,
            "unknown_update": 3,
            "octaves": {"-3": 3, "-1": 1},
            "over_half_unit": {"0.5": 0.15},
        },
        "momentum_cosine": -0.5,
        "sqrt_v": {"std": 2e-4},
        "sqrt_v_own": None,
        "grad_norm": 0.25,
    }
    layers = {"10": {"grad_norm": 0.1}, "none": {"grad_norm": 0.0}, "2": {"grad_norm": 0.01}}
    about = {"step": step, "since_step": since, "optimizer": 0, "sample_bytes": 168, "skipped": 2}
    return about | {"all": part, "kinds": {"mlp up_proj": part}, "layers": layers}


def test_why_sparse_by_hand(tmp_path: Path) -> None:
    lines = [why_line(1, None), why_line(3, 0.75), why_line(2, 0.5)]
    broken = [json.dumps(why_line(9, 0.1) | {"kinds": {"mlp": 5}}), "{", json.dumps({"step": 4})]
    (tmp_path / "why_sparse.jsonl").write_text("\n".join([json.dumps(line) for line in lines] + broken) + "\n")
    (tmp_path / "metrics.csv").write_text("step,reward/mean\n0,1\n")
    run = read_run("x", tmp_path)
    assert [line["step"] for line in run.why] == [1, 2, 3]
    assert "why_sparse.jsonl: 3 damaged lines left out" in run.missing
    (section,) = [section for section in document([run]) if section.title == "Why sparse"]
    (table,) = section.tables
    assert table.rows[1] == ["x", 3, "mlp up_proj", 7, "75 %", "0.15", "-0.5", "0.0002", None, "0.25"]
    assert table.notes == [
        "x: 168 bytes kept beside the run for the sample",
        "x: 2 steps without a finite gradient left out",
        "x: 3 entries left out of updates: what the optimizer wanted is not known",
    ]
    curves, sizes, norms = (chart.figure for chart in charts("Why sparse", [run]))
    assert (list(curves.data[0].x), list(curves.data[0].y)) == ([2, 3], [0.5, 0.75])
    assert dict(zip(sizes.data[0].x, sizes.data[0].y, strict=True)) == {
        -3.5: 0,
        -2.5: 0.75,
        -1.5: 0,
        -0.5: 0.25,
        0.5: 0,
    }
    assert list(norms.data[0].y) == ["layer 2", "layer 10", "outside layers"]
    assert [list(row) for row in norms.data[0].z] == [[-2.0] * 3, [-1.0] * 3, [None] * 3]


def test_curvature_by_hand(tmp_path: Path) -> None:
    found = [{"value": 2.5, "residual": 0.01}, {"value": -1.0, "residual": 0.02}]
    (tmp_path / "curvature.json").write_text(json.dumps({"eigenvalues": found, "loss": 1.0}))
    (tmp_path / "metrics.csv").write_text("step,reward/mean\n0,1\n")
    run = read_run("x", tmp_path)
    (section,) = [section for section in document([run]) if section.title == "Why sparse"]
    assert [list(row) for row in section.tables[0].rows] == [["x", 1, "2.5", "0.01"], ["x", 2, "-1", "0.02"]]
    (chart,) = charts("Why sparse", [run])
    assert list(chart.figure.data[0].y) == [2.5, -1.0]
    assert list(chart.figure.data[0].error_y.array) == [0.01, 0.02]
    (tmp_path / "curvature.json").write_text('{"eigenvalues": [{"value": null}]}')
    assert "curvature.json is damaged" in read_run("x", tmp_path).missing


def test_a_run_without_the_callback_has_no_such_section(root: Path) -> None:
    assert "Why sparse" not in [section.title for section in document(find_runs([root / "sgd"]))]


def test_markdown_says_what_the_page_says(root: Path, tmp_path: Path) -> None:
    write([root / "sgd", root / "adamw"], tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text()
    for section in document(find_runs([root / "sgd", root / "adamw"])):
        assert f"## {section.title}\n" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
    state = [line for line in text.splitlines() if line.startswith("| adamw/version_0 | optimizer state |")]
    assert state == ["| adamw/version_0 | optimizer state | 3,566,220 | 3,566,220 | 0.00 |"]


# what a model wrote


@pytest.fixture(scope="module")
def hostile(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a name, a metric and completions that would take over a careless page."""
    name = "<!--<script><img src=x onerror=window.stolen=1>"
    folder = copy(root / "adamw" / "version_0", tmp_path_factory.mktemp("hostile") / name)
    with (folder / "completions.jsonl").open("w") as file:
        for text in HOSTILE:
            file.write(json.dumps({"step": 0, "prompt": text, "completion": text, "parts": {text: text}}) + "\n")
    metrics = folder / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("val/arithmetic/pass@1", "val/<b onclick=x>/pass@1", 1))
    return folder


def test_hostile_text_is_text(hostile: Path, tmp_path: Path) -> None:
    for suffix in ("html", "md"):
        write([hostile], tmp_path / f"r.{suffix}")
        text = (tmp_path / f"r.{suffix}").read_text()
        assert "\u202e" not in text and "\x1b" not in text
        assert r"\u202ereversed\x1b[2J" in text
        assert "98,000 characters left out" in text
        assert "\u4f60\u597d" in text
    assert "````text\n" in text  # a fence longer than the model's own
    assert [len(sample.completion) < 2100 for sample in samples(read_run("x", hostile))] == [True] * 3


class Elements(HTMLParser):
    """Elements of a page, with their attributes; and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script" and self.get_starttag_text():
            self.scripts.append(data)


def test_the_page_holds_all_it_needs_and_runs_nothing_else(hostile: Path, tmp_path: Path) -> None:
    write([hostile], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    found = Elements(text)
    for tag, attributes in found.found:
        assert tag not in ("img", "link", "iframe", "svg", "b", "textarea"), tag
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes), attributes
    policy = next(a["content"] for t, a in found.found if a.get("http-equiv") == "Content-Security-Policy")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert len(scripts) == 2
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{digests[0]}' 'sha256-{digests[1]}'; "
        "style-src 'unsafe-inline'; img-src data: blob:"
    )


# in a browser


def _browser_path() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return os.environ.get("CHROME") or next(filter(None, map(shutil.which, names)), "")


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    if not (path := _browser_path()):
        pytest.skip("no Chromium on the PATH, nor in the variable CHROME (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        flags = ["--disable-gpu", "--disable-background-networking", "--no-first-run"]
        chromium = started.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()


class Opened:
    """A page in the browser, with all it complained of and asked for."""

    def __init__(self, browser, path: Path, scheme: str = "light", width: int = 1200) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.until("[...document.querySelectorAll('.chart')].every(c => c.querySelector('.main-svg'))")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()

    def until(self, expression: str, timeout_s: float = 20) -> None:
        """Wait; the browser cannot do so by itself, for the page's policy forbids it to evaluate text."""
        end = time.monotonic() + timeout_s
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"never: {expression}"
            self.page.wait_for_timeout(50)

    def fetched(self) -> list[str]:
        return [url for url in self.asked if not url.startswith(("data:", "blob:"))]


PAINTED = """() => Promise.all([...document.querySelectorAll('.hm image')].map(async (drawn) => {
  const picture = new Image();
  picture.src = drawn.getAttribute('href') || drawn.getAttribute('xlink:href');
  await picture.decode();
  const canvas = Object.assign(document.createElement('canvas'), {width: picture.width, height: picture.height});
  const context = canvas.getContext('2d');
  context.drawImage(picture, 0, 0);
  const values = context.getImageData(0, 0, picture.width, picture.height).data;
  return values.filter((value, index) => index % 4 == 3 && value > 0).length / (picture.width * picture.height);
}))"""
"""Of each heat map the share of pixels that show something."""


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2) of what a browser says a colour is."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrasts(page) -> list[float]:
    """Of the text of charts, tables and captions against the page."""
    ground, inks = page.evaluate(
        """() => [getComputedStyle(document.body).backgroundColor,
        ['.xtick text', '.ytick text', '.legendtext', '.annotation-text', 'td', 'figcaption', 'h1'].map((name) => {
          const style = getComputedStyle(document.querySelector(name));
          return name.startsWith('td') || !document.querySelector(name).closest('svg') ? style.color : style.fill;
        })]"""
    )
    bright = [sorted((luminance(ground), luminance(ink))) for ink in inks]
    return [(high + 0.05) / (low + 0.05) for low, high in bright]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn_and_legible(browser, both: Path, scheme: str) -> None:
    with Opened(browser, both, scheme) as opened:
        drawn = opened.page.evaluate(
            "[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('.scatterlayer .trace, .hm').length)"
        )
        figures = json.loads(opened.page.locator("#figures").text_content())
        assert drawn == [len(figure["data"]) for figure in figures]
        # of two runs: 14 metrics, 4 owners, peaks, 4 definitions twice; heat maps of kinds and layers by definition
        assert drawn == [12, 12, 4, 8, 2, 16, 8, 8, 8, 8]
        assert min(opened.page.evaluate(PAINTED)) > 0.4  # most of each heat map, but for what changed nothing
        assert opened.said == []
        assert opened.fetched() == [both.as_uri()]
        assert min(contrasts(opened.page)) >= 4.5
        assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_print_is_dark_on_white_and_fits_the_paper(browser, both: Path) -> None:
    """Of a reader whose screen is dark."""
    with Opened(browser, both, "dark") as opened:
        opened.page.emulate_media(media="print", color_scheme="dark")
        opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert min(contrasts(opened.page)) >= 4.5
        widths = opened.page.evaluate("[...document.querySelectorAll('.main-svg')].map(c => c.clientWidth)")
        assert max(widths) <= 700  # A4 less its margins, 96 pixels an inch
        heights = opened.page.evaluate("[...document.querySelectorAll('figure')].map(c => c.clientHeight)")
        assert max(heights) <= 1000
        assert opened.page.pdf(format="A4")[:4] == b"%PDF"
        opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
        opened.until("document.querySelector('.main-svg').clientWidth > 1000")
        assert opened.said == []


def test_hover_zoom_and_legend(browser, both: Path) -> None:
    with Opened(browser, both) as opened:
        page = opened.page
        point = page.locator(".chart .scatterlayer .point").nth(1).bounding_box()
        page.mouse.move(point["x"] + 3, point["y"] + 3)
        page.wait_for_selector(".chart .hoverlayer .legend")
        assert "sgd/version_1" in page.locator(".chart .hoverlayer").first.text_content()
        left = page.evaluate("document.querySelector('.chart').layout.xaxis.range[0]")
        box = page.locator(".chart .nsewdrag").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 3, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 2 / 3, box["y"] + 61, steps=5)
        page.mouse.up()
        opened.until(f"document.querySelector('.chart').layout.xaxis.range[0] > {left} + 0.5")
        visible = "[...document.querySelector('.chart').data].filter(t => t.visible !== 'legendonly').map(t => t.name)"
        assert set(page.evaluate(visible)) == {"sgd/version_1", "adamw/version_0"}
        page.locator(".chart .legendtoggle").first.click()
        opened.until(f"new Set({visible}).size == 1")
        assert set(page.evaluate(visible)) == {"adamw/version_0"}  # gone from all of the figure's charts
        assert opened.said == []


def test_nothing_hostile_happens(browser, hostile: Path, tmp_path: Path) -> None:
    write([hostile], tmp_path / "r.html")
    with Opened(browser, tmp_path / "r.html", width=400) as opened:
        opened.page.locator(".chart .nsewdrag").first.hover()
        assert opened.page.evaluate("window.stolen") is None
        assert opened.said == []
        assert opened.fetched() == [(tmp_path / "r.html").as_uri()]
        assert opened.page.locator(".samples img, .samples script, h1 img").count() == 0
        assert HOSTILE[0] in opened.page.locator(".samples").text_content()
        assert opened.page.locator("h1").text_content() == hostile.name
        assert opened.page.locator(".legendtext").first.text_content() == hostile.name
        assert "val/<b onclick=x>/pass@1" in opened.page.locator(".annotation-text").all_text_contents()
        assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # on a telephone
