"""Slow and plain versions: every draw is enumerated, every pair compared."""

import itertools
import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def best_of_n_by_enumeration(probs: Floats, rewards: Floats, n: int, tie_break: str) -> Floats:
    """Sum the probability of all K^n draws over their winner."""
    result = np.zeros(len(probs))
    for draw in itertools.product(range(len(probs)), repeat=n):
        weight = math.prod(probs[i] for i in draw)
        best = max(rewards[i] for i in draw)
        winners = [i for i in draw if rewards[i] == best]
        if tie_break == "first":
            result[winners[0]] += weight
        else:
            for i in winners:
                result[i] += weight / len(winners)
    return result


def win_prob(rewards: Floats, probs: Floats, other_probs: Floats) -> float:
    """P(reward under probs > reward under other_probs), ties half."""
    wins = np.sign(rewards[:, None] - rewards[None, :]) / 2 + 0.5
    return float(probs @ wins @ other_probs)


def kl(p: Floats, q: Floats) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def naive_quantile(rewards: Floats, ref_rewards: Floats, strict: bool) -> Floats:
    """The P x m x M comparison."""
    compare = np.less if strict else np.less_equal
    return compare(ref_rewards[:, None, :], rewards[:, :, None]).mean(-1)


def naive_best_of_n_win_rate(samples: Floats, n: int) -> float:
    """All ordered choices of one opponent and n other samples."""
    total, count = 0.0, 0
    for choice in itertools.permutations(range(len(samples)), n + 1):
        best, opponent = max(samples[i] for i in choice[1:]), samples[choice[0]]
        total += 1.0 if best > opponent else 0.5 if best == opponent else 0.0
        count += 1
    return total / count
