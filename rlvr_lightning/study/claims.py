"""The papers' claims, one by one, beside what the records in `results/` show.

Each claim has a rule that says, before one looks, what would confirm it here; the verdict follows from the rule and the
records. `python -m rlvr_lightning plots results/CLAIMS.md` fills the page's `<!-- claims -->` block.

A = "Do We Need Adam?" (arXiv 2602.07729), B = "RL Finetunes Small Subnetworks" (arXiv 2505.11711), C = what challenges
them: RL's Razor (2509.04259), The Path Not Taken (2511.08567).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

from rlvr_lightning.study.claim_numbers import (
    average,
    changed,
    difference,
    final,
    percent,
    records,
    shared,
    shown,
    signed,
)
from rlvr_lightning.study.rates import lines
from rlvr_lightning.study.records import cells
from rlvr_lightning.study.tables import markdown

BLOCK = re.compile(r"(<!-- claims -->\n).*?(<!-- end -->)", re.DOTALL)
PASS, TEST = "val/arithmetic/pass@1", "val/test/pass@1"
DENSITY = "update/changed_frac_total/bf16"
KINDS = (("RL", "tiny_seeds", ("sgd", "adamw")), ("SFT", "tiny_sft_seeds", ("sft_sgd", "sft_adamw_rl_rate")))
ALIKE = 0.03
"""Accuracies that differ by less count as alike."""
Verdict = Literal["confirmed", "in part", "not confirmed", "not run"]


class Seen(NamedTuple):
    """What the records show."""

    text: str
    verdict: Verdict


@dataclass(frozen=True)
class Claim:
    """One line of the page."""

    paper: str
    says: str
    rule: str
    """What would confirm it here."""
    look: Callable[[Path], Seen]


def verdict(*parts: bool) -> Verdict:
    """Confirmed if all parts hold, in part if some do.

    >>> verdict(True, True), verdict(True, False), verdict(False)
    ('confirmed', 'in part', 'not confirmed')
    """
    return "confirmed" if all(parts) else "in part" if any(parts) else "not confirmed"


def frac(definition: str, part: str = "all") -> Callable[[Any], float]:
    """Share of entries changed, of a record of `dissect`."""
    return lambda one: float(one["parts"][part]["changed_frac"][definition])


def of_spectrum(name: str) -> Callable[[Any], float]:
    """Share of the changed entries that are `low` or `principal`, of a record of `dissect`."""
    return lambda one: float(one["spectrum"][f"{name}_frac"])


def of_rank(measure: str) -> Callable[[Any], float]:
    """Share of the full rank that the change of the matrices has, by `matrix` or `effective` rank."""
    return lambda one: float(mean(one[f"{measure}_rank_frac"]))


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
    ratio = take["sgd"] / take["adamw"]
    return Seen(f"stable rates: {told}; SGD's is {ratio:,.0f} times AdamW's", verdict(ratio >= 100))


def _sgd_sparsity(results: Path) -> Seen:
    told, least = [], []
    name = "update/changed_frac_total/tol1e-5"
    for folder, other in (("tiny_seeds", "adamw"), ("smollm2_seeds", "adamw_lower")):
        sgd, adamw = (final(results / folder, label, name) for label in ("sgd", other))
        told.append(f"{folder.partition('_')[0]}: SGD {percent(sgd)}, AdamW {percent(adamw)}")
        least.append(mean(adamw.values()) > mean(sgd.values()))
    small = max(final(results / "smollm2_seeds", "sgd", name).values()) < 0.0002
    return Seen("changed by the whole run: " + "; ".join(told), verdict(all(least), small))


def _rmsprop(results: Path) -> Seen:
    sgd, momentum_, rms, adamw = (
        changed(results / "tiny_seeds", label, frac("tol1e-5")) for label in ("sgd", "momentum", "rmsprop", "adamw")
    )
    text = f"SGD {percent(sgd)}, with momentum {percent(momentum_)}, RMSProp {percent(rms)}, AdamW {percent(adamw)}"
    dense = mean(rms.values()) > 0.9 * mean(adamw.values())
    return Seen(text, verdict(dense, mean(momentum_.values()) < mean([*rms.values(), *sgd.values()])))


def _effective_rank(results: Path) -> Seen:
    sgd, rms, adamw = (
        changed(results / "tiny_seeds", label, of_rank("effective")) for label in ("sgd", "rmsprop", "adamw")
    )
    text = f"effective rank, share of full: SGD {percent(sgd)}, RMSProp {percent(rms)}, AdamW {percent(adamw)}"
    return Seen(text, verdict(max(sgd.values()) < min([*rms.values(), *adamw.values()]) / 2))


def _full_rank(results: Path) -> Seen:
    sgd, adamw = (changed(results / "tiny_seeds", label, of_rank("matrix")) for label in ("sgd", "adamw"))
    text = f"rank of the change, share of full: SGD {percent(sgd)}, AdamW {percent(adamw)}"
    return Seen(text, verdict(min(adamw.values()) > 0.99, min(sgd.values()) > 0.99))


def _norms(results: Path) -> Seen:
    told, parts = [], []
    for label in ("sgd", "adamw"):
        norm, rest = (changed(results / "tiny_seeds", label, frac("bf16", part)) for part in ("norms", "all but norms"))
        told.append(f"{label}: norms {percent(norm)}, the rest {percent(rest)}")
        parts.append(mean(norm.values()) < 0.1 * mean(rest.values()))
    return Seen("changed in bf16: " + "; ".join(told), verdict(*parts))


def _overlaps(results: Path) -> Seen:
    told, parts = [], []
    for label in ("sgd", "adamw"):
        for what, other in (("seed", label), ("data", f"{label}_other_data")):
            rows = shared(results / "tiny_seeds", label, other, lambda one: one["parts"]["all"])
            kinds = [[row[name] for row in rows] for name in ("jaccard", "jaccard_equal")]
            by_chance = [row["jaccard_by_chance"][1] for row in rows]
            told.append(
                f"{label}, other {what}: {percent([mean(kinds[0])])}, by chance {percent([mean(by_chance)])}, among"
                f" equal exponents {percent([mean(kinds[1])])}"
            )
            parts.append(min(kinds[0]) > max(by_chance))
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
    for label in ("sgd", "adamw"):
        low, principal = (changed(results / "tiny_seeds", label, of_spectrum(name)) for name in ("low", "principal"))
        told.append(f"{label}: {percent(low)} among the smallest 30 %, {percent(principal)} among the principal 30 %")
        parts += [min(low.values()) > 0.3, max(principal.values()) < 0.3]
    return Seen("of the changed entries, " + "; ".join(told), verdict(*parts))


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
            told.append(f"{label} without {name}: changed {signed(shares)}, pass@1 {signed(score)}")
            parts.append(abs(shares[0]) < 0.05 and abs(score[0]) < ALIKE)
    return Seen("; ".join(told), verdict(*parts))


def _momentum_cosine(results: Path) -> Seen:
    told, parts = [], []
    for kind, folder, labels in KINDS:
        found = {label: average(results / folder, label, "update/momentum_cosine") for label in labels}
        told += [f"{kind}, {label}: {shown(values)}" for label, values in found.items()]
        means = [mean(values.values()) for values in found.values()]
        parts.append(all(abs(x) < 0.1 for x in means) if kind == "RL" else min(means) > 0.5)
    return Seen("mean cosine over the run: " + "; ".join(told), verdict(*parts))


def _sqrt_v(results: Path) -> Seen:
    name = "update/sqrt_v_std"
    found = {
        kind: {label: average(results / folder, label, name) for label in labels} for kind, folder, labels in KINDS
    }
    told = [f"{kind}, {label}: {shown(v, '{:.2g}')}" for kind, of in found.items() for label, v in of.items()]
    ratios = [
        mean(imitation.values()) / mean(rl.values())
        for rl, imitation in zip(found["RL"].values(), found["SFT"].values(), strict=True)
    ]
    return Seen("standard deviation of sqrt(v): " + "; ".join(told), verdict(*(ratio >= 5 for ratio in ratios)))


def _imitation_is_dense(results: Path) -> Seen:
    told, parts = [], []
    for rl, imitation in (("sgd", "sft_sgd"), ("adamw", "sft_adamw_rl_rate")):
        a = changed(results / "tiny_seeds", rl, frac("bf16"))
        b = changed(results / "tiny_sft_seeds", imitation, frac("bf16"))
        told.append(f"{rl} at the same rate: RL {percent(a)}, SFT {percent(b)}")
        parts.append(mean(b.values()) - mean(a.values()) > 0.2)
    return Seen("changed: " + "; ".join(told), verdict(*parts))


def _own_answers(results: Path) -> Seen:
    told, parts = [], []
    for name in ("sgd", "adamw_rl_rate"):
        own, others = (changed(results / "tiny_sft_seeds", f"{kind}_{name}", frac("bf16")) for kind in ("rft", "sft"))
        told.append(f"{name.partition('_')[0]}: own answers {percent(own)}, others' {percent(others)}")
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


def _algorithms(results: Path) -> Seen:
    folder = results / "tiny_algorithms"
    labels = dict.fromkeys(record["label"] for record in records(folder).values())
    found = {label: final(folder, label, DENSITY) for label in labels}
    told = ", ".join(f"{label} {percent([mean(values.values())])}" for label, values in found.items())
    return Seen(f"changed, under SGD: {told}", verdict(*(max(values.values()) < 0.5 for values in found.values())))


CLAIMS = [
    Claim("A", "SGD without momentum learns as well as AdamW", f"lower end above -{ALIKE}", _accuracy),
    Claim("A", "momentum is not needed", f"lower end above -{ALIKE}", _momentum),
    Claim("A", "SGD needs no optimizer state (AdamW 8 bytes a parameter in fp32)", "exactly 0 bytes", _state),
    Claim("A", "SGD wants rates orders of magnitude above AdamW's (0.1 against 1e-6)", "at least 100 times", _rates),
    Claim(
        "A",
        "SGD changes over 1000 times fewer weights: under 0.02 %, AdamW 9 %",
        "fewer than AdamW; and below 0.02 % on SmolLM2",
        _sgd_sparsity,
    ),
    Claim(
        "A",
        "RMSProp is as dense as AdamW: the adaptive rate, not momentum, makes updates dense",
        "RMSProp above 0.9 of AdamW; momentum below the mean of SGD and RMSProp",
        _rmsprop,
    ),
    Claim("A", "SGD's updates are of lower effective rank than AdamW's and RMSProp's", "below half", _effective_rank),
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
    Claim("B", "every algorithm of RL leaves most weights as they are (4 to 32 % change)", "below 50 %", _algorithms),
    Claim(
        "B",
        "SFT changes almost all (85 to 94 %)",
        "at least 20 points more than RL at the same rate",
        _imitation_is_dense,
    ),
    Claim("B", "SFT on the model's own right answers is sparse, too", "less than half of SFT on others'", _own_answers),
    Claim(
        "B",
        "training the subnetwork alone gives the full run, within 1e-4, and its score",
        f"all entries within 1e-4; pass@1's lower end above -{ALIKE}",
        _subnetwork,
    ),
    Claim("B", "updates are sparse and yet of almost full rank", "rank above 99 % of full", _full_rank),
    Claim("B", "norm layers hardly change, all other matrices alike", "norms below a tenth of the rest", _norms),
    Claim(
        "B", "runs on other seeds and data change the same weights, above chance", "all pairs above chance", _overlaps
    ),
    Claim("B", "KL term and gradient clipping matter little", f"shares within 0.05, pass@1 within {ALIKE}", _guards),
    Claim("C", "the learning rate decides how many weights change", "each higher rate changes more", _rate_decides),
    Claim("C", "sparsity is an artefact of bf16 and vanishes in fp32", "above 95 % changed in fp32", _bf16_artefact),
    Claim(
        "C",
        "changes prefer small weights and avoid the principal ones (chance: 30 %)",
        "above and below 30 % in all runs",
        _small_weights,
    ),
]


def seen_of(claim: Claim, results: Path) -> Seen:
    """What the records show of a claim; that they are missing, if they are."""
    try:
        return claim.look(results)
    except ValueError as error:
        return Seen(str(error).removeprefix("claims: ").replace(f"{results}/", ""), "not run")


def fill_claims(text: str, results: Path) -> str:
    """A Markdown text with its block replaced by the table of claims."""

    def filled(block: re.Match[str]) -> str:
        rows = [["", "claim", "would be confirmed by", "seen here", "verdict"]]
        for claim in CLAIMS:
            seen = seen_of(claim, results)
            rows.append([claim.paper, claim.says, claim.rule, seen.text, f"**{seen.verdict}**"])
        return f"{block[1]}{markdown(rows)}\n{block[2]}"

    return BLOCK.sub(filled, text)
