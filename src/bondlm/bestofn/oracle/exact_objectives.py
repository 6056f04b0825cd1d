"""Exact expected gradients and fixed points of every objective on a finite outcome space.

As in `tabular`: the policy is a softmax over K outcomes, gradients are with respect to its logits, to be *descended*.
An estimate from k anchor samples enters through its mean over those samples (`exact_signal`): the gradients are linear
in it.

Shape suffixes: K outcomes.
"""

import torch
from torch import Tensor

from bondlm.bestofn._arrays import Array, back, check_finite, check_probs, check_same_shape, to_float64
from bondlm.bestofn.distribution import best_of_n_probs
from bondlm.bestofn.oracle.exact_signal import Estimate, exact_quantiles, mean_signal
from bondlm.bestofn.oracle.tables import (
    check_weight,
    check_weights,
    dense_newton_step,
    fixed_point,
    mixed_gradient,
    newton,
    policy_and,
    positive_probs,
    score_gradient,
)


def bond_gradient(
    logits: Array,
    anchor_probs: Array,
    rewards: Array,
    n: float,
    beta: float,
    gamma: float = 0.0,
    *,
    estimate: Estimate = "exact",
    k: int | None = None,
    correction: bool = False,
) -> Array:
    """Return the expected gradient of one BOND step (Sessa et al. 2024, Eq. 11, 13 and 15, and the KL of Eq. 19).

    The gradient of (1−β)·KL(Best-of-n‖π) + β·(KL(π‖anchor) − E_π[signal]) + γ·KL(π‖anchor), signal = `mean_signal`.
    β = 0 is Best-of-n fine-tuning; β = 1 with the "smoothed" estimate is vBoN's bound; "jbond" or "harmonic" with
    n = 2 is J-BOND with k anchor samples.

    Args:
        logits: (..., K) logits of the policy.
        anchor_probs: (..., K) probabilities of the anchor, none of them zero.
        rewards: (..., K) finite rewards.
        n: order of Best-of-n, a real number >= 1.
        beta: weight of the backward part, in [0, 1].
        gamma: weight of the KL to the anchor, >= 0.
        estimate: as `mean_signal`.
        k: as `mean_signal`.
        correction: as `mean_signal`.

    Raises:
        ValueError: as `mean_signal`, or if a weight is out of range.
    """
    check_weights(beta, gamma)
    logp_K, anchor_K = policy_and(logits, anchor_probs, "anchor_probs", positive=True)
    rewards_K = to_float64(rewards, "rewards")
    signal_K = mean_signal(anchor_K, rewards_K, n, estimate=estimate, k=k, correction=correction)
    best_K = best_of_n_probs(anchor_K, rewards_K, n)
    return back(mixed_gradient(logp_K, anchor_K, best_K, signal_K, beta, gamma), logits, anchor_probs, rewards)


def bond_fixed_point(
    anchor_probs: Array,
    rewards: Array,
    n: float,
    beta: float,
    gamma: float = 0.0,
    *,
    estimate: Estimate = "exact",
    k: int | None = None,
    correction: bool = False,
) -> Array:
    """Return the policy at which `bond_gradient` vanishes, for an anchor that does not move.

    With γ = 0 it is Best-of-n for every β if the quantiles are exact and corrected, and for β = 0 always; for β = 1 it
    is ∝ anchor · exp(signal). Otherwise it is between these two, found by Newton's method.

    Args:
        anchor_probs: (..., K) probabilities of the anchor, none of them zero.
        rewards: (..., K) finite rewards.
        n: order of Best-of-n, a real number >= 1.
        beta: weight of the backward part, in [0, 1].
        gamma: weight of the KL to the anchor, >= 0.
        estimate: as `mean_signal`.
        k: as `mean_signal`.
        correction: as `mean_signal`.

    Raises:
        ValueError: as `bond_gradient`.
        RuntimeError: if Newton's method does not converge.
    """
    check_weights(beta, gamma)
    anchor_K = positive_probs(anchor_probs, "anchor_probs")
    rewards_K = to_float64(rewards, "rewards")
    signal_K = mean_signal(anchor_K, rewards_K, n, estimate=estimate, k=k, correction=correction)
    best_K = best_of_n_probs(anchor_K, rewards_K, n)
    return back(fixed_point(anchor_K, best_K, signal_K, beta, gamma), anchor_probs, rewards)


def kl_reward_gradient(logits: Array, anchor_probs: Array, rewards: Array, beta_rl: float) -> Array:
    """Return the gradient of −E_π[r] + beta_rl·KL(π‖anchor): that of REINFORCE and of RLOO, for any baseline.

    Args:
        logits: (..., K) logits of the policy.
        anchor_probs: (..., K) probabilities of the anchor, none of them zero.
        rewards: (..., K) finite rewards.
        beta_rl: KL coefficient >= 0, in units of reward per nat.

    Raises:
        ValueError: if the shapes differ, an input is not valid, or beta_rl is negative.
    """
    check_weight("beta_rl", beta_rl, float("inf"))
    logp_K, anchor_K = policy_and(logits, anchor_probs, "anchor_probs", positive=True)
    rewards_K = to_float64(rewards, "rewards")
    check_same_shape(anchor_K, "anchor_probs", rewards_K, "rewards")
    return_K = rewards_K - beta_rl * (logp_K - anchor_K.log())
    return back(-score_gradient(logp_K, return_K), logits, anchor_probs, rewards)


