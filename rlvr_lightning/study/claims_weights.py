"""Claims on which weights change; see `claims.py`."""

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import mean
from typing import Any, cast

from rlvr_lightning.study.claim import (
    DENSITY,
    IMITATION,
    SCALES,
    TINY,
    Claim,
    Seen,
    frac,
    of_rank,
    of_spectrum,
    verdict,
)
from rlvr_lightning.study.claim_numbers import (
    BySeed,
    changed,
    final,
    percent,
    records,
    shared,
)
from rlvr_lightning.study.rates import lines
from rlvr_lightning.study.records import cells


def _densities(results: Path) -> dict[str, tuple[BySeed, BySeed]]:
    """Shares changed by whole runs under SGD and AdamW (further apart than 1e-5, the papers' definition), by model."""
    return {
        scale.name: (
            changed(results / scale.rl, "sgd", frac("tol1e-5")),
            changed(results / scale.rl, "adamw", frac("tol1e-5")),
        )
        for scale in SCALES
    }


def _sparser(results: Path) -> Seen:
    found = _densities(results)
    told = "; ".join(f"{model}: SGD {percent(sgd)}, AdamW {percent(adamw)}" for model, (sgd, adamw) in found.items())
    return Seen(f"changed: {told}", verdict(*(max(s.values()) < min(a.values()) for s, a in found.values())))


def _thousandfold(results: Path) -> Seen:
    found = _densities(results)
    ratios = {model: mean(adamw.values()) / mean(sgd.values()) for model, (sgd, adamw) in found.items()}
    told = "; ".join(f"{model}: {ratio:.1f} times fewer" for model, ratio in ratios.items())
    small = max(found["SmolLM2"][0].values()) < 0.0002
    return Seen(told, verdict(*(ratio >= 1000 for ratio in ratios.values()), small))


def _rmsprop(results: Path) -> Seen:
    sgd, momentum, rms, adamw = (
        changed(results / "tiny_seeds", label, frac("tol1e-5")) for label in ("sgd", "momentum", "rmsprop", "adamw")
    )
    text = f"SGD {percent(sgd)}, with momentum {percent(momentum)}, RMSProp {percent(rms)}, AdamW {percent(adamw)}"
    dense = mean(rms.values()) > 0.9 * mean(adamw.values())
    return Seen(f"tiny: {text}", verdict(dense, mean(momentum.values()) < mean([*rms.values(), *sgd.values()])))


def _effective_rank(results: Path) -> Seen:
    told, parts = [], []
    for scale in SCALES:
        adaptive = {"AdamW": "adamw"} | ({"RMSProp": "rmsprop"} if scale is TINY else {})
        sgd = changed(results / scale.rl, "sgd", of_rank("effective", 1))
        others = {name: changed(results / scale.rl, run, of_rank("effective", 1)) for name, run in adaptive.items()}
        told.append(f"{scale.name}: SGD {percent(sgd)}, {', '.join(f'{k} {percent(v)}' for k, v in others.items())}")
        parts.append(max(sgd.values()) < min(value for found in others.values() for value in found.values()) / 2)
    return Seen("effective rank, share of full: " + "; ".join(told), verdict(*parts))


def _full_rank(results: Path) -> Seen:
    told, parts = [], []
    for scale in SCALES:
        sgd, adamw = (changed(results / scale.rl, label, of_rank("matrix", 0)) for label in ("sgd", "adamw"))
        told.append(f"{scale.name}: SGD {percent(sgd)}, AdamW {percent(adamw)}")
        parts += [min(adamw.values()) > 0.99, min(sgd.values()) > 0.99]
    return Seen("rank of the change, share of full, at least: " + "; ".join(told), verdict(*parts))


def _norms(results: Path) -> Seen:
    told, parts = [], []
    for scale, label in itertools.product(SCALES, ("sgd", "adamw")):
        norm, rest = (changed(results / scale.rl, label, frac("bf16", part)) for part in ("norms", "all but norms"))
        told.append(f"{scale.name}, {label}: norms {percent(norm)}, the rest {percent(rest)}")
        parts.append(mean(norm.values()) < 0.1 * mean(rest.values()))
    return Seen("changed: " + "; ".join(told), verdict(*parts))


