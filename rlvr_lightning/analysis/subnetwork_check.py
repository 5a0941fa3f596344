"""Whether a run of the subnetwork alone does what the full run did: both are trained, and compared entry by entry."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from rlvr_lightning.analysis.command import percent, print_table
from rlvr_lightning.analysis.first_step import Known, begin
from rlvr_lightning.analysis.masks import View, changed, from_start, matched
from rlvr_lightning.analysis.opening import open_weights
from rlvr_lightning.analysis.weights import Weights
from rlvr_lightning.callbacks.run_files import write_json
from rlvr_lightning.configuration import find_config
from rlvr_lightning.delta.digest import digest_state
from rlvr_lightning.delta.tensor import bits
from rlvr_lightning.optim.subnetwork import Subnetwork
from rlvr_lightning.study.plan import Sweep
from rlvr_lightning.study.records import curves, load_records
from rlvr_lightning.study.running import pending, run_all

CLOSE = 1e-4
"""Entries closer than this are the same to the papers (arXiv 2505.11711)."""


def check(config: str, settings: Mapping[str, str], out: Path, view: View, seed: int) -> dict[str, Any]:
    """Train in full, make the mask of what changed, train that alone on the same data and seeds, compare.

    Args:
        config: of `fit`.
        settings: on top of it.
        out: for runs, records, the mask and the comparison; what is there already is not trained again.
        view: what counts as changed.
        seed: of both runs.

    Raises:
        ValueError: the optimizer would move what is frozen, a run failed, or one that is there was trained with other
            contents of the config.
    """
    some_file = find_config(config)  # any will do: it is settings that are looked at
    given = [f"--{name}={value}" for name, value in settings.items()]
    begin(["--config", config, *given, f"--model.subnetwork={some_file}"], _look_at_settings)
    full = _train("full", config, settings, out, seed)
    base_name = yaml.safe_load((full / "config.yaml").read_text())["model"]["init_args"]["model"]
    base, tuned = open_weights("BASE", base_name), open_weights("FULL", str(full))
    subnetwork = changed(base, tuned, view)
    # the name is in the command of the run, which is trained anew where its command is another
    path = out / f"mask-{digest_state(subnetwork.bits)[:16]}.safetensors"
    subnetwork.save(path)
    alone = _train("subnetwork", config, {**settings, "model.init_args.subnetwork": str(path)}, out, seed)
    record = compare(base, tuned, open_weights("SUBNETWORK", str(alone)), subnetwork)
    record |= {"config": config, "settings": dict(settings), "seed": seed, "view": view}
    record["metrics"] = {"full": last_values(full), "subnetwork": last_values(alone)}
    record["environment"] = next(iter(load_records(out).values()))["environment"]
    write_json(out / "check.json", record)
    return record


def _look_at_settings(module: Any) -> None:
    """What `fit` refuses it has refused by now; nothing is loaded yet."""
    if getattr(module, "from_scratch", False):
        raise ValueError("model.from_scratch: the weights the run begins with are kept nowhere; begin with a model")
    raise Known


def _train(label: str, config: str, settings: Mapping[str, str], out: Path, seed: int) -> Path:
    sweep = Sweep(
        name="subnetwork",
        configs={label: [config]},
        metrics=["update/lr"],
        overrides=dict(settings),
        seeds=[seed],
        out=str(out),
    )
    (run,) = sweep.runs()
    todo, changed_since = pending(sweep)
    if changed_since:
        raise ValueError(f"--out: {out} holds a {label} run of another version of {config}; choose another folder")
    if run_all(sweep, todo):
        last = load_records(out)[run.key]["last_lines"][-1]
        raise ValueError(f"the {label} run failed, see {out / 'runs' / run.key / 'log.txt'}: {last}")
    return out / "runs" / run.key


def compare(base: Weights, full: Weights, alone: Weights, subnetwork: Subnetwork) -> dict[str, Any]:
    """Counts over all entries of the full run's weights and the subnetwork's; NaN is far from everything."""
    found = matched(base, full, alone)
    names = ("entries", "trained", "close", "identical", "frozen_but_moved", "changed_outside")
    counts, largest = dict.fromkeys(names, 0), 0.0
    for name in found.tensors:
        mask, at = subnetwork.mask(name).view(-1), 0
        for old, new, other in from_start(found, name):
            inside = mask[at : at + len(old)]
            distance = (new.double() - other.double()).abs()
            seen = {
                "entries": torch.tensor(len(old)),
                "trained": inside.sum(),
                "close": (distance <= CLOSE).sum(),
                "identical": (bits(new) == bits(other)).sum(),
                "frozen_but_moved": ((bits(other) != bits(old)) & ~inside).sum(),
                "changed_outside": ((bits(new) != bits(old)) & ~inside).sum(),
            }
            counts = {key: counts[key] + int(seen[key]) for key in names}
            largest = max(largest, float(distance.nan_to_num(nan=float("inf")).max()))
            at += len(old)
    return {
        "models": [base.label, full.label, alone.label],
        "made": subnetwork.made,
        **counts,
        "max_difference": largest,
    }


def last_values(run: Path) -> dict[str, float]:
    """Where the curves of reward, likelihood and validation end."""
    with (run / "metrics.csv").open(newline="") as file:
        names = [n for n in next(csv.reader(file)) if n in ("reward/mean", "sft/nll") or n.startswith("val/")]
    return {name: curve[-1][1] for name, curve in curves(run / "metrics.csv", names).items()}


def show(record: dict[str, Any]) -> None:
    """For people."""
    entries = record["entries"]
    print(f"mask: {record['trained']:,} of {entries:,} entries, {percent(record['trained'] / entries)} %")
    rows = [
        [text, f"{record[key]:,}", percent(record[key] / entries)]
        for key, text in (
            ("close", f"within {CLOSE:g} of the full run"),
            ("identical", "identical to the full run, bit for bit"),
            ("changed_outside", "outside of the mask, but changed by the full run"),
            ("frozen_but_moved", "outside of the mask, and moved nevertheless"),
        )
    ]
    print_table("the subnetwork alone", ["entries", "", "%"], rows)
    print(f"largest difference: {record['max_difference']:.3g}")
    full, alone = record["metrics"]["full"], record["metrics"]["subnetwork"]
    rows = [[name, f"{full[name]:.4g}", f"{alone[name]:.4g}"] for name in full if name in alone]
    print_table("at the end", ["", "full", "subnetwork"], rows)