def kl_reward_optimum(anchor_probs: Array, rewards: Array, beta_rl: float) -> Array:
    """Return ∝ anchor · exp(r / beta_rl), where `kl_reward_gradient` vanishes (Sessa et al. 2024, section 3.3).

    Args:
        anchor_probs: (..., K) probabilities.
        rewards: (..., K) finite rewards.
        beta_rl: KL coefficient > 0.

    Raises:
        ValueError: if an input is not valid, or beta_rl is not positive (all mass would go to the best outcome).
    """
    if not 0.0 < beta_rl < float("inf"):
        raise ValueError(f"beta_rl must be positive and finite; got {beta_rl!r}")
    anchor_K = check_probs(to_float64(anchor_probs, "anchor_probs"), "anchor_probs")
    rewards_K = to_float64(rewards, "rewards")
    check_same_shape(anchor_K, "anchor_probs", rewards_K, "rewards")
    check_finite(rewards_K, "rewards")
    return back((anchor_K.log() + rewards_K / beta_rl).softmax(-1), anchor_probs, rewards)


def regression_gradient(
    logits: Array, anchor_probs: Array, rewards: Array, n: float, num_samples: int | None = None
) -> Array:
    """Return the gradient of ½·E_{y~anchor}[(t(y) − log π(y)/anchor(y))²], t the target of `BestOfNRegression`.

    Args:
        logits: (..., K) logits of the policy.
        anchor_probs: (..., K) probabilities of the anchor, none of them zero.
        rewards: (..., K) finite rewards.
        n: order of Best-of-n, a real number >= 1.
        num_samples: M samples of a prompt, so that each target is estimated from M−1; None: exact quantiles.

    Raises:
        ValueError: if the shapes differ, or an input is not valid.
    """
    logp_K, anchor_K = policy_and(logits, anchor_probs, "anchor_probs", positive=True)
    target_K = _mean_target(anchor_K, to_float64(rewards, "rewards"), n, num_samples)
    return back(_regression_gradient(logp_K, anchor_K, target_K), logits, anchor_probs, rewards)


def regression_fixed_point(anchor_probs: Array, rewards: Array, n: float, num_samples: int | None = None) -> Array:
    """Return the policy at which `regression_gradient` vanishes: Best-of-n if the quantiles are exact.

    The mean of an estimated target is not a normalised log-ratio, so with finite `num_samples` the policy is only close
    to Best-of-n.

    Args:
        anchor_probs: (..., K) probabilities of the anchor, none of them zero.
        rewards: (..., K) finite rewards.
        n: order of Best-of-n, a real number >= 1.
        num_samples: as `regression_gradient`.

    Raises:
        ValueError: if the shapes differ, or an input is not valid.
        RuntimeError: if Newton's method does not converge.
    """
    anchor_K = positive_probs(anchor_probs, "anchor_probs")
    target_K = _mean_target(anchor_K, to_float64(rewards, "rewards"), n, num_samples)

    def gradient(logits_K: Tensor) -> Tensor:
        return _regression_gradient(logits_K.log_softmax(-1), anchor_K, target_K)

    def step(logits_K: Tensor, gradient_K: Tensor) -> Tensor:
        logp_K = logits_K.log_softmax(-1)
        probs_K = logp_K.exp()
        excess = (anchor_K * (logp_K - anchor_K.log() - target_K)).sum(-1, keepdim=True)
        cross_KK = anchor_K.unsqueeze(-1) * probs_K.unsqueeze(-2)
        hessian_KK = torch.diag_embed(anchor_K - excess * probs_K) - cross_KK - cross_KK.mT
        hessian_KK = hessian_KK + (1.0 + excess).unsqueeze(-1) * probs_K.unsqueeze(-1) * probs_K.unsqueeze(-2)
        return dense_newton_step(hessian_KK, gradient_K)

    return back(newton(anchor_K.log() + target_K, gradient, step), anchor_probs, rewards)


def bonbon_gradient(logits: Array, anchor_probs: Array, rewards: Array, n: int, alpha: float) -> Array:
    """Return the gradient of α·E[−log π(best)] + (1−α)·E[(h(best) − h(worst) − (n−1)·H_{n−1})²], h = log π/anchor.

    Gui et al. 2024, arXiv 2406.00832; the best and the worst of n anchor samples are two different samples even if all
    tie.

    Args:
        logits: (..., K) logits of the policy.
        anchor_probs: (..., K) probabilities of the anchor, none of them zero.
        rewards: (..., K) finite rewards.
        n: samples, an integer >= 2.
        alpha: weight of the fine-tuning part, in [0, 1].

    Raises:
        ValueError: if the shapes differ, or an input is not valid.
    """
    check_weight("alpha", alpha, 1.0)
    logp_K, anchor_K = policy_and(logits, anchor_probs, "anchor_probs", positive=True)
    pairs_KK = best_and_worst_probs(anchor_K, to_float64(rewards, "rewards"), n)
    return back(_bonbon_gradient(logp_K, anchor_K, pairs_KK, n, alpha), logits, anchor_probs, rewards)