def _alike(results: Path) -> Seen:
    told, parts = [], []
    for scale, label in itertools.product(SCALES, ("sgd", "adamw")):
        by_kind: dict[str, list[float]] = {}
        for one in changed(results / scale.rl, label, lambda record: record["kinds"]).values():
            for kind, counts in cast(dict[str, Any], one).items():
                by_kind.setdefault(kind, []).append(counts["changed_frac"]["bf16"])
        means = {kind: mean(values) for kind, values in by_kind.items() if kind != "norm"}
        least, most = min(means, key=lambda k: means[k]), max(means, key=lambda k: means[k])
        told.append(
            f"{scale.name}, {label}: from {percent([means[least]])} ({least}) to {percent([means[most]])} ({most})"
        )
        parts.append(means[most] < 1.5 * means[least])
    return Seen("changed: " + "; ".join(told), verdict(*parts))


def _overlaps(results: Path) -> Seen:
    pairs: dict[str, list[Any]] = {}
    for scale, label in itertools.product(SCALES, ("sgd", "adamw")):
        for what, other in {"seed": label, "data": f"{label}_other_data"}.items():
            if what == "seed" or scale is TINY:
                name = f"{scale.name}, {label}, other {what}"
                pairs[name] = shared(results / scale.rl, label, other, lambda one: one["parts"]["all"])
    folder = results / "tiny_algorithms"
    kinds = dict.fromkeys(record["label"] for record in records(folder).values() if record["label"] != "grpo")
    rows = [shared(folder, "grpo", kind, lambda one: one["parts"]["all"]) for kind in kinds]
    pairs["tiny, sgd, GRPO and other algorithms"] = list(itertools.chain(*rows))
    told = [
        f"{name}: {percent([mean(row['jaccard'] for row in found)])}, by chance "
        f"{percent([mean(row['jaccard_by_chance'][1] for row in found)])}, among equal exponents "
        f"{percent([mean(row['jaccard_equal'] for row in found)])}"
        for name, found in pairs.items()
    ]
    parts = [all(row["jaccard"] > 1.1 * row["jaccard_equal"] for row in found) for found in pairs.values()]
    return Seen("Jaccard index of the changed entries: " + "; ".join(told), verdict(*parts))


def _bf16_artefact(results: Path) -> Seen:
    told, parts = [], []
    for folder, label in (("tiny_seeds", "sgd"), ("tiny_seeds", "adamw"), ("smollm2_seeds", "sgd")):
        half, full = (final(results / folder, label, f"update/changed_frac_total/{name}") for name in ("bf16", "fp32"))
        told.append(f"{folder.partition('_')[0]} {label}: bf16 {percent(half)}, fp32 {percent(full)}")
        parts.append(mean(full.values()) > 0.95)
    return Seen("changed: " + "; ".join(told), verdict(*parts))


def _small_weights(results: Path) -> Seen:
    told, parts = [], []
    unguarded: dict[str, Any] = {"kl_coef": 0.001, "max_grad_norm": 0.0}
    for scale, label in itertools.product(SCALES, ("sgd", "adamw")):
        folder, point = (results / "tiny_guards", unguarded) if scale is TINY else (results / scale.rl, {})
        low, principal = (changed(folder, label, of_spectrum(name), **point) for name in ("low", "principal"))
        told.append(
            f"{scale.name}, {label}: {percent(low)} among the smallest 30 %, {percent(principal)} among the principal "
            "30 %"
        )
        parts += [min(low.values()) > 0.3, max(principal.values()) < 0.3]
    # Rounding to bf16 alone does so too, whatever the update: nothing here could confirm more.
    return Seen("of the changed entries, " + "; ".join(told), "in part" if any(parts) else "not confirmed")


def _imitation_is_dense(results: Path) -> Seen:
    told, parts = [], []
    for label in ("sgd", "adamw"):
        a = changed(results / TINY.rl, label, frac("bf16"))
        b = changed(results / IMITATION, f"sft_{label}_rl_rate", frac("bf16"))
        told.append(f"tiny, {label}: RL {percent(a)}, SFT {percent(b)}")
        parts.append(mean(b.values()) - mean(a.values()) > 0.2)
        parts += [min(b.values()) >= 0.85] if label == "adamw" else []  # the papers' SFT is under AdamW
    return Seen("changed by as many steps at the same rate: " + "; ".join(told), verdict(*parts))


