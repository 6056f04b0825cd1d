"""Best-of-n as the fixed point of a rank signal among the policy's own samples: signals, strengths, results.

If the policy is Best-of-n of the reference, then own quantile = (reference quantile)^n, and the log-ratio to the
reference is a function f of the own quantile: for continuous rewards log(pi / pi_ref) = (1 - 1/n) log p + log n. K
samples determine f only as its Bernstein polynomial f_k(p) = sum_j f_j C(k, j) p^j (1-p)^(k-j) over the k = K - 1
others, where f_j is the signal of a sample that is better than j of them. Exactly one distribution has the log-ratio
f_k(own quantile) + constant: with G the own quantile as a function of the reference's quantile u, du/dG = Z
exp(-f_k(G)). So the strength of a signal can be *solved* for the win rate of Best-of-n, n / (n + 1). Derivation:
docs/theory.md, "Own quantiles".
"""

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bondlm.bestofn.distribution import kl_bound

OwnQuantile = Literal["tilt", "harmonic", "best_of_n"]
FORMS: tuple[OwnQuantile, ...] = ("tilt", "harmonic", "best_of_n")
_NODES, _BISECTIONS, _STRONGEST = 256, 200, 600.0
_Vector = NDArray[np.float64]


class Reached(NamedTuple):
    """Win rate and KL that a rank signal reaches with continuous rewards."""

    win_rate: float  # of a policy sample against a reference sample
    kl: float  # to the reference, nats


def rank_signal(n: float, num_samples: int, form: OwnQuantile, strength: float) -> _Vector:
    """Return the signal (K,) of a sample that is better than j = 0 .. K-1 of the K - 1 others, without ties.

    - `"tilt"`: log(1 + j/k (e^strength - 1)). The exponential tilt of the reference quantile has the least KL for
      its win rate, and this is its log-ratio as a function of the own quantile.
    - `"harmonic"`: -strength (H_k - H_j), H the harmonic numbers: strength times the unbiased estimate of log p.
    - `"best_of_n"`: log of 1/K over the share of the reference that falls into that K-th of Best-of-n's own mass,
      ((j+1)/K)^(1/n) - (j/K)^(1/n); the worst sample loses `strength` more, for what K samples cannot resolve.

    Args:
        n: order of Best-of-n, a real number > 1.
        num_samples: K samples of a prompt, at least 2.
        form: see above.
        strength: lambda, c, or the penalty of the worst, in nats.

    Raises:
        ValueError: an unknown form.
    """
    others = num_samples - 1
    better_than_K = np.arange(num_samples) / others
    if form == "tilt":
        signal_K: _Vector = np.log1p(better_than_K * math.expm1(strength))
    elif form == "harmonic":
        harmonic_K = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, num_samples))])
        signal_K = -strength * (harmonic_K[-1] - harmonic_K)
    elif form == "best_of_n":
        signal_K = -np.log(num_samples * np.diff(_reference_share(n, num_samples, form)))
        signal_K[0] -= strength
    else:
        raise ValueError(f"unknown form {form!r}; use one of {', '.join(FORMS)}")
    return signal_K


@lru_cache(maxsize=64)
def solve_strength(n: float, num_samples: int, form: OwnQuantile) -> float:
    """Return the strength at which `rank_signal` reaches the win rate n / (n + 1) of Best-of-n, rewards continuous.

    Bisection in float64, a few milliseconds, then cached; inf if no strength below 600 nats reaches it.

    Args:
        n: order of Best-of-n, a real number > 1.
        num_samples: K samples of a prompt, at least 2.
        form: as `rank_signal`.

    Raises:
        ValueError: n <= 1, K < 2, or an unknown form.
    """
    if not (math.isfinite(n) and n > 1.0) or num_samples < 2:
        raise ValueError(f"n must be > 1 and num_samples >= 2; got n={n!r}, num_samples={num_samples!r}")
    low, high = 0.0, _STRONGEST
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        if middle in (low, high):
            break
        win_rate = reached_by(rank_signal(n, num_samples, form, middle)).win_rate
        low, high = (middle, high) if win_rate < n / (n + 1.0) else (low, middle)
    return (low + high) / 2.0 if high < _STRONGEST else math.inf


def reached_by(signal: _Vector) -> Reached:
    """Return win rate and KL of the policy whose log-ratio is the Bernstein polynomial of `signal` (K,), by quadrature.

    E[u] = integral of (1 - G) du/dG over G, and KL = E[log dG/du], with du/dG = Z exp(-f_k(G)).
    """
    nodes, weights, basis = _quadrature(len(signal))
    f = basis @ np.asarray(signal, dtype=np.float64)
    density = weights * np.exp(f.min() - f)
    total = density.sum()
    win_rate = float(((1.0 - nodes) * density).sum() / total)
    kl = float((weights * f).sum() - f.min() + math.log(total))
    return Reached(win_rate, kl)


def kl_over_best_of_n(n: float, num_samples: int, form: OwnQuantile) -> float:
    """Return the KL at the solved strength over that of exact Best-of-n, `kl_bound(n)`; inf: out of reach.

    Continuous rewards. Args and errors as `solve_strength`.
    """
    strength = solve_strength(n, num_samples, form)
    if math.isinf(strength):
        return math.inf
    return reached_by(rank_signal(n, num_samples, form, strength)).kl / kl_bound(n)


