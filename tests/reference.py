"""Naive second implementations: loops over Python floats, written from the formulas and from nothing else."""

from __future__ import annotations

import math


def advantages(rewards: list[float], group: int, baseline: str, eps: float = 1e-4) -> list[float]:
    out = []
    for start in range(0, len(rewards), group):
        own = rewards[start : start + group]
        for i, reward in enumerate(own):
            if baseline == "leave_one_out":
                others = [r for k, r in enumerate(own) if k != i]
                out.append(reward - sum(others) / len(others))
                continue
            mean = sum(own) / group
            std = math.sqrt(sum((r - mean) ** 2 for r in own) / (group - 1))
            out.append((reward - mean) / (std + eps) if baseline == "mean_std" else reward - mean)
    return out


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(sum(math.exp(z - top) for z in logits))
    return [z - total for z in logits]


def entropy(logits: list[float]) -> float:
    return -sum(math.exp(lp) * lp for lp in log_softmax(logits))


def kl(policy: float, ref: float, estimator: str) -> float:
    d = policy - ref
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]


def policy_loss(policy, old, adv, mask, o, counts, ent=None, ref=None, trainer=None) -> float:
    """The clipped surrogate over lists of lists; `o` is an Objective, `counts` a Counts, `old` the sampler's."""
    loss = 0.0
    for r, row in enumerate(mask):
        valid = [t for t, on in enumerate(row) if on]
        if not valid:
            continue
        corrects = o.correction in ("truncate", "mask")
        below = (trainer or policy) if corrects else old
        mean_log_ratio = sum(policy[r][t] - below[r][t] for t in valid) / len(valid)
        for t in valid:
            ratio = math.exp(policy[r][t] - below[r][t] if o.ratio == "token" else mean_log_ratio)
            clipped = min(max(ratio, 1 - o.clip_low), 1 + o.clip_high)
            gain = adv[r][t] if isinstance(adv[r], list) else adv[r]
            term = -min(ratio * gain, clipped * gain)
            if o.surrogate == "weight":
                term = -clipped * gain * policy[r][t]
            if corrects:
                apart = math.exp(below[r][t] - old[r][t])
                inside = 1 / o.correction_cap <= apart <= o.correction_cap
                term *= min(apart, o.correction_cap) if o.correction == "truncate" else apart * inside
            if o.kl_coef and o.kl_in == "loss":
                term += o.kl_coef * kl(policy[r][t], ref[r][t], o.kl_estimator)
            if o.entropy_coef:
                term -= o.entropy_coef * ent[r][t]
            if o.normalization == "token":
                weight = 1 / counts.tokens
            elif o.normalization == "sequence":
                weight = 1 / len(valid) / counts.completions
            else:
                weight = 1 / (counts.completions * counts.max_tokens)
            loss += weight * term
    return loss


def gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Of one completion: the sum over k of (gamma lam)^k delta_(t+k)."""
    length = len(rewards)
    after = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(length)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)]


def process_advantages(process: list[list[float]], rewards: list[float], group: int, gamma: float) -> list[list[float]]:
    """PRIME's eq. 5 over the tokens of each completion."""
    out = []
    for i, own in enumerate(process):
        others = [j for j in range(i // group * group, i // group * group + group) if j != i]
        baseline = sum(sum(process[j]) / len(process[j]) for j in others) / len(others)
        outcome = rewards[i] - sum(rewards[j] for j in others) / len(others)
        n = len(own)
        returns = [sum(gamma ** (s - t) * (own[s] - baseline) for s in range(t, n)) for t in range(n)]
        out.append([value + outcome for value in returns])
    return out


def value_loss(values, old, returns, weights, clip: float) -> float:
    loss = 0.0
    for r, row in enumerate(weights):
        for t, weight in enumerate(row):
            if weight:
                v, o, g = values[r][t], old[r][t], returns[r][t]
                near = o + min(max(v - o, -clip), clip) if clip else v
                loss += weight / 2 * max((v - g) ** 2, (near - g) ** 2)
    return loss


def outcome_loss(process: list[list[float]], labels: list[float], completions: int) -> float:
    loss = 0.0
    for own, label in zip(process, labels, strict=True):
        right = 1 / (1 + math.exp(-sum(own)))
        loss -= (label * math.log(right) + (1 - label) * math.log(1 - right)) if own else 0.0
    return loss / completions


def minus_log_sigmoid(x: float) -> float:
    return math.log(1 + math.exp(-x))


def dpo(policy, ref, beta: float, smoothing: float) -> float:
    """A sum over pairs [chosen, rejected], as the next three."""
    total = 0.0
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(policy, ref, strict=True):
        x = beta * (chosen - ref_chosen - rejected + ref_rejected)
        total += (1 - smoothing) * minus_log_sigmoid(x) + smoothing * minus_log_sigmoid(-x)
    return total


def ipo(policy, ref, beta: float) -> float:
    return sum(((p[0] - r[0]) - (p[1] - r[1]) - 0.5 / beta) ** 2 for p, r in zip(policy, ref, strict=True))


def simpo(policy, lengths, beta: float, margin: float) -> float:
    pairs = zip(policy, lengths, strict=True)
    return sum(minus_log_sigmoid(beta * (p[0] / n[0] - p[1] / n[1]) - margin) for p, n in pairs)


def orpo(policy, lengths, weight: float, pairs: int, tokens: int) -> float:
    total = 0.0
    for side, length in zip(policy, lengths, strict=True):
        p = [math.exp(s / n) for s, n in zip(side, length, strict=True)]
        odds_ratio = (p[0] / (1 - p[0])) / (p[1] / (1 - p[1]))
        total += -side[0] / tokens + weight * minus_log_sigmoid(math.log(odds_ratio)) / pairs
    return total


def kto(policy, ref, good, kl: float, beta: float, weights: tuple[float, float]) -> float:
    total = 0.0
    for p, r, is_good in zip(policy, ref, good, strict=True):
        if is_good:
            total += weights[0] * (1 - 1 / (1 + math.exp(-beta * (p - r - kl))))
        else:
            total += weights[1] * (1 - 1 / (1 + math.exp(-beta * (kl - p + r))))
    return total