def _own_answers(results: Path) -> Seen:
    told, parts = [], []
    for label in ("sgd", "adamw"):
        runs = (f"{answers}_{label}_rl_rate" for answers in ("rft", "sft"))
        own, others = (changed(results / IMITATION, run, frac("bf16")) for run in runs)
        told.append(f"tiny, {label}: own answers {percent(own)}, others' {percent(others)}")
        parts.append(mean(own.values()) < mean(others.values()) / 2)
    return Seen("changed, at the same rate: " + "; ".join(told), verdict(*parts))


def _rate_decides(results: Path) -> Seen:
    told, parts = [], []
    for folder, label in (("tiny_sweep", "adamw"), ("tiny_sweep", "sgd"), ("tiny_sft_sweep", "adamw")):
        [line] = [x for x in lines(cells(records(results / folder).values()), DENSITY) if x.name == label]
        ends = [line.points[0], line.points[-1]]
        values = [mean(point.values) for point in line.points]
        steps = [f"{percent(point.values)} at {point.rate:g}" for point in ends]
        told.append(f"{'RL' if folder == 'tiny_sweep' else 'SFT'}, {label}: {' to '.join(steps)}")
        parts.append(values == sorted(values))
    return Seen("changed: " + "; ".join(told), verdict(*parts))


def _algorithms(results: Path) -> Seen:
    folder = results / "tiny_algorithms"
    labels = dict.fromkeys(record["label"] for record in records(folder).values())
    found = {label: changed(folder, label, frac("bf16")) for label in labels}
    told = ", ".join(f"{label} {percent([mean(values.values())])}" for label, values in found.items())
    return Seen(f"changed, under SGD: {told}", verdict(*(max(values.values()) < 0.5 for values in found.values())))


CLAIMS = [
    Claim("A", "SGD changes fewer weights than AdamW", "in every run", _sparser),
    Claim(
        "A", "over 1000 times fewer: under 0.02 %, AdamW 9 %", "1000 times; and below 0.02 % on SmolLM2", _thousandfold
    ),
    Claim(
        "A",
        "RMSProp is as dense as AdamW: the adaptive rate, not momentum, makes updates dense",
        "RMSProp above 0.9 of AdamW; momentum below the mean of SGD and RMSProp",
        _rmsprop,
    ),
    Claim("A", "SGD's updates are of lower effective rank than AdamW's and RMSProp's", "below half", _effective_rank),
    Claim("B", "every algorithm of RL leaves most weights as they are (4 to 32 % change)", "below 50 %", _algorithms),
    Claim(
        "B",
        "SFT changes almost all (85 to 94 %), RL far fewer",
        "above 85 % under AdamW; 20 points more than RL at the same rate",
        _imitation_is_dense,
    ),
    Claim("B", "SFT on the model's own right answers is sparse, too", "less than half of SFT on others'", _own_answers),
    Claim("B", "updates are sparse and yet of almost full rank", "rank above 99 % of full", _full_rank),
    Claim("B", "norm layers hardly change", "below a tenth of the rest", _norms),
    Claim("B", "all other matrices change alike", "the most changed kind below 1.5 times the least", _alike),
    Claim(
        "B",
        "runs on other seeds and data, or by another algorithm, change the same weights, above chance",
        "all pairs a tenth above chance among equal exponents (any two runs share what bf16 rounds)",
        _overlaps,
    ),
    Claim("C", "the learning rate decides how many weights change", "each higher rate changes more", _rate_decides),
    Claim("C", "sparsity is an artefact of bf16 and vanishes in fp32", "above 95 % changed in fp32", _bf16_artefact),
    Claim(
        "C",
        "changes prefer small weights and avoid the principal ones (chance: 30 %)",
        "above and below 30 % in all runs; but bf16 rounding does so by itself, so at most in part",
        _small_weights,
    ),
]
