"""Claims on what is learned, at what rate, in how much memory, and why; see `claims.py`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

from rlvr_lightning.study.claim import (
    ALIKE,
    ALL,
    IMITATION,
    PASS,
    SCALES,
    TEST,
    TINY,
    Claim,
    Seen,
    frac,
    inside,
    verdict,
)
from rlvr_lightning.study.claim_numbers import (
    BySeed,
    average,
    changed,
    difference,
    final,
    first,
    measurements,
    percent,
    records,
    shown,
    signed,
)
from rlvr_lightning.study.rates import KEPT, lines
from rlvr_lightning.study.records import best_cells, cells


def _accuracy(results: Path) -> Seen:
    tiny = difference(final(results / "tiny_seeds", "sgd", PASS), final(results / "tiny_seeds", "adamw", PASS))
    real = results / "smollm2_seeds"
    smollm2 = difference(final(real, "sgd", TEST), final(real, "adamw_lower", TEST))
    alike = [low > -ALIKE for _, low, _ in (tiny, smollm2)]
    return Seen(f"SGD minus AdamW, pass@1: tiny {signed(tiny)}; SmolLM2 {signed(smollm2)}", verdict(*alike))


def _momentum(results: Path) -> Seen:
    found = difference(final(results / "tiny_seeds", "sgd", PASS), final(results / "tiny_seeds", "momentum", PASS))
    return Seen(f"SGD minus SGD with momentum 0.9, pass@1: {signed(found)}", verdict(found[1] > -ALIKE))


def _state(results: Path) -> Seen:
    name = "memory/optimizer_state_bytes"
    sgd, adamw = (final(results / "smollm2_seeds", label, name) for label in ("sgd", "adamw_lower"))
    text = f"SmolLM2: {shown(sgd, '{:,.0f}')} bytes against {shown(adamw, '{:,.0f}')}, 8 a parameter"
    return Seen(text, verdict(max(sgd.values()) == 0))


def _rates(results: Path) -> Seen:
    found = lines(cells(records(results / "tiny_sweep").values()), PASS)
    take = {line.name: line.suggestion() or 0.0 for line in found}
    bands = {line.name: [point.rate for point in line.band()] for line in found}
    told = "; ".join(f"{name}: {band[0]:g} to {band[-1]:g}" for name, band in bands.items() if band)
    if not (take.get("sgd") and take.get("adamw")):
        return Seen(f"stable rates: {told or 'none'}", "not confirmed")
    ratio = take["sgd"] / take["adamw"]
    return Seen(f"stable rates: {told}; SGD's is {ratio:,.0f} times AdamW's", verdict(ratio >= 100))


def _momentum_cosine(results: Path) -> Seen:
    told, parts = [], []
    name = "update/momentum_cosine"
    for label in ("sgd", "adamw"):
        for scale in SCALES:
            found = average(results / scale.rl, label, name)
            often = measurements(results / scale.rl, label, name)
            told.append(f"{scale.name}, {label}: RL {shown(found)}, steps measured: {often}")
            parts.append(abs(mean(found.values())) < 0.1)
        found = average(results / IMITATION, f"sft_{label}_rl_rate", name)
        told.append(f"tiny, {label}: SFT {shown(found)}")
        parts.append(mean(found.values()) > 0.5)
    return Seen("mean cosine over a run: " + "; ".join(told), verdict(*parts))


def _sqrt_v(results: Path) -> Seen:
    told, parts = [], []
    for label in ("sgd", "adamw"):
        a = average(results / TINY.rl, label, "update/sqrt_v_std")
        b = average(results / IMITATION, f"sft_{label}_rl_rate", "update/sqrt_v_std")
        told.append(f"tiny, {label}: RL {shown(a, '{:.2g}')}, SFT {shown(b, '{:.2g}')}")
        parts.append(mean(b.values()) >= 5 * mean(a.values()))
    return Seen("standard deviation of sqrt(v): " + "; ".join(told), verdict(*parts))


def _subnetwork(results: Path) -> Seen:
    told, parts = [], []
    for label in ("sgd", "adamw"):
        found = [json.loads(path.read_text()) for path in sorted((results / "subnetwork").glob(f"{label}-*.json"))]
        if not found:
            raise ValueError(f"claims: no {results}/subnetwork/{label}-*.json; subnetwork check makes them")
        close = [one["close"] / one["entries"] for one in found]
        runs = [{one["seed"]: one["metrics"][kind][PASS] for one in found} for kind in ("subnetwork", "full")]
        off = difference(runs[0], runs[1])
        told.append(f"{label}: {percent(close)} within 1e-4, pass@1 {signed(off)} of the full run's")
        parts += [min(close) == 1, off[1] > -ALIKE]
    return Seen("; ".join(told), verdict(*parts))


def _guards(results: Path) -> Seen:
    told, parts = [], []
    folder = results / "tiny_guards"
    for label in ("sgd", "adamw"):
        for name, off in (
            ("kl_coef", {"kl_coef": 0.0, "max_grad_norm": 0.2}),
            ("clipping", {"kl_coef": 0.001, "max_grad_norm": 0.0}),
        ):
            on = {"kl_coef": 0.001, "max_grad_norm": 0.2}
            shares = difference(changed(folder, label, frac("bf16"), **off), changed(folder, label, frac("bf16"), **on))
            score = difference(final(folder, label, PASS, **off), final(folder, label, PASS, **on))
            told.append(f"tiny, {label} without {name}: changed {signed(shares)}, pass@1 {signed(score)}")
            parts.append(inside(shares, 0.05) and inside(score, ALIKE))
    for label, lr in (("sgd", 0.03), ("adamw", 3e-6)):  # one seed each: no intervals
        runs = (final(results / "smollm2_sweep", run, ALL, lr=lr) for run in (label, f"{label}_unclipped"))
        clipped, unclipped = (mean(values.values()) for values in runs)
        told.append(f"SmolLM2, {label} without clipping: pass@1 {unclipped:.3f}, with it {clipped:.3f} (one run each)")
        parts.append(abs(clipped - unclipped) < ALIKE)
    return Seen("; ".join(told), verdict(*parts))


def _best(results: Path, label: str) -> BySeed:
    """Final accuracies of `lora_tiny.yaml` at the label's best rate."""
    cells_of = [cell for cell in cells(records(results / "tiny_lora").values()) if cell.label == label]
    if not cells_of:
        raise ValueError(f"claims: {results}/tiny_lora has no run of {label}")
    (best,) = best_cells(cells_of, PASS)
    return {record["seed"]: record["metrics"][PASS]["final"] for record in best.good}


