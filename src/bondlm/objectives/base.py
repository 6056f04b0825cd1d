"""What an objective asks of a rollout, and what it hands back.

Shapes: P prompts; M samples per prompt, the policy's first, then the anchor's; L of them are learned from; the first C
of these L are compared, that is, their log-probability under the anchor is needed too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplePlan:
    """How many completions an objective draws per prompt, from whom, and how many it learns from.

    Example: J-BOND draws 1 from the policy and 2 from the anchor, learns from 2 (the policy's and the better of the
    anchor's), and compares 1 (the policy's) with the anchor.
    """

    policy: int
    anchor: int
    learn: int
    compare: int
    learned_quantile: bool = False  # whether a selection has a `LearnedQuantile`
    steered_to: int | None = None  # the N that a selection's `wins_P` steer the signal to

    @property
    def total(self) -> int:
        """Completions per prompt, M."""
        return self.policy + self.anchor


class LearnedQuantile(NamedTuple):
    """What the trainer needs if a model estimates the objective's quantiles (`bondlm.models.learned_quantile`)."""

    labels_P: Tensor  # in [0, 1]: what the model learns for the compared sample, from this step's rewards
    signal: Callable[[Tensor], Tensor]  # the signal (P, C) from the model's log-quantiles (P, C)


class Selection(NamedTuple):
    """What is decided from the rewards of a prompt's samples, before any gradient is computed."""

    rows_PL: Tensor  # long: which of the M samples are learned from, the compared ones first
    signal_PC: Tensor  # float: the reward part of each compared sample's return
    learned: LearnedQuantile | None = None  # if set, the signal comes from it
    wins_P: Tensor | None = None  # in [0, 1], win rate against the reference, which steers a `SignalFactor`


class Loss(NamedTuple):
    """The loss of each prompt, and what to log."""

    loss_P: Tensor
    metrics: dict[str, Tensor]  # name -> (P,), detached; the trainer averages over prompts


class Objective(Protocol):
    """The methods that the trainer calls on an objective; apart from `plan`, all are pure functions of tensors."""

    @property
    def plan(self) -> SamplePlan:
        """Samples per prompt."""

    def select(self, rewards_PM: Tensor, noise_PM: Tensor) -> Selection:
        """Choose the samples to learn from; `noise_PM` in [0, 1) breaks ties."""

    def baseline(self, returns_PC: Tensor) -> Tensor:
        """Baseline (P, C) of each compared sample, from the returns of the whole batch."""

    def returns(self, signal_PC: Tensor, logp_PC: Tensor, anchor_logp_PC: Tensor) -> Tensor:
        """Return (P, C) of each compared sample."""

    def loss(self, logp_PL: Tensor, anchor_logp_PC: Tensor, signal_PC: Tensor, baseline_PC: Tensor) -> Loss:
        """Loss (P,) whose gradient is the objective's; `logp_PL` are sums over the completion's tokens."""
