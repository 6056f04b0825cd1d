"""Exact expected gradient and fixed point of `objectives.Listwise` on a finite outcome space.

As in `tabular`: the policy is a softmax over K outcomes, gradients are with respect to its logits, to be *descended*.
For M samples of the anchor, only the number of times that each outcome occurs matters: a sum over C(K + M - 1, M)
cases.

Shape suffixes: K outcomes, J cases.
"""

import torch
from torch import Tensor

from bondlm.bestofn._arrays import Array, back, check_order
from bondlm.bestofn.distribution import best_of_n_probs
from bondlm.bestofn.oracle.tables import (
    cases_of_draws,
    dense_newton_step,
    newton,
    policy_and,
    positive_probs,
    rewards_beside,
)


def listwise_gradient(logits: Array, anchor_probs: Array, rewards: Array, n: float, num_samples: int) -> Array:
    """Return the expected gradient of one `Listwise` step: E[share of the policy] - E[share of Best-of-n].

    Both are shares (K,) of outcomes among the M samples: of softmax(log pi / anchor), and of Best-of-n of draws from
    them.

    Args:
        logits: (..., K) logits of the policy.
        anchor_probs: (..., K) probabilities of the anchor, none of them zero.
        rewards: (..., K) finite rewards.
        n: order of Best-of-n, a real number >= 1.
        num_samples: M samples of a prompt, at least 1.

    Raises:
        ValueError: if the shapes differ, or an input is not valid.
    """
    logp_K, anchor_K = policy_and(logits, anchor_probs, "anchor_probs", positive=True)
    counts_JK, weight_J = cases_of_draws(anchor_K, num_samples)
    wanted_K = _best_share(counts_JK, weight_J, rewards_beside(anchor_K, rewards), n)
    share_JK = _policy_share(logp_K - anchor_K.log(), counts_JK)
    return back(_mean(weight_J, share_JK) - wanted_K, logits, anchor_probs, rewards)


def listwise_fixed_point(anchor_probs: Array, rewards: Array, n: float, num_samples: int) -> Array:
    """Return the policy at which `listwise_gradient` vanishes, for an anchor that does not move.

    It is unique, as the loss is convex in log pi / anchor. It is near Best-of-n, and tends to it as M grows.

    Args:
        anchor_probs: (..., K) probabilities of the anchor, none of them zero.
        rewards: (..., K) finite rewards.
        n: order of Best-of-n, a real number >= 1.
        num_samples: M samples of a prompt, at least 2.

    Raises:
        ValueError: if the shapes differ, or an input is not valid.
        RuntimeError: if Newton's method does not converge.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be >= 2: one sample compares with nothing; got {num_samples!r}")
    anchor_K = positive_probs(anchor_probs, "anchor_probs")
    rewards_K = rewards_beside(anchor_K, rewards)
    counts_JK, weight_J = cases_of_draws(anchor_K, num_samples)
    wanted_K = _best_share(counts_JK, weight_J, rewards_K, n)

    def share(logits_K: Tensor) -> Tensor:
        return _policy_share(logits_K - anchor_K.log(), counts_JK)

    def gradient(logits_K: Tensor) -> Tensor:
        return _mean(weight_J, share(logits_K)) - wanted_K

    def step(logits_K: Tensor, gradient_K: Tensor) -> Tensor:
        share_JK = share(logits_K)
        products_KK = (weight_J.unsqueeze(-1) * share_JK).mT @ share_JK
        hessian_KK = torch.diag_embed(_mean(weight_J, share_JK)) - products_KK
        return dense_newton_step(hessian_KK, gradient_K)

    start_K = (0.5 * best_of_n_probs(anchor_K, rewards_K, n) + 0.5 * anchor_K).log()
    return back(newton(start_K, gradient, step), anchor_probs, rewards)


def _mean(weight_J: Tensor, share_JK: Tensor) -> Tensor:
    return (weight_J.unsqueeze(-1) * share_JK).sum(-2)


def _policy_share(log_ratio_K: Tensor, counts_JK: Tensor) -> Tensor:
    """Softmax of the samples' log-ratios, summed over the samples of each outcome (..., J, K)."""
    share_JK: Tensor = (counts_JK.log() + log_ratio_K.unsqueeze(-2)).softmax(-1)
    return share_JK


def _best_share(counts_JK: Tensor, weight_J: Tensor, rewards_K: Tensor, n: float) -> Tensor:
    """Mean share (..., K) of Best-of-n of the empirical distribution: a level's mass, split among its samples."""
    order, num_samples = check_order(n), counts_JK[0].sum()
    same_KK = (rewards_K.unsqueeze(-1) == rewards_K.unsqueeze(-2)).double()
    at_most_KK = (rewards_K.unsqueeze(-1) >= rewards_K.unsqueeze(-2)).double()
    level_JK, at_most_JK = counts_JK @ same_KK, counts_JK @ at_most_KK.mT  # counts of ties, and of those at most equal
    mass_JK = (at_most_JK / num_samples) ** order - ((at_most_JK - level_JK) / num_samples) ** order
    return _mean(weight_J, mass_JK * counts_JK / level_JK.clamp(min=1.0))
