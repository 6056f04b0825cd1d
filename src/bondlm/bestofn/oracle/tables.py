"""Helpers of the exact oracle: gradients of a softmax policy over K outcomes, and Newton's method.

Shape suffixes: K outcomes. All inputs are float64 and already checked.
"""

import math
from collections.abc import Callable
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from bondlm.bestofn._arrays import check_finite, check_probs, check_same_shape, to_float64

_GRADIENT_TOLERANCE = 1e-12
_MAX_NEWTON_STEPS = 200
_LOG_TOLERANCE, _MAX_NATURAL_STEPS, _LOST = 1e-11, 20_000, 1e4


def score_gradient(logp_K: Tensor, values_K: Tensor) -> Tensor:
    """Return E_π[f ∇ log π] = π · (f − E_π f)."""
    probs_K = logp_K.exp()
    return probs_K * (values_K - (probs_K * values_K).sum(-1, keepdim=True))


def mixed_gradient(
    logp_K: Tensor, anchor_K: Tensor, best_K: Tensor, reward_K: Tensor, beta: float, gamma: float
) -> Tensor:
    """Return the gradient of (1−β)·KL(best‖π) + β·(KL(π‖anchor) − E_π[reward]) + γ·KL(π‖anchor)."""
    log_ratio_K = logp_K - anchor_K.log()
    forward_K = logp_K.exp() - best_K
    backward_K = -score_gradient(logp_K, reward_K - log_ratio_K)
    return (1.0 - beta) * forward_K + beta * backward_K + gamma * score_gradient(logp_K, log_ratio_K)


def fixed_point(anchor_K: Tensor, best_K: Tensor, reward_K: Tensor, beta: float, gamma: float) -> Tensor:
    """Return the policy at which `mixed_gradient` vanishes: unique, as the objective is convex in probabilities.

    Raises:
        RuntimeError: if Newton's method does not converge.
    """
    if beta + gamma == 0:
        return best_K
    tilted_K = (anchor_K.log() + beta / (beta + gamma) * reward_K).softmax(-1)
    # beta = 1 needs no search; otherwise start between the optima of the two parts.
    start_K = ((1.0 - beta) * best_K + beta * tilted_K).log()
    return newton(
        start_K,
        lambda logits_K: mixed_gradient(logits_K.log_softmax(-1), anchor_K, best_K, reward_K, beta, gamma),
        lambda logits_K, gradient_K: _newton_step(logits_K, gradient_K, (1.0 - beta) * best_K, beta + gamma),
    )


