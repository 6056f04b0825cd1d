"""Where BOND and J-BOND settle when the anchor moves and gamma_ref * KL(pi || reference) pulls back.

At rest the anchor equals the policy, so the KL to it vanishes, and the expected gradient is zero if for each outcome

    gamma_ref * log(pi / ref) = beta * signal + (1 - beta) * Best-of-n(pi) / pi + constant,

where both parts are functions of the policy's own quantile. So with gamma_ref > 0 every BOND has a fixed point: an N
that is kept.

Shape suffixes: K outcomes.
"""

from torch import Tensor

from bondlm.bestofn._arrays import Array, back, check_finite, check_same_shape, to_float64
from bondlm.bestofn.distribution import best_of_n_probs
from bondlm.bestofn.oracle.exact_signal import Estimate, mean_signal
from bondlm.bestofn.oracle.tables import check_weights, positive_probs, resting_point


def bond_resting_point(
    ref_probs: Array,
    rewards: Array,
    n: float,
    beta: float,
    gamma_ref: float,
    *,
    estimate: Estimate = "exact",
    k: int | None = None,
    correction: bool = False,
) -> Array:
    """Return the policy that BOND with a moving anchor and gamma_ref keeps: anchor = policy, expected gradient 0.

    The gradient is `bond_gradient(logits, pi, ...) + gamma_ref * backward_kl_gradient(logits, ref_probs)`. REINFORCE
    and RLOO with a moving anchor settle at `kl_reward_optimum(ref_probs, rewards, gamma_ref)`.

    Args:
        ref_probs: (..., K) probabilities of the reference, none of them zero.
        rewards: (..., K) finite rewards.
        n: order of Best-of-n in one step, a real number >= 1.
        beta: weight of the backward part, in [0, 1].
        gamma_ref: weight of the KL to the reference, > 0.
        estimate: as `mean_signal`.
        k: as `mean_signal`.
        correction: as `mean_signal`.

    Raises:
        ValueError: as `mean_signal`, or if a weight is out of range.
        RuntimeError: if the steps do not converge: exact quantiles and gamma_ref <= beta (n - 1) have no such policy.
    """
    check_weights(beta, gamma_ref)
    if gamma_ref == 0:
        raise ValueError("gamma_ref must be > 0: without it a moving anchor never rests")
    ref_K, rewards_K = positive_probs(ref_probs, "ref_probs"), to_float64(rewards, "rewards")
    check_same_shape(ref_K, "ref_probs", rewards_K, "rewards")
    check_finite(rewards_K, "rewards")

    def wanted(logp_K: Tensor) -> Tensor:
        probs_K = logp_K.exp()
        signal_K = mean_signal(probs_K, rewards_K, n, estimate=estimate, k=k, correction=correction)
        forward_K = best_of_n_probs(probs_K, rewards_K, n) / probs_K
        return ref_K.log() + (beta * signal_K + (1.0 - beta) * forward_K) / gamma_ref

    return back(resting_point(ref_K.log(), wanted), ref_probs, rewards)
