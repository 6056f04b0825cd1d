"""Sample estimates of KL divergences from sequence log-probabilities (sums over tokens, in nats).

All functions are elementwise and return one term per sample; the estimate is the mean over samples (average over a
prompt's samples first, then over prompts). They differ in *which distribution drew the samples*, which each function
states. The log-probabilities are those of completions, summed without padding (as `bondlm.models.logprobs` does).

Bias and variance with S samples per prompt (`tests/bestofn/test_divergences.py` checks each line against the oracle):

| estimate | samples from | bias | variance of the mean |
|---|---|---|---|
| `kl_k1` | policy | 0 | Var_π[log ρ] / S, ρ = q/π |
| `kl_k3` | policy | 0 | Var_π[ρ − log ρ] / S: far smaller for a nearby q, inf if E_q[ρ] is |
| `forward_kl` | Best-of-n | (n−1)·E[log p̂ − log p] | grows as (n−1)² Var[log p̂] |
| `backward_kl` | policy | −(n−1)·E[log p̂ − log p] | the same |

With p̂ from M reference samples, E[log p̂ − log p] is Σ_{j>M} (1−p)^j / j for "harmonic", never negative; for "clamped"
it is about −(1−p)/(2Mp) while M·p is large, and positive if p is far below the clamp 1/(2M). The error of p̂ is shared
by all samples that use the same reference samples, so only more prompts or more reference samples reduce it.

Do not simply minimise them by differentiating through `logp` on the policy's own samples: the mean gradient of `kl_k1`
is then zero, and that of `kl_k3` is the gradient of KL(q‖π).
"""

import torch

from bondlm.bestofn._arrays import Array, back, check_order, check_same_shape, to_float64
from bondlm.bestofn.distribution import log_collisions


def kl_k1(logp: Array, other_logp: Array) -> Array:
    """Return `log π(y) − log q(y)` of samples y drawn from the policy π: unbiased for KL(π‖q), noisy, of either sign.

    Args:
        logp: log-probability of each sample under the policy that drew it.
        other_logp: the same samples under the other distribution (reference, anchor), same shape.

    Raises:
        ValueError: if the shapes differ.
    """
    own, other = _pair(logp, other_logp)
    return back(own - other, logp, other_logp)


def kl_k3(logp: Array, other_logp: Array) -> Array:
    """Return `ρ − 1 − log ρ`, ρ = q(y)/π(y), of samples y from the policy π: unbiased for KL(π‖q), never negative.

    Source: Schulman 2020, "Approximating KL divergence". Its variance is large where q has mass that π misses.

    Args:
        logp: log-probability of each sample under the policy that drew it.
        other_logp: the same samples under the other distribution, same shape.

    Raises:
        ValueError: if the shapes differ.
    """
    own, other = _pair(logp, other_logp)
    log_ratio = other - own
    return back(torch.expm1(log_ratio) - log_ratio, logp, other_logp)


def best_of_n_logprob(ref_logp: Array, p_le: Array, n: float, p_lt: Array | None = None) -> Array:
    """Return log π_BoN(y) = log π_ref(y) + (n−1)·log p_≤(y) + log Σ_{i=1..n} (p_<(y)/p_≤(y))^(i−1).

    It is Eq. 4 of Sessa et al. 2024, arXiv 2407.14622. Without `p_lt` the sum is n, its value where nothing ties and
    no single outcome has weight: right for long texts with real-valued rewards, an over-estimate of up to log n for
    outcomes that tie with much of the mass (0/1 rewards: pass `p_lt`).

    Args:
        ref_logp: log-probability of each sample under the reference.
        p_le: its quantile p_≤ in [0, 1], same shape. An estimate of 0 gives −inf for n > 1; pass the exponential of
            `log_quantile(..., method="harmonic")` or `"clamped"` to avoid that.
        n: order, a real number >= 1.
        p_lt: its quantile p_<, at most p_≤, same shape (`quantile(..., strict=True)`); exact distribution with ties.

    Raises:
        ValueError: if the shapes differ, a quantile leaves [0, 1] or is NaN, p_lt exceeds p_le, or n < 1.
    """
    order = check_order(n)
    ref, p = to_float64(ref_logp, "ref_logp"), _quantiles(p_le, "p_le")
    check_same_shape(ref, "ref_logp", p, "p_le")
    tied_share = torch.zeros_like(p)
    if p_lt is not None:
        below = _quantiles(p_lt, "p_lt")
        check_same_shape(p, "p_le", below, "p_lt")
        if bool((below > p).any()):
            raise ValueError("p_lt must not exceed p_le: it leaves out what ties")
        # p = 0 has no ties to count.
        tied_share = torch.where(p > 0, (p - below) / p, tied_share)
    # xlogy: at n = 1 the quantile has no effect, even where it is 0.
    exponent = torch.tensor(order - 1.0, dtype=torch.float64)
    return back(ref + torch.xlogy(exponent, p) + log_collisions(tied_share, order), ref_logp, p_le)


def forward_kl(logp: Array, ref_logp: Array, p_le: Array, n: float, p_lt: Array | None = None) -> Array:
    """Return the terms of KL(Best-of-N ‖ policy), for samples drawn from **Best-of-N of the reference**.

    `log π_BoN(y) − log π(y)` with `best_of_n_logprob`; it inherits the bias of the estimated quantile.

    Args:
        logp: log-probability of each Best-of-N winner under the policy.
        ref_logp: the same under the reference.
        p_le: the winner's quantile among *other* reference samples (counting itself biases it upwards).
        n: order, a real number >= 1.
        p_lt: its strict quantile, where rewards tie.

    Raises:
        ValueError: as `best_of_n_logprob`, and if the shapes differ.
    """
    own, target = _pair(logp, best_of_n_logprob(ref_logp, p_le, n, p_lt))
    return back(target - own, logp, ref_logp, p_le)


def backward_kl(logp: Array, ref_logp: Array, p_le: Array, n: float, p_lt: Array | None = None) -> Array:
    """Return the terms of KL(policy ‖ Best-of-N), for samples drawn from **the policy**.

    `log π(y) − log π_BoN(y)` with `best_of_n_logprob`; it inherits the bias of the estimated quantile, and is inf for a
    sample below all reference samples if its p_le is 0.

    Args:
        logp: log-probability of each policy sample under the policy.
        ref_logp: the same under the reference.
        p_le: its quantile among reference samples.
        n: order, a real number >= 1.
        p_lt: its strict quantile, where rewards tie.

    Raises:
        ValueError: as `best_of_n_logprob`, and if the shapes differ.
    """
    own, target = _pair(logp, best_of_n_logprob(ref_logp, p_le, n, p_lt))
    return back(own - target, logp, ref_logp, p_le)


def _pair(logp: object, other_logp: object) -> tuple[torch.Tensor, torch.Tensor]:
    own, other = to_float64(logp, "logp"), to_float64(other_logp, "other_logp")
    check_same_shape(own, "logp", other, "other_logp")
    return own, other


def _quantiles(values: object, name: str) -> torch.Tensor:
    p = to_float64(values, name)
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(f"{name} must lie in [0, 1]; it holds quantiles, not their logarithms")
    return p
