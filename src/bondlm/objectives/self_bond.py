"""BOND with quantiles among the policy's own samples: no moving anchor, and Best-of-n of the reference as fixed point.

If pi is Best-of-n of the reference, then log(pi / pi_ref) is a known function f of the *policy's own* quantile of the
reward (Sessa et al. 2024, arXiv 2407.14622, Eq. 4 solved for p_pi). Each step, for each prompt:

1. draw y_1 .. y_K from the policy; s_i = signal_table[a, b], for a other samples worse than y_i and b tied with it;
2. return of each: R_i = s_i (K-1)/K - (log pi(y_i) - log pi_ref(y_i)), minus the mean return of the prompt's others;
3. descend the mean of -log pi(y_i) (R_i - baseline_i), as RLOO does.

Ranks are a zero-sum game: the others' signals depend on the rank of y_i, so their mean as a baseline would multiply the
signal by K/(K-1). The factor in step 2 undoes that: what is left is exactly s_i minus the mean of all K signals.

Fixed point for continuous rewards: log(pi / pi_ref) = f_k(own quantile) + constant, with the win rate of Best-of-n,
because the strength of the signal is solved for that win rate (`bondlm.bestofn.own_quantiles`). For tied rewards the
same formula holds by reward levels; it approaches Best-of-n with ties (for "tilt": the tilt) as K grows. If all samples
tie, there is no signal.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bondlm.bestofn.own_quantiles import (
    FORMS,
    OwnQuantile,
    kl_over_best_of_n,
    largest_order,
    signal_table,
    solve_strength,
    win_table,
)
from bondlm.bestofn.quantiles import count_below
from bondlm.errors import ConfigError
from bondlm.objectives.base import Loss, SamplePlan, Selection
from bondlm.objectives.rules import check, one_of, whole
from bondlm.objectives.terms import (
    learn_from_all,
    mean_of_prompts_others,
    own_samples,
    policy_gradient,
    with_share_without_signal,
)

MAX_KL_RATIO = 2.0  # KL spent to reach Best-of-n's win rate over Best-of-n's own KL; if it is larger, draw more samples


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfBOND:
    """Own-quantile BOND to Best-of-`n`, K = `num_samples` samples per prompt, `log_quantile` the form of the signal."""

    n: int
    num_samples: int = 8
    log_quantile: OwnQuantile = "tilt"
    adaptive_strength: bool = False  # whether the signal follows the measured N (`SignalFactor`)

    anchor_moves: ClassVar[bool] = False  # its KL is to the initial model

    def __post_init__(self) -> None:
        """Check the settings."""
        check(
            self,
            n=whole(2, "Best-of-1 is the reference itself"),
            num_samples=whole(3, "a rank among the prompt's other samples"),
            log_quantile=one_of(*FORMS),
        )
        if kl_over_best_of_n(self.n, self.num_samples, self.log_quantile) > MAX_KL_RATIO:
            most = largest_order(self.n, self.num_samples, self.log_quantile, MAX_KL_RATIO)
            raise ConfigError(
                f"n={self.n}: {self.num_samples} samples per prompt reach its win rate only at more than "
                f"{MAX_KL_RATIO:g} times the KL of Best-of-{self.n}; use n <= {most}, or a larger num_samples"
            )

    @property
    def plan(self) -> SamplePlan:
        """Draw K samples of the policy, learn from all; to measure N, also one of the anchor (the reference)."""
        plan = own_samples(self.num_samples)
        return replace(plan, anchor=1, steered_to=self.n) if self.adaptive_strength else plan

    @property
    def strength(self) -> float:
        """The solved strength of the signal, nats: lambda of "tilt", c of "harmonic", else the worst's penalty."""
        return solve_strength(self.n, self.num_samples, self.log_quantile)

    def select(self, rewards_PM: Tensor, noise_PM: Tensor) -> Selection:
        """Learn from all own samples; the signal of each is (K-1)/K times its entry in the table."""
        own_PK, reference_P1 = rewards_PM[:, : self.num_samples], rewards_PM[:, self.num_samples :]
        worse, at_most, others = count_below(own_PK, None)
        table_KK = torch.tensor(signal_table(self.n, self.num_samples, self.log_quantile), device=worse.device)
        selection = learn_from_all(table_KK[worse.long(), (at_most - worse).long()] * others / self.num_samples)
        return selection._replace(wins_P=self._wins(own_PK, reference_P1)) if self.adaptive_strength else selection

    def _wins(self, own_PK: Tensor, reference_P1: Tensor) -> Tensor:
        """How often (P,) the policy wins against the prompt's reference sample."""
        below, at_most, _ = count_below(reference_P1, own_PK)
        table = torch.tensor(win_table(self.n, self.num_samples), device=below.device)
        return table[below.long(), (at_most - below).long()].squeeze(1)

    def returns(self, signal_PC: Tensor, logp_PC: Tensor, anchor_logp_PC: Tensor) -> Tensor:
        """R = signal - (log pi - log pi_ref)."""
        return signal_PC - (logp_PC - anchor_logp_PC)

    def baseline(self, returns_PC: Tensor) -> Tensor:
        """Mean return of the prompt's other samples."""
        return mean_of_prompts_others(returns_PC)

    def loss(self, logp_PL: Tensor, anchor_logp_PC: Tensor, signal_PC: Tensor, baseline_PC: Tensor) -> Loss:
        """Mean over the prompt's samples of -log pi (R - baseline)."""
        advantage_PC = self.returns(signal_PC, logp_PL.detach(), anchor_logp_PC) - baseline_PC
        return with_share_without_signal(policy_gradient(logp_PL, advantage_PC), signal_PC)