def newton(logits_K: Tensor, gradient: Callable[[Tensor], Tensor], step: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the probabilities at which the gradient's norm is below 1e-12.

    Raises:
        RuntimeError: if that takes more than 200 steps.
    """
    for _ in range(_MAX_NEWTON_STEPS):
        gradient_K = gradient(logits_K)
        if float(gradient_K.norm(dim=-1).max()) < _GRADIENT_TOLERANCE:
            return logits_K.softmax(-1)
        logits_K = logits_K + step(logits_K, gradient_K)
    raise RuntimeError(
        f"no fixed point found: gradient norm {float(gradient_K.norm(dim=-1).max()):.3g} after {_MAX_NEWTON_STEPS} "
        "Newton steps; use a smaller k or n, or less extreme anchor_probs"
    )


def resting_point(start_K: Tensor, wanted: Callable[[Tensor], Tensor]) -> Tensor:
    """Return probabilities whose logarithm equals `wanted` at themselves, up to a constant, by natural-gradient steps.

    For forces that depend on the policy, where no objective is minimised. Each step goes half of the way; if that runs
    in circles, a tenth, then a fiftieth.

    Raises:
        RuntimeError: if that takes more than 20,000 steps.
    """
    for rate in (0.5, 0.1, 0.02):
        logp_K, error = start_K, math.inf
        for _ in range(_MAX_NATURAL_STEPS):
            step_K = wanted(logp_K).log_softmax(-1) - logp_K
            error = float(step_K.abs().max())
            if error < _LOG_TOLERANCE:
                return logp_K.exp()
            if not error < _LOST:
                break
            logp_K = (logp_K + rate * step_K).log_softmax(-1)
    raise RuntimeError(f"no fixed point found: log-probabilities are off by {error:.3g}; use a smaller n")


def dense_newton_step(hessian_KK: Tensor, gradient_K: Tensor) -> Tensor:
    """Return −H⁻¹·gradient, capped at 1 (a factor e in probability), for a Hessian whose null vector is constant."""
    num_outcomes = gradient_K.shape[-1]
    step_K: Tensor = -torch.linalg.solve(hessian_KK + 1.0 / num_outcomes, gradient_K)
    return step_K / step_K.abs().amax(-1, keepdim=True).clamp(min=1.0)


def cases_of_draws(probs_K: Tensor, num_draws: int) -> tuple[Tensor, Tensor]:
    """All ways to distribute the draws over K outcomes: counts (J, K), and the probability (..., J) of each."""
    num_outcomes = probs_K.shape[-1]
    # From itertools, since torch.combinations makes all K^m tuples first.
    cases = torch.tensor(list(combinations_with_replacement(range(num_outcomes), num_draws)), device=probs_K.device)
    counts_JK = torch.nn.functional.one_hot(cases, num_outcomes).sum(1).double()
    ways_J = math.factorial(num_draws) / torch.lgamma(counts_JK + 1.0).sum(-1).exp()
    return counts_JK, ways_J * (probs_K.unsqueeze(-2) ** counts_JK).prod(-1)


def policy_and(logits: object, probs: object, name: str, *, positive: bool = False) -> tuple[Tensor, Tensor]:
    """Check both; return the policy's log-probabilities and the other distribution's probabilities."""
    logits_K = to_float64(logits, "logits")
    probs_K = check_probs(to_float64(probs, name), name)
    check_same_shape(logits_K, "logits", probs_K, name)
    check_finite(logits_K, "logits")
    if positive and bool((probs_K == 0).any()):
        raise ValueError(f"{name} must be positive for every outcome: the KL of a softmax policy to it is infinite")
    return logits_K.log_softmax(-1), probs_K


def positive_probs(probs: object, name: str) -> Tensor:
    """Check probabilities, none of which may be zero."""
    probs_K = check_probs(to_float64(probs, name), name)
    if bool((probs_K == 0).any()):
        raise ValueError(f"{name} must be positive for every outcome: the KL to the anchor is infinite otherwise")
    return probs_K


def rewards_beside(anchor_K: Tensor, rewards: object) -> Tensor:
    """Check rewards: finite, one for each outcome of the anchor."""
    rewards_K = to_float64(rewards, "rewards")
    check_same_shape(anchor_K, "anchor_probs", rewards_K, "rewards")
    check_finite(rewards_K, "rewards")
    return rewards_K


def check_weights(beta: float, gamma: float) -> None:
    """Raise ValueError unless beta is in [0, 1] and gamma is >= 0 and finite."""
    check_weight("beta", beta, 1.0)
    check_weight("gamma", gamma, float("inf"))


def check_weight(name: str, value: float, most: float) -> None:
    """Raise ValueError unless `value` is finite and in [0, most]."""
    if not (0.0 <= value <= most and value < float("inf")):
        raise ValueError(f"{name} must be in [0, {most:g}] and finite; got {value!r}")


def _newton_step(logits_K: Tensor, gradient_K: Tensor, forward_K: Tensor, strength: float) -> Tensor:
    """Return a damped Newton step in log π for the convex objective over probabilities that sum to 1.

    Its Hessian in π is diagonal, `forward/π² + strength/π`, so the step of `log π` is `−(gradient − ν·π)` over
    `curvature = forward + strength·π`, up to the constant ν that keeps the sum at 1. Steps are capped at 1 (a factor
    e).
    """
    probs_K = logits_K.softmax(-1)
    curvature_K = forward_K + strength * probs_K
    # Σ π·step = 0 fixes ν; the gradient in logits is π·(∂F/∂π − mean), which this constant absorbs.
    ratio_K = probs_K / curvature_K
    nu = (ratio_K * gradient_K).sum(-1, keepdim=True) / (ratio_K * probs_K).sum(-1, keepdim=True)
    step_K = -(gradient_K - nu * probs_K) / curvature_K
    return step_K / step_K.abs().amax(-1, keepdim=True).clamp(min=1.0)
