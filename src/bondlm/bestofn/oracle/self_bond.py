"""Exact expected gradient and fixed point of `objectives.SelfBOND` on a finite outcome space.

As in `tabular`: the policy is a softmax over K outcomes, gradients are with respect to its logits, to be *descended*.
The mean over a prompt's M samples is a finite sum: of the M - 2 samples outside a pair, a are below one of the two and
b at its level, a trinomial distribution.

Shape suffixes: K outcomes, M samples of a prompt.
"""

import math

import torch
from torch import Tensor

from bondlm.bestofn._arrays import Array, back, check_finite, check_same_shape, to_float64
from bondlm.bestofn.oracle.exact_signal import exact_quantiles
from bondlm.bestofn.oracle.tables import policy_and, positive_probs, resting_point, score_gradient
from bondlm.bestofn.own_quantiles import OwnQuantile, signal_table, tilt_of_order


def self_bond_signal(
    probs: Array, rewards: Array, n: float, num_samples: int | None, form: OwnQuantile = "tilt"
) -> Array:
    """Return E[s_i - mean of the M signals | y_i = y] of each outcome y, all M samples drawn from `probs`.

    With the mean of the signals subtracted, only pairs of different levels count. Let U_<(y) and U_>(y) be the mean
    signal of y if one other sample is known to be worse, or better; then the result is

        (M-1)/M * sum over y' of probs(y') * [U_<(y) - U_>(y') if y' is worse, U_>(y) - U_<(y') if y' is better].

    Without `num_samples` it is the limit of many samples: log (own share of the level) - log (reference share that
    Best-of-n, or the tilt, has there), and nothing is estimated.

    Args:
        probs: (..., K) probabilities of the policy, all positive.
        rewards: (..., K) finite rewards; equal rewards are ties.
        n: order of Best-of-n, a real number > 1.
        num_samples: M samples of a prompt, at least 2; None: the limit of many samples.
        form: as `own_quantiles.rank_signal`.

    Returns:
        (..., K) nats; its mean under `probs` is 0.

    Raises:
        ValueError: if the shapes differ, or an input is not valid.
    """
    probs_K = positive_probs(probs, "probs")
    rewards_K = _checked_rewards(probs_K, "probs", rewards)
    return back(_signal(probs_K, rewards_K, n, num_samples, form), probs, rewards)


def self_bond_gradient(
    logits: Array, ref_probs: Array, rewards: Array, n: float, num_samples: int | None, form: OwnQuantile = "tilt"
) -> Array:
    """Return the expected gradient of one `SelfBOND` step: -E_pi[(signal - log pi / pi_ref) grad log pi].

    The signal depends on the policy but is treated as constant, as in the objective, so this is not the gradient of a
    scalar.

    Args:
        logits: (..., K) logits of the policy.
        ref_probs: (..., K) probabilities of the reference, none of them zero.
        rewards: (..., K) finite rewards.
        n: as `self_bond_signal`.
        num_samples: as `self_bond_signal`.
        form: as `self_bond_signal`.

    Raises:
        ValueError: as `self_bond_signal`.
    """
    logp_K, ref_K = policy_and(logits, ref_probs, "ref_probs", positive=True)
    signal_K = self_bond_signal(logp_K.exp(), to_float64(rewards, "rewards"), n, num_samples, form)
    return back(-score_gradient(logp_K, signal_K - (logp_K - ref_K.log())), logits, ref_probs, rewards)


def self_bond_fixed_point(
    ref_probs: Array, rewards: Array, n: float, num_samples: int | None, form: OwnQuantile = "tilt"
) -> Array:
    """Return the policy at which `self_bond_gradient` vanishes, by exact natural-gradient steps from the reference.

    Without `num_samples` it is Best-of-n, ties included, or for "tilt" the exponential tilt of the same win rate.

    Args:
        ref_probs: (..., K) probabilities of the reference, none of them zero.
        rewards: (..., K) finite rewards.
        n: as `self_bond_signal`.
        num_samples: as `self_bond_signal`.
        form: as `self_bond_signal`.

    Raises:
        ValueError: as `self_bond_signal`.
        RuntimeError: if the steps do not converge (a huge n for few samples).
    """
    ref_K = positive_probs(ref_probs, "ref_probs")
    rewards_K = _checked_rewards(ref_K, "ref_probs", rewards)

    def wanted(logp_K: Tensor) -> Tensor:
        return ref_K.log() + _signal(logp_K.exp(), rewards_K, n, num_samples, form)

    return back(resting_point(ref_K.log(), wanted), ref_probs, rewards)


def _checked_rewards(probs_K: Tensor, name: str, rewards: object) -> Tensor:
    rewards_K = to_float64(rewards, "rewards")
    check_same_shape(probs_K, name, rewards_K, "rewards")
    check_finite(rewards_K, "rewards")
    return rewards_K


def _signal(probs_K: Tensor, rewards_K: Tensor, n: float, num_samples: int | None, form: OwnQuantile) -> Tensor:
    below_K, at_most_K = exact_quantiles(probs_K, rewards_K)
    if num_samples is None:
        log_ratio_K = torch.log(at_most_K - below_K) - torch.log(_share_between(below_K, at_most_K, n, form))
        return log_ratio_K - (probs_K * log_ratio_K).sum(-1, keepdim=True)
    table_MM = torch.tensor(signal_table(n, num_samples, form), device=probs_K.device)
    others = _trinomial(below_K, at_most_K - below_K, num_samples - 2)
    if_worse_K = torch.stack([weight_K * table_MM[a + 1, b] for (a, b), weight_K in others.items()]).sum(0)
    if_better_K = torch.stack([weight_K * table_MM[a, b] for (a, b), weight_K in others.items()]).sum(0)
    is_worse_KK = rewards_K.unsqueeze(-2) < rewards_K.unsqueeze(-1)
    gain_KK = is_worse_KK * (if_worse_K.unsqueeze(-1) - if_better_K.unsqueeze(-2))
    return (num_samples - 1) / num_samples * ((gain_KK - gain_KK.mT) @ probs_K.unsqueeze(-1)).squeeze(-1)


def _share_between(below_K: Tensor, at_most_K: Tensor, n: float, form: OwnQuantile) -> Tensor:
    """The reference's share of what is between two own quantiles of the policy, if it is Best-of-n or the tilt."""
    if form == "tilt":
        steep = math.expm1(tilt_of_order(n))
        return (torch.log1p(steep * at_most_K) - torch.log1p(steep * below_K)) / math.log1p(steep)
    return at_most_K ** (1.0 / n) - below_K ** (1.0 / n)


def _trinomial(below_K: Tensor, level_K: Tensor, draws: int) -> dict[tuple[int, int], Tensor]:
    """Probability (..., K) of each (a, b): a of the draws below, b in the level."""
    above_K = (1.0 - below_K - level_K).clamp(min=0.0)  # rounding leaves about -1e-16 at the top
    pairs = [(a, b) for a in range(draws + 1) for b in range(draws + 1 - a)]
    return {
        (a, b): math.comb(draws, a) * math.comb(draws - a, b) * below_K**a * level_K**b * above_K ** (draws - a - b)
        for a, b in pairs
    }
