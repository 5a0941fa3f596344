"""The README says what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlvr_lightning.configuration import packaged_configs
from rlvr_lightning.study.bench_tables import bench_table, fill_bench
from rlvr_lightning.study.plots import main as plots

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "results/README.md", "results/CLAIMS.md"])
def test_tables_show_what_the_records_say(page: str) -> None:
    assert plots([str(ROOT / page), "--check"]) == 0


@pytest.mark.parametrize("page", ["README.md", "results/README.md", "results/CLAIMS.md"])
def test_pictures_links_and_files_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for path in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
        assert (ROOT / page).parent.joinpath(path).is_file(), path
    for name in re.findall(r"\b([a-z0-9_.]+\.yaml)\b", README):
        assert name in packaged_configs() or name == "config.yaml", name


def test_the_file_map_is_true() -> None:
    block = README.split("## File map")[1].split("```")[1]
    names = re.findall(r"(?<![\w*])[\w/]+\.py|[\w/]+/", block)
    families = re.findall(r"\w+\*\.py", block)  # such as delta*.py
    for name in names:
        assert (
            (ROOT / name).exists() or (ROOT / "rlvr_lightning" / name).exists() or (ROOT / "tests" / name).exists()
        ), name
    for path in (ROOT / "rlvr_lightning").glob("*.py"):
        named = path.name in names or any(path.match(family) for family in families)
        assert named or path.name == "__init__.py", f"{path.name} is missing from the README's file map"


def test_bench_block_is_rendered_from_records(tmp_path: Path) -> None:
    speed = {"engine": 300.0, "generate": 100.0}
    record = {"model": "m", "median_tokens_per_s": speed, "ratio": 3.0, "command": "python -m x"}
    (tmp_path / "bench_rollout_m.json").write_text(json.dumps(record))
    assert bench_table(tmp_path).splitlines()[2] == (
        "| tokens/s, engine against `model.generate`, m | 300 | 100 | 3.00 | `python -m x` |"
    )
    filled = fill_bench("a\n<!-- bench -->\nold\n<!-- end -->\nb", tmp_path)
    assert "old" not in filled
    assert fill_bench(filled, tmp_path) == filled
    with pytest.raises(ValueError, match="the bench block: no records"):
        fill_bench(filled, tmp_path / "none")
