"""The oracle: exact gradients and fixed points of BOND and J-BOND on a finite outcome space.

The policy is a softmax over K outcomes; leading batch dimensions are prompts. Every expectation over samples is a
finite sum here, so a loss or a trainer can be checked against these functions with no sampling error. Gradients are
with respect to the policy's logits, to be *descended*.

All of them follow from two facts: E_{y~q}[∇ log π(y)] = q − π, and E_{y~π}[f(y) ∇ log π(y)] = π · (f − E_π f).

Shape suffixes: K outcomes.
"""

import torch

from bondlm.bestofn._arrays import Array, back, check_finite, check_order, check_probs, check_same_shape, to_float64
from bondlm.bestofn.distribution import best_of_n_probs
from bondlm.bestofn.oracle.tables import (
    check_weights,
    fixed_point,
    mixed_gradient,
    policy_and,
    positive_probs,
    score_gradient,
)
from bondlm.bestofn.quantiles import two_level_penalty


def kl_divergence(probs: Array, other_probs: Array) -> Array:
    """Return the exact KL(p‖q) in nats over the last dimension; inf where p has mass that q misses.

    Args:
        probs: (..., K) probabilities p.
        other_probs: (..., K) probabilities q.

    Raises:
        ValueError: if either is not a distribution, or the shapes differ.
    """
    p_K, q_K = (check_probs(to_float64(x, name), name) for x, name in ((probs, "probs"), (other_probs, "other_probs")))
    check_same_shape(p_K, "probs", q_K, "other_probs")
    terms_K = torch.where(p_K > 0, p_K * (p_K.log() - q_K.log()), torch.zeros_like(p_K))
    # Rounding leaves about -1e-16 for equal distributions.
    return back(terms_K.sum(-1).clamp(min=0.0), probs, other_probs)


def iterated_best_of_n(ref_probs: Array, rewards: Array, n: float, times: int) -> Array:
    """Apply Best-of-n `times` times, each to the distribution before it.

    Equal to Best-of-(n^times) of the reference (Sessa et al. 2024, arXiv 2407.14622, Eq. 16), ties included.

    Args:
        ref_probs: (..., K) probabilities.
        rewards: (..., K) finite rewards.
        n: order of one round, a real number >= 1.
        times: number of rounds; 0 gives the reference.

    Raises:
        ValueError: as `best_of_n_probs`, or if `times` is negative.
    """
    if times < 0:
        raise ValueError(f"times must be 0 or more; got {times!r}")
    probs_K = check_probs(to_float64(ref_probs, "ref_probs"), "ref_probs")
    rewards_K = to_float64(rewards, "rewards")
    for _ in range(times):
        probs_K = best_of_n_probs(probs_K, rewards_K, n)
    return back(probs_K, ref_probs, rewards)


def forward_kl_gradient(logits: Array, target: Array) -> Array:
    """Return ∇ KL(target‖π) = π − target (Sessa et al. 2024, Eq. 13, in expectation).

    Args:
        logits: (..., K) logits of the policy.
        target: (..., K) probabilities.

    Raises:
        ValueError: if the shapes differ or an input is not valid.
    """
    logp_K, target_K = policy_and(logits, target, "target")
    return back(logp_K.exp() - target_K, logits, target)


def backward_kl_gradient(logits: Array, target: Array) -> Array:
    """Return ∇ KL(π‖target) = E_π[∇ log π · (log π − log target)] (Sessa et al. 2024, Eq. 15, exactly normalised).

    Args:
        logits: (..., K) logits of the policy.
        target: (..., K) probabilities, none of them zero.

    Raises:
        ValueError: if the shapes differ, an input is not valid, or the target has a zero (the KL is then infinite).
    """
    logp_K, target_K = policy_and(logits, target, "target", positive=True)
    return back(score_gradient(logp_K, logp_K - target_K.log()), logits, target)


def jeffreys_gradient(logits: Array, target: Array, beta: float) -> Array:
    """Return ∇ [(1−β)·KL(target‖π) + β·KL(π‖target)] (Sessa et al. 2024, Eq. 11).

    Args:
        logits: (..., K) logits of the policy.
        target: (..., K) probabilities, none of them zero unless beta is 0.
        beta: weight of the backward KL, in [0, 1].

    Raises:
        ValueError: as `backward_kl_gradient`, or if beta leaves [0, 1].
    """
    check_weights(beta, 0.0)
    logp_K, target_K = policy_and(logits, target, "target", positive=beta > 0)
    gradient_K = (1.0 - beta) * (logp_K.exp() - target_K)
    if beta > 0:
        gradient_K = gradient_K + beta * score_gradient(logp_K, logp_K - target_K.log())
    return back(gradient_K, logits, target)