def bonbon_fixed_point(anchor_probs: Array, rewards: Array, n: int, alpha: float) -> Array:
    """Return the policy at which `bonbon_gradient` vanishes: unique, as the objective is convex in the logits.

    Args:
        anchor_probs: (..., K) probabilities of the anchor, none of them zero.
        rewards: (..., K) finite rewards.
        n: samples, an integer >= 2.
        alpha: weight of the fine-tuning part, in [0, 1].

    Raises:
        ValueError: if the shapes differ, or an input is not valid.
        RuntimeError: if Newton's method does not converge.
    """
    check_weight("alpha", alpha, 1.0)
    anchor_K = positive_probs(anchor_probs, "anchor_probs")
    pairs_KK = best_and_worst_probs(anchor_K, to_float64(rewards, "rewards"), n)
    both_KK = pairs_KK + pairs_KK.mT
    laplacian_KK = torch.diag_embed(both_KK.sum(-1)) - both_KK

    def gradient(logits_K: Tensor) -> Tensor:
        return _bonbon_gradient(logits_K.log_softmax(-1), anchor_K, pairs_KK, n, alpha)

    def step(logits_K: Tensor, gradient_K: Tensor) -> Tensor:
        probs_K = logits_K.softmax(-1)
        variance_KK = torch.diag_embed(probs_K) - probs_K.unsqueeze(-1) * probs_K.unsqueeze(-2)
        return dense_newton_step(alpha * variance_KK + 2.0 * (1.0 - alpha) * laplacian_KK, gradient_K)

    return back(newton(anchor_K.log(), gradient, step), anchor_probs, rewards)


def best_and_worst_probs(anchor_probs: Array, rewards: Array, n: int) -> Array:
    """Joint distribution (..., K, K) of the best (rows) and worst (columns) of n samples; ties are broken at random.

    The probability that all samples are in a range of reward levels is the range's mass to the power n; differences of
    these give the levels of both. Inside its level each is drawn in proportion to the anchor. If all n tie, they are
    two different samples.

    Args:
        anchor_probs: (..., K) probabilities.
        rewards: (..., K) finite rewards.
        n: samples, an integer >= 2.

    Raises:
        ValueError: if the shapes differ, or an input is not valid.
    """
    if int(n) != n or n < 2:
        raise ValueError(f"n must be an integer >= 2; got {n!r}")
    p_lt_K, p_le_K = exact_quantiles(anchor_probs, rewards)
    anchor_K = check_probs(to_float64(anchor_probs, "anchor_probs"), "anchor_probs")
    rewards_K = to_float64(rewards, "rewards")

    def within(upper_K: Tensor, lower_K: Tensor) -> Tensor:
        """Probability that all n are in the range; 0 where it is empty."""
        return (upper_K.unsqueeze(-1) - lower_K.unsqueeze(-2)).clamp(min=0.0) ** n

    levels_KK = within(p_le_K, p_lt_K) - within(p_lt_K, p_lt_K) - within(p_le_K, p_le_K) + within(p_lt_K, p_le_K)
    is_tied_KK = rewards_K.unsqueeze(-1) == rewards_K.unsqueeze(-2)
    mass_K = (is_tied_KK * anchor_K.unsqueeze(-2)).sum(-1)  # p_≤ - p_< would be 0 for a level of tiny mass
    share_K = torch.where(anchor_K > 0, anchor_K / mass_K, torch.zeros_like(anchor_K))
    pairs_KK = levels_KK.clamp(min=0.0) * share_K.unsqueeze(-1) * share_K.unsqueeze(-2)  # clamp: rounding, about 1e-16
    return back(pairs_KK, anchor_probs, rewards)


def _bonbon_gradient(logp_K: Tensor, anchor_K: Tensor, pairs_KK: Tensor, n: int, alpha: float) -> Tensor:
    margin = (n - 1) * sum(1.0 / i for i in range(1, n))
    log_ratio_K = logp_K - anchor_K.log()
    error_KK = pairs_KK * (log_ratio_K.unsqueeze(-1) - log_ratio_K.unsqueeze(-2) - margin)
    forward_K = logp_K.exp() - pairs_KK.sum(-1)
    return alpha * forward_K + 2.0 * (1.0 - alpha) * (error_KK.sum(-1) - error_KK.sum(-2))


def _regression_gradient(logp_K: Tensor, anchor_K: Tensor, target_K: Tensor) -> Tensor:
    weighted_K = anchor_K * (logp_K - anchor_K.log() - target_K)
    return weighted_K - logp_K.exp() * weighted_K.sum(-1, keepdim=True)


def _mean_target(anchor_K: Tensor, rewards_K: Tensor, n: float, num_samples: int | None) -> Tensor:
    if num_samples is None:
        return mean_signal(anchor_K, rewards_K, n, correction=True)
    return mean_signal(anchor_K, rewards_K, n, estimate="harmonic", k=num_samples - 1, correction=True)