def largest_order(n: int, num_samples: int, form: OwnQuantile, max_ratio: float) -> int:
    """Return the largest order below `n`, at least 2, whose `kl_over_best_of_n` is at most `max_ratio`."""
    low, high = 2, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kl_over_best_of_n(middle, num_samples, form) <= max_ratio else (low, middle)
    return low


@lru_cache(maxsize=64)
def signal_table(n: float, num_samples: int, form: OwnQuantile) -> _Vector:
    """Return the signal (K, K) of a sample that is better than a of the others and ties with b; NaN where a + b >= K.

    The first column is `rank_signal` at the solved strength. A level of tied samples from own quantile a/K to (a+b+1)/K
    gets the log-ratio that the form has there in the limit of many samples, own share over reference share,

        F(a, b) = log [(b+1)/K] - log [q((a+b+1)/K) - q(a/K)],   q(p) the reference's share below the own quantile p,

    q(p) = p^(1/n) for Best-of-n, log(1 + p (e^l - 1)) / l for the tilt of the same win rate. To this is added the
    difference between the rank signal and F(j, 0), averaged over the places that the tied samples could have:

        s(a, b) = F(a, b) + mean over j = a .. a+b of (f_j - F(j, 0)).

    So ties are exact in the limit of many samples. If all samples tie, all get the same number, which is no signal.
    """
    share_q = _reference_share(n, num_samples, form)
    rank_K = rank_signal(n, num_samples, form, solve_strength(n, num_samples, form))
    excess = np.concatenate([[0.0], np.cumsum(rank_K + np.log(num_samples * np.diff(share_q)))])
    table_KK = np.full((num_samples, num_samples), np.nan)
    for tied in range(1, num_samples + 1):
        reference_share = share_q[tied:] - share_q[:-tied]
        ratio = np.log(tied / num_samples / reference_share)
        table_KK[: len(ratio), tied - 1] = ratio + (excess[tied:] - excess[:-tied]) / tied
    table_KK.setflags(write=False)
    return table_KK


@lru_cache(maxsize=64)
def win_table(n: float, num_samples: int) -> _Vector:
    """Return the policy's win rate (K+1, K+1) against a reference sample that beats a of K own samples and ties with b.

    NaN where a + b > K. Without ties it is the share of own samples that are better, 1 - a/K. Ties are split as in
    Best-of-n, for a level between the own quantiles a/K and (a+b)/K. The part of the level below p has the reference
    share q(p) - q(a/K), with q(p) = p^(1/n), and the win rate is the mean of 1 - p over that share,

        w(a, b) = [W((a+b)/K) - W(a/K)] / [q((a+b)/K) - q(a/K)],   W(p) = p^(1/n) - p^(1 + 1/n) / (n + 1).

    So if the policy is Best-of-n, the mean over reference samples is n / (n + 1), the win rate for continuous rewards,
    *for any ties* (exact as K grows; without ties for every K). Counting ties as half would give less.
    """
    own = np.arange(num_samples + 1) / num_samples
    share = np.power(own, 1.0 / n)
    wins = share * (1.0 - own / (n + 1.0))
    table = np.full((num_samples + 1, num_samples + 1), np.nan)
    table[:, 0] = 1.0 - own
    for tied in range(1, num_samples + 1):
        table[:-tied, tied] = (wins[tied:] - wins[:-tied]) / (share[tied:] - share[:-tied])
    table.setflags(write=False)
    return table


@lru_cache(maxsize=64)
def tilt_of_order(n: float) -> float:
    """Return lambda > 0 at which the exponential tilt exp(lambda u) of the reference quantile wins n / (n + 1)."""
    low, high = 0.0, 4.0 * (n + 1.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        if middle in (low, high):
            break
        win_rate = 1.0 / -math.expm1(-middle) - 1.0 / middle if middle > 1e-4 else 0.5 + middle / 12.0
        low, high = (middle, high) if win_rate < n / (n + 1.0) else (low, middle)
    return (low + high) / 2.0


def _reference_share(n: float, num_samples: int, form: OwnQuantile) -> _Vector:
    """q(j/K) for j = 0 .. K: the share of the reference below the own quantile j/K."""
    own = np.arange(num_samples + 1) / num_samples
    share: _Vector = own ** (1.0 / n)
    if form == "tilt":  # log(1 + p (e^l - 1)) / l, without e^l, which overflows from n = 700 on
        tilt = tilt_of_order(n)
        share[1:] = 1.0 + np.log(own[1:] + (1.0 - own[1:]) * math.exp(-tilt)) / tilt
    return share


@lru_cache(maxsize=16)
def _quadrature(num_samples: int) -> tuple[_Vector, _Vector, _Vector]:
    """Gauss-Legendre nodes and weights on [0, 1], and the Bernstein basis (nodes, K) of degree K - 1 there."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    nodes, weights = (nodes + 1.0) / 2.0, weights / 2.0
    k = num_samples - 1
    log_ways = np.array([math.lgamma(k + 1) - math.lgamma(j + 1) - math.lgamma(k - j + 1) for j in range(k + 1)])
    counts = np.arange(k + 1)
    log_nodes, log_rest = np.log(nodes)[:, None], np.log1p(-nodes)[:, None]
    return nodes, weights, np.exp(log_ways + counts * log_nodes + (k - counts) * log_rest)