def mean_two_level_reward(anchor_probs: Array, rewards: Array, k: int = 2) -> Array:
    """Return the mean of J-BOND's two-level reward of each outcome over k anchor samples.

    `2^k log ½ · (1 − p_≤)^k`: the penalty times the chance that all k samples are strictly better (Sessa et al. 2024,
    Eq. 17 with the strict comparison; −log 16 · (1 − p_≤)² at k = 2).

    Args:
        anchor_probs: (..., K) probabilities.
        rewards: (..., K) finite rewards.
        k: number of anchor samples.

    Raises:
        ValueError: if the shapes differ, an input is not valid, or k is not in 1..1023.
    """
    anchor_K = check_probs(to_float64(anchor_probs, "anchor_probs"), "anchor_probs")
    rewards_K = to_float64(rewards, "rewards")
    check_same_shape(anchor_K, "anchor_probs", rewards_K, "rewards")
    check_finite(rewards_K, "rewards")
    ordered_K, order_K = rewards_K.sort(-1)
    # Mass of the outcomes from each sorted position upwards, and 0 above the last.
    tail_K = anchor_K.gather(-1, order_K).flip(-1).cumsum(-1).flip(-1)
    tail_K = torch.cat([tail_K, torch.zeros_like(tail_K[..., :1])], dim=-1)
    above_K = tail_K.gather(-1, torch.searchsorted(ordered_K, rewards_K.contiguous(), right=True))
    return back(two_level_penalty(k) * above_K**k, anchor_probs, rewards)


def jbond_gradient(
    logits: Array, anchor_probs: Array, rewards: Array, beta: float, gamma: float, k: int = 2, n: float = 2.0
) -> Array:
    """Return the expected gradient of one J-BOND step (Sessa et al. 2024, Algorithm 2), to be descended.

    `(1−β)·G_FW + β·G_BW + γ·G_Reg` with, in expectation over the anchor's and the policy's samples,

    - G_FW = −E_{y~Best-of-n of the anchor}[∇ log π(y)];
    - G_BW = −E_{y~π}[∇ log π(y) · ((n−1)·r(y) − (log π(y) − log π_anchor(y)))], r = `mean_two_level_reward`;
    - G_Reg = +∇ KL(π‖π_anchor). Algorithm 2 prints the opposite sign, which contradicts the paper's own Eq. 19.

    The paper has n = 2 and k = 2. For other orders the factor n−1 comes from Eq. 15, so that both parts aim at the same
    Best-of-n.

    Args:
        logits: (..., K) logits of the policy.
        anchor_probs: (..., K) probabilities of the anchor, none of them zero.
        rewards: (..., K) finite rewards; equal rewards are ties.
        beta: weight of the backward part, in [0, 1].
        gamma: weight of the KL to the anchor, >= 0.
        k: number of anchor samples behind the two-level reward.
        n: order of Best-of-n, a real number >= 1.

    Returns:
        (..., K) gradient with respect to the logits; it sums to 0 over K.

    Raises:
        ValueError: if the shapes differ, or an input is not valid.
    """
    check_weights(beta, gamma)
    logp_K, anchor_K = policy_and(logits, anchor_probs, "anchor_probs", positive=True)
    rewards_K = to_float64(rewards, "rewards")
    reward_K = (check_order(n) - 1.0) * mean_two_level_reward(anchor_K, rewards_K, k)
    gradient_K = mixed_gradient(logp_K, anchor_K, best_of_n_probs(anchor_K, rewards_K, n), reward_K, beta, gamma)
    return back(gradient_K, logits, anchor_probs, rewards)


def jbond_backward_target(anchor_probs: Array, rewards: Array, k: int = 2, n: float = 2.0) -> Array:
    """Return the fixed point of only J-BOND's backward part: ∝ anchor · exp((n−1) · mean two-level reward).

    At k = n = 2 it is within 0.01 nats of Best-of-2 (both KLs) when rewards are continuous.

    Args:
        anchor_probs: (..., K) probabilities.
        rewards: (..., K) finite rewards.
        k: number of anchor samples behind the two-level reward.
        n: order of Best-of-n, a real number >= 1.

    Raises:
        ValueError: as `mean_two_level_reward`, or if n < 1.
    """
    anchor_K = check_probs(to_float64(anchor_probs, "anchor_probs"), "anchor_probs")
    reward_K = (check_order(n) - 1.0) * mean_two_level_reward(anchor_K, to_float64(rewards, "rewards"), k)
    return back((anchor_K.log() + reward_K).softmax(-1), anchor_probs, rewards)


def jbond_fixed_point(
    anchor_probs: Array, rewards: Array, beta: float, gamma: float, k: int = 2, n: float = 2.0
) -> Array:
    """Return the policy at which `jbond_gradient` vanishes, for an anchor that does not move.

    It is unique, as the objective is convex in the policy's probabilities. `beta = 1`:
    ∝ anchor · exp((n−1)·r / (1+gamma)) in closed form (the KL in the backward part has weight 1, to which gamma is
    added). `beta = 0, gamma = 0`: Best-of-n of the anchor. Otherwise by Newton's method.

    Args:
        anchor_probs: (..., K) probabilities of the anchor, none of them zero.
        rewards: (..., K) finite rewards.
        beta: weight of the backward part, in [0, 1].
        gamma: weight of the KL to the anchor, >= 0.
        k: number of anchor samples behind the two-level reward.
        n: order of Best-of-n, a real number >= 1.

    Returns:
        (..., K) probabilities; the norm of the gradient there is below 1e-12.

    Raises:
        ValueError: if the shapes differ, or an input is not valid.
        RuntimeError: if Newton's method does not converge (a huge k, or probabilities below 1e-100).
    """
    check_weights(beta, gamma)
    anchor_K = positive_probs(anchor_probs, "anchor_probs")
    rewards_K = to_float64(rewards, "rewards")
    best_K = best_of_n_probs(anchor_K, rewards_K, n)
    reward_K = (check_order(n) - 1.0) * mean_two_level_reward(anchor_K, rewards_K, k)
    return back(fixed_point(anchor_K, best_K, reward_K, beta, gamma), anchor_probs, rewards)
