"""The exact Best-of-N distribution on a finite outcome space, ties included.

Best-of-N draws N outcomes from the reference and keeps the first one that reaches the highest reward. Breaking ties
uniformly at random gives the same distribution.

Shape suffixes: K outcomes. Leading batch dimensions (prompts) are allowed everywhere.
"""

import math

import torch

from bondlm.bestofn._arrays import Array, back, check_finite, check_order, check_probs, check_same_shape, to_float64


def best_of_n_probs(ref_probs: Array, rewards: Array, n: float) -> Array:
    """Return the probability of each outcome under Best-of-N of the reference.

    `π_BoN(y) = π_ref(y) · (p_≤^n − p_<^n) / (p_≤ − p_<)`, where p_≤ and p_< are the reference's probabilities of a
    reward at most, and below, that of y. Equal to Sessa et al. 2024, arXiv 2407.14622, Eq. 4, where rewards are
    distinct. It is computed by reward level: the level's Best-of-N mass is shared in proportion to `ref_probs`.

    Args:
        ref_probs: (..., K) reference probabilities, summing to 1 over K (to within 1e-4; they are normalised).
        rewards: (..., K) finite rewards; equal rewards are ties.
        n: order, a real number >= 1. A fractional order is the smooth continuation `F -> F^n` of the reward's CDF.

    Returns:
        (..., K) probabilities. `n = 1` and "all rewards tied" give the reference; an outcome that the reference never
        draws stays at zero.

    Raises:
        ValueError: on wrong shapes, probabilities that are not a distribution, rewards that are not finite, n < 1.
    """
    order = check_order(n)
    probs_K, slots_K, mass_K = _levels(ref_probs, rewards)
    log_ratio_K = _log_level_ratio(mass_K, order)
    result_K = probs_K * log_ratio_K.gather(-1, slots_K).exp()
    return back(result_K, ref_probs, rewards)


def best_of_n_kl(ref_probs: Array, rewards: Array, n: float) -> Array:
    """Return the exact KL(Best-of-N ‖ reference) in nats.

    `Σ_levels B_l · log(B_l / m_l)`, with m_l the reference's mass of reward level l and B_l its Best-of-N mass. It
    never exceeds `kl_bound(n)`; ties and likely outcomes make it smaller.

    Args:
        ref_probs: (..., K) reference probabilities.
        rewards: (..., K) finite rewards.
        n: order, a real number >= 1.

    Returns:
        (...) KL in nats, 0-dim (`numpy.float64` for numpy input) without batch dimensions. Zero for `n = 1`.

    Raises:
        ValueError: as `best_of_n_probs`.
    """
    order = check_order(n)
    _, _, mass_K = _levels(ref_probs, rewards)
    log_ratio_K = _log_level_ratio(mass_K, order)
    kl = (mass_K * log_ratio_K.exp() * log_ratio_K).sum(-1)
    # Rounding leaves about -1e-16 where the two distributions are equal (n = 1, or one level).
    return back(kl.clamp(min=0.0), ref_probs, rewards)


def kl_bound(n: float) -> float:
    """Return `log n − (n−1)/n` nats, the KL(Best-of-N ‖ reference) of continuous rewards and a bound for all others.

    Source: Beirami et al. 2024, arXiv 2401.01879.

    Raises:
        ValueError: if n is not a finite real number >= 1.
    """
    order = check_order(n)
    return math.log(order) - (order - 1.0) / order


def log_collisions(tied_share: torch.Tensor, n: float) -> torch.Tensor:
    """Return log Σ_{i=1..n} ρ^(i−1), ρ = p_</p_≤: the logarithm of term (B) of Sessa et al. 2024, Eq. 4.

    It equals log[(1−ρ^n) / (1−ρ)], which also serves fractional n. It lies between 0 (ρ = 0: nothing is worse) and
    log n (ρ = 1: nothing ties, as with continuous rewards).

    Args:
        tied_share: 1 − ρ in [0, 1], float64: the share of p_≤ that ties. Passed instead of ρ because a small share
            would be lost in 1 − ρ.
        n: order, a real number >= 1.
    """
    share = tied_share.clamp(min=torch.finfo(tied_share.dtype).tiny)  # no tie: the limit, log n, without 0/0
    return torch.log(-torch.expm1(n * torch.log1p(-share)) / share)


def _levels(ref_probs: object, rewards: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check the inputs and group outcomes by reward.

    Returns:
        The probabilities (..., K), the slot of each outcome's reward level (..., K), and the mass of each slot
        (..., K) in increasing order of reward. A level's slot is the sorted position of its first outcome; the other
        slots are empty and have mass 0.
    """
    probs_K = check_probs(to_float64(ref_probs, "ref_probs"), "ref_probs")
    rewards_K = to_float64(rewards, "rewards")
    check_same_shape(probs_K, "ref_probs", rewards_K, "rewards")
    check_finite(rewards_K, "rewards")
    rewards_K = rewards_K.contiguous()
    slots_K = torch.searchsorted(rewards_K.sort(-1).values, rewards_K)
    return probs_K, slots_K, torch.zeros_like(probs_K).scatter_add(-1, slots_K, probs_K)


def _log_level_ratio(mass_K: torch.Tensor, n: float) -> torch.Tensor:
    """Return log(B_l / m_l), Best-of-N mass over reference mass of each slot; 0 where the slot is empty.

    `p_≤^n − p_<^n = p_≤^n · (1 − (1 − m/p_≤)^n)` in logarithms: no cancellation for a level of tiny mass.
    """
    p_le_K = mass_K.cumsum(-1)
    above_K = torch.zeros_like(mass_K)
    above_K[..., :-1] = mass_K[..., 1:].flip(-1).cumsum(-1).flip(-1)
    # Near 1 the mass above is more precise than p_≤ itself, which matters for large n.
    log_p_le_K = torch.where(p_le_K < 0.5, p_le_K.log(), torch.log1p(-above_K))
    log_best_K = n * log_p_le_K + torch.log(-torch.expm1(n * torch.log1p(-mass_K / p_le_K)))
    # Empty slots give log(0) or 0/0 above.
    return torch.where(mass_K > 0, log_best_K - mass_K.log(), torch.zeros_like(mass_K))