def _adapters(results: Path) -> dict[str, tuple[float, float, float]]:
    full = final(results / "tiny_algorithms", "grpo", PASS)
    return {name: difference(_best(results, label), full) for name, label in ADAPTERS.items()}


def _better_than_lora(results: Path) -> Seen:
    found = _adapters(results)
    told = "; ".join(f"{name} minus SGD on all weights, pass@1: {signed(off)}" for name, off in found.items())
    return Seen(told, verdict(all(high < 0 for _, _, high in found.values())))


def _lora_is_enough(results: Path) -> Seen:
    name, off = max(_adapters(results).items(), key=lambda pair: pair[1][0])
    return Seen(f"{name} minus SGD on all weights, pass@1: {signed(off)}", verdict(off[1] > -ALIKE))


def _fisher_mask(results: Path) -> Seen:
    folder = results / "tiny_algorithms"
    full, start = (end(folder, "grpo", PASS) for end in (final, first))
    gains = {}
    for name, label in MASKS.items():
        few = _best(results, label)
        seeds = few.keys() & full.keys()
        gains[name] = sum(few[seed] - start[seed] for seed in seeds) / sum(full[seed] - start[seed] for seed in seeds)
    told = ", ".join(f"{name} {percent([gain])}" for name, gain in gains.items())
    return Seen(f"of the gain of all weights, 1.4 % of them keep: {told}", verdict(gains["Fisher"] > KEPT))


ADAPTERS = {"LoRA under SGD": "lora_sgd", "LoRA under AdamW": "lora_adamw"}
MASKS = {"Fisher": "fisher_sgd", "at random": "random_sgd"}
CLAIMS = [
    Claim("A", "SGD without momentum learns as well as AdamW", f"lower end above -{ALIKE}", _accuracy),
    Claim("A", "momentum is not needed", f"lower end above -{ALIKE}", _momentum),
    Claim("A", "SGD needs no optimizer state (AdamW 8 bytes a parameter in fp32)", "exactly 0 bytes", _state),
    Claim("A", "SGD wants rates orders of magnitude above AdamW's (0.1 against 1e-6)", "at least 100 times", _rates),
    Claim(
        "A",
        "momentum and gradient point apart in RL (cosine -0.007), and the same way in SFT (0.997)",
        "below 0.1 in RL, above 0.5 in SFT",
        _momentum_cosine,
    ),
    Claim(
        "A",
        "what AdamW divides by varies less in RL (2.3e-7) than in SFT (5.1e-6): an adaptive rate has little to do",
        "SFT at least 5 times RL",
        _sqrt_v,
    ),
    Claim("A", "SGD scores better than LoRA of rank 1", "upper ends below 0, each at its best rate", _better_than_lora),
    Claim("C", "LoRA of rank 1 learns as well as all weights do", f"lower end above -{ALIKE}", _lora_is_enough),
    Claim(
        "C",
        "the entries with most Fisher information at the start, trained alone, keep most of the gain",
        f"above {100 * KEPT:.0f} %",
        _fisher_mask,
    ),
    Claim(
        "B",
        "training the subnetwork alone gives the full run, within 1e-4, and its score",
        f"all entries within 1e-4; pass@1's lower end above -{ALIKE}",
        _subnetwork,
    ),
    Claim(
        "B",
        "KL term and gradient clipping matter little",
        f"intervals of the differences within 0.05 (shares) and {ALIKE} (pass@1)",
        _guards,
    ),
]
