"""The page of claims: numbers and verdicts from records made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlvr_lightning.study.claim import PASS, TEST, Seen
from rlvr_lightning.study.claim_numbers import average, changed, final, first, measurements, records, shared
from rlvr_lightning.study.claims import CLAIMS, fill_claims


def write(folder: Path, label: str, values: list[float], metric: str = PASS, **point) -> None:
    """A record for each value, seeds from 0 on."""
    (folder / "records").mkdir(parents=True, exist_ok=True)
    for seed, value in enumerate(values):
        record = {"label": label, "point": point, "seed": seed, "status": "ok"}
        record["metrics"] = {metric: {"start": 0.0, "final": value, "curve": [[0, 0.0], [9, value]]}}
        name = "-".join([label, *map(str, point.values()), str(seed)])
        (folder / "records" / f"{name}.json").write_text(json.dumps(record))


def look(says: str, results: Path) -> Seen:
    [claim] = [claim for claim in CLAIMS if claim.says.startswith(says)]
    return claim.look(results)


@pytest.mark.parametrize(
    ("tiny", "smollm2", "verdict"),
    [([0.90, 0.88], 0.7, "confirmed"), ([0.80, 0.79], 0.7, "in part"), ([0.80, 0.79], 0.5, "not confirmed")],
)
def test_a_verdict_follows_from_the_records(tmp_path, tiny, smollm2, verdict):
    write(tmp_path / "tiny_seeds", "sgd", tiny)
    write(tmp_path / "tiny_seeds", "adamw", [0.89, 0.87])
    write(tmp_path / "smollm2_seeds", "sgd", [smollm2] * 3, TEST)
    write(tmp_path / "smollm2_seeds", "adamw_lower", [0.7] * 3, TEST)
    seen = look("SGD without momentum learns as well", tmp_path)
    assert seen.verdict == verdict
    assert f"tiny {sum(tiny) / 2 - 0.88:+.3f} (95 %:" in seen.text


def test_rates_are_compared_where_each_is_stable(tmp_path):
    for label, good in (("sgd", 0.1), ("adamw", 1e-4)):
        for power, value in enumerate((0.5, 0.9, 0.1)):
            write(tmp_path / "tiny_sweep", label, [value], **{"x.lr": good * 10.0 ** (power - 1)})
    seen = look("SGD wants rates", tmp_path)
    assert seen == ("stable rates: adamw: 0.0001 to 0.0001; sgd: 0.1 to 0.1; SGD's is 1,000 times AdamW's", "confirmed")


def test_values_are_chosen_by_label_point_and_seed(tmp_path):
    write(tmp_path, "sgd", [0.5, 0.6], **{"a.kl": 0.0})
    write(tmp_path, "sgd", [0.7], **{"a.kl": 0.1})
    assert final(tmp_path, "sgd", PASS, kl=0.0) == {0: 0.5, 1: 0.6}
    assert final(tmp_path, "sgd", PASS, kl=0.1) == {0: 0.7}
    with pytest.raises(ValueError, match="has no good run of adamw"):
        final(tmp_path, "adamw", PASS)
    with pytest.raises(ValueError, match=r"no records in .*none; run its sweep first"):
        final(tmp_path / "none", "sgd", PASS)


def test_pairs_differ_in_the_seed_or_in_the_label(tmp_path):
    def run(label, seed):
        return {"label": label, "point": {}, "seed": seed}

    pairs = {"1": (run("a", 0), run("a", 1)), "2": (run("a", 0), run("b", 0)), "3": (run("a", 1), run("b", 1))}
    (tmp_path / "overlaps.json").write_text(json.dumps({key: {"runs": runs} for key, runs in pairs.items()}))
    assert len(shared(tmp_path, "a", "a", lambda one: one)) == 1
    assert len(shared(tmp_path, "b", "a", lambda one: one)) == 2
    with pytest.raises(ValueError, match="no pair of a and c"):
        shared(tmp_path, "a", "c", lambda one: one)
    with pytest.raises(ValueError, match="python -m rlvr_lightning dissect makes it"):
        changed(tmp_path, "a", lambda one: one)


def test_what_was_not_run_is_said(tmp_path):
    assert fill_claims("no block here", tmp_path) == "no block here"
    page = fill_claims("<!-- claims -->\n<!-- end -->", tmp_path)
    assert page.count("**not run**") == len(CLAIMS)
    assert "no records in tiny_sweep; run its sweep first" in page


def test_the_subnetwork_has_to_reach_every_entry(tmp_path):
    (tmp_path / "subnetwork").mkdir()
    for label, close in (("sgd", 10), ("adamw", 9)):
        for seed in (0, 1):
            metrics = {"full": {PASS: 0.9 + seed / 10}, "subnetwork": {PASS: 0.91 + seed / 10}}
            record = {"entries": 10, "close": close, "seed": seed, "metrics": metrics}
            (tmp_path / "subnetwork" / f"{label}-{seed}.json").write_text(json.dumps(record))
    seen = look("training the subnetwork alone", tmp_path)
    assert seen.verdict == "in part", "AdamW's does not"
    assert "sgd: 100 % within 1e-4, pass@1 +0.010" in seen.text and "adamw: 90 % within 1e-4" in seen.text


def test_few_weights_against_all_of_them(tmp_path):
    """Starts are 0; the gain of all weights is 0.8. Each way is taken at its best rate."""
    write(tmp_path / "tiny_algorithms", "grpo", [0.78, 0.82])
    for label, by_rate in {
        "lora_sgd": {0.1: [0.79, 0.83], 0.3: [0.0, 0.1]},
        "lora_adamw": {0.1: [0.5, 0.54]},
        "fisher_sgd": {0.1: [0.7, 0.82]},
        "random_sgd": {0.1: [0.2, 0.2], 1.0: [0.4, 0.4]},
    }.items():
        for rate, values in by_rate.items():
            write(tmp_path / "tiny_lora", label, values, **{"x.lr": rate})
    assert look("SGD scores better than LoRA", tmp_path).verdict == "not confirmed"
    seen = look("LoRA of rank 1 learns as well", tmp_path)
    assert seen == ("LoRA under SGD minus SGD on all weights, pass@1: +0.010 (95 %: +0.010 to +0.010)", "confirmed")
    seen = look("the entries with most Fisher", tmp_path)
    assert seen == ("of the gain of all weights, 1.4 % of them keep: Fisher 95 %, at random 50 %", "confirmed")


def test_a_measurement_counts_once_however_often_it_is_repeated(tmp_path):
    write(tmp_path, "a", [0.5, 0.0])
    (path,) = (tmp_path / "records").glob("a-0.json")
    record = json.loads(path.read_text())
    record["metrics"][PASS]["curve"] = [[1, 0.1], [2, 0.1], [3, 0.3], [4, 0.3], [5, 0.1]]
    path.write_text(json.dumps(record))
    assert measurements(tmp_path, "a", PASS) == 1, "of the run that has fewest: two zeros are one"
    assert first(tmp_path, "a", PASS) == {0: 0.1, 1: 0.0}
    (tmp_path / "records" / "a-1.json").unlink()
    records.cache_clear()
    assert measurements(tmp_path, "a", PASS) == 3


def test_averages_are_over_the_curve(tmp_path):
    write(tmp_path, "a", [0.5])
    assert average(tmp_path, "a", PASS) == {0: 0.25}  # 0, then a half
    with pytest.raises(ValueError, match="has no good run of b"):
        average(tmp_path, "b", PASS)
