"""The mathematics of Best-of-N: distribution, quantiles, order statistics, divergences, effective N, exact oracle.

Pure functions of numpy arrays or torch tensors (the result is of the same kind), in float64. No models, no files.
"""

from bondlm.bestofn.bootstrap import Estimate, bootstrap_mean
from bondlm.bestofn.distribution import best_of_n_kl, best_of_n_probs, kl_bound
from bondlm.bestofn.divergences import backward_kl, best_of_n_logprob, forward_kl, kl_k1, kl_k3
from bondlm.bestofn.effective import EffectiveN, best_of_n_win_rates, effective_n, win_rate, win_rates
from bondlm.bestofn.oracle.exact_objectives import (
    best_and_worst_probs,
    bonbon_fixed_point,
    bonbon_gradient,
    bond_fixed_point,
    bond_gradient,
    kl_reward_gradient,
    kl_reward_optimum,
    regression_fixed_point,
    regression_gradient,
)
from bondlm.bestofn.oracle.exact_signal import mean_signal
from bondlm.bestofn.oracle.grpo import grpo_fixed_point, grpo_gradient
from bondlm.bestofn.oracle.listwise import listwise_fixed_point, listwise_gradient
from bondlm.bestofn.oracle.reference_kl import bond_resting_point
from bondlm.bestofn.oracle.self_bond import self_bond_fixed_point, self_bond_gradient, self_bond_signal
from bondlm.bestofn.oracle.tabular import (
    backward_kl_gradient,
    forward_kl_gradient,
    iterated_best_of_n,
    jbond_backward_target,
    jbond_fixed_point,
    jbond_gradient,
    jeffreys_gradient,
    kl_divergence,
    mean_two_level_reward,
)
from bondlm.bestofn.order import expected_best_of_n
from bondlm.bestofn.own_quantiles import solve_strength
from bondlm.bestofn.quantiles import (
    LogQuantileMethod,
    log_collision_correction,
    log_quantile,
    quantile,
    two_level_penalty,
)

__all__ = [
    "EffectiveN",
    "Estimate",
    "LogQuantileMethod",
    "backward_kl",
    "backward_kl_gradient",
    "best_and_worst_probs",
    "best_of_n_kl",
    "best_of_n_logprob",
    "best_of_n_probs",
    "best_of_n_win_rates",
    "bonbon_fixed_point",
    "bonbon_gradient",
    "bond_fixed_point",
    "bond_gradient",
    "bond_resting_point",
    "bootstrap_mean",
    "effective_n",
    "expected_best_of_n",
    "forward_kl",
    "forward_kl_gradient",
    "grpo_fixed_point",
    "grpo_gradient",
    "iterated_best_of_n",
    "jbond_backward_target",
    "jbond_fixed_point",
    "jbond_gradient",
    "jeffreys_gradient",
    "kl_bound",
    "kl_divergence",
    "kl_k1",
    "kl_k3",
    "kl_reward_gradient",
    "kl_reward_optimum",
    "listwise_fixed_point",
    "listwise_gradient",
    "log_collision_correction",
    "log_quantile",
    "mean_signal",
    "mean_two_level_reward",
    "quantile",
    "regression_fixed_point",
    "regression_gradient",
    "self_bond_fixed_point",
    "self_bond_gradient",
    "self_bond_signal",
    "solve_strength",
    "two_level_penalty",
    "win_rate",
    "win_rates",
]
