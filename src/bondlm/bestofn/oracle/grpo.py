"""Exact expected gradient and fixed point of `objectives.GRPO` on a finite outcome space.

As in `tabular`: the policy is a softmax over K outcomes, gradients are with respect to its logits, to be *descended*.
The mean over a prompt's m samples is a finite sum: for the other m - 1 samples, only the number of times that each
outcome occurs matters, a multinomial distribution over C(K + m - 2, m - 1) cases.

Shape suffixes: K outcomes, J cases of the other samples.
"""

from typing import Literal

from torch import Tensor

from bondlm.bestofn._arrays import Array, back
from bondlm.bestofn.oracle.tables import (
    cases_of_draws,
    check_weight,
    policy_and,
    positive_probs,
    resting_point,
    rewards_beside,
    score_gradient,
)

Scale = Literal["group", "none"]
_STD_FLOOR = 1e-4


def grpo_gradient(
    logits: Array, anchor_probs: Array, rewards: Array, beta_rl: float, num_samples: int, scale: Scale = "group"
) -> Array:
    """Return the expected gradient of one `GRPO` step: -E_pi[(E[A | y] - beta_rl log pi / anchor) grad log pi].

    E[A | y] is the mean advantage of y among m - 1 other samples of the policy. It depends on the policy but is treated
    as constant, as in the objective, so this is not the gradient of a scalar.

    Args:
        logits: (..., K) logits of the policy.
        anchor_probs: (..., K) probabilities of the anchor, none of them zero.
        rewards: (..., K) finite rewards.
        beta_rl: KL coefficient >= 0, in units of advantage per nat.
        num_samples: m samples of a prompt, at least 2.
        scale: "group" divides by the std of the prompt's rewards + 1e-4, "none" does not.

    Raises:
        ValueError: if the shapes differ, or an input is not valid.
    """
    check_weight("beta_rl", beta_rl, float("inf"))
    logp_K, anchor_K = policy_and(logits, anchor_probs, "anchor_probs", positive=True)
    advantage_K = _mean_advantage(logp_K.exp(), rewards_beside(anchor_K, rewards), num_samples, scale)
    return_K = advantage_K - beta_rl * (logp_K - anchor_K.log())
    return back(-score_gradient(logp_K, return_K), logits, anchor_probs, rewards)


def grpo_fixed_point(
    anchor_probs: Array, rewards: Array, beta_rl: float, num_samples: int, scale: Scale = "group"
) -> Array:
    """Return the policy at which `grpo_gradient` vanishes, for an anchor that does not move.

    With scale "none" it is ∝ anchor · exp((m-1)/m r / beta_rl). With "group" the reward's scale cancels, and the policy
    satisfies log(pi / anchor) = E[A | y] / beta_rl + constant, where E[A | y] depends on the policy itself.

    Args:
        anchor_probs: (..., K) probabilities of the anchor, none of them zero.
        rewards: (..., K) finite rewards.
        beta_rl: KL coefficient > 0.
        num_samples: as `grpo_gradient`.
        scale: as `grpo_gradient`.

    Raises:
        ValueError: as `grpo_gradient`, or if beta_rl is 0.
        RuntimeError: if the steps do not converge.
    """
    check_weight("beta_rl", beta_rl, float("inf"))
    if beta_rl == 0:
        raise ValueError("beta_rl must be > 0: without a KL the policy never rests")
    anchor_K = positive_probs(anchor_probs, "anchor_probs")
    rewards_K = rewards_beside(anchor_K, rewards)

    def wanted(logp_K: Tensor) -> Tensor:
        return anchor_K.log() + _mean_advantage(logp_K.exp(), rewards_K, num_samples, scale) / beta_rl

    return back(resting_point(anchor_K.log(), wanted), anchor_probs, rewards)


def _mean_advantage(probs_K: Tensor, rewards_K: Tensor, num_samples: int, scale: Scale) -> Tensor:
    """E[A | y] (..., K) of each outcome y, by a sum over how often each outcome occurs among the others."""
    if num_samples < 2 or scale not in ("group", "none"):
        raise ValueError(f"num_samples must be >= 2 and scale 'group' or 'none'; got {num_samples!r}, {scale!r}")
    counts_JK, weight_J = cases_of_draws(probs_K, num_samples - 1)
    mean_JK = ((counts_JK @ rewards_K.unsqueeze(-1)) + rewards_K.unsqueeze(-2)) / num_samples
    advantage_JK = rewards_K.unsqueeze(-2) - mean_JK
    if scale == "group":
        distance_JKK = (rewards_K[..., None, None, :] - mean_JK.unsqueeze(-1)) ** 2  # of outcome k' from y's group
        squares_JK = (counts_JK.unsqueeze(-2) * distance_JKK).sum(-1) + advantage_JK**2
        advantage_JK = advantage_JK / ((squares_JK / (num_samples - 1)).sqrt() + _STD_FLOOR)
    return (weight_J.unsqueeze(-1) * advantage_JK).sum(-2)
