"""Combine several rewards into one: by a weighted sum, or by an order that needs no common scale (docs/rewards.md)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bondlm.bestofn.aggregation import lexicographic_ranks, mean_ranks, weighted_sum, worst_ranks
from bondlm.errors import ConfigError
from bondlm.rewards.scoring import NamedReward

AGGREGATIONS = ("sum", "quantile", "worst", "lexicographic")


@dataclass(frozen=True)
class Aggregation:
    """`how` is one of `AGGREGATIONS`; `tolerances`, one per reward, belong to "lexicographic" (default: 0 each)."""

    how: str = "sum"
    tolerances: Sequence[float] | None = None

    @property
    def by_order(self) -> bool:
        """Whether the result is a rank among a prompt's samples."""
        return self.how != "sum"

    def check(self, weights: Sequence[float], count: int) -> None:
        """Refuse options that do not fit the number of rewards and their weights.

        Raises:
            ConfigError: an unknown name, tolerances that are not one number >= 0 per reward, or a weight that the
                aggregation cannot use.
        """
        if self.how not in AGGREGATIONS:
            raise ConfigError(f"reward_aggregation={self.how!r}: choose one of {', '.join(AGGREGATIONS)}")
        if len(weights) != count:
            raise ConfigError(f"reward_weights={list(weights)!r} has {len(weights)} entries for {count} rewards")
        if self.tolerances is not None:
            self._check_tolerances(self.tolerances, count)
        if self.how in ("worst", "lexicographic") and (odd := [w for w in weights if w not in (1, -1, 0)]):
            raise ConfigError(
                f"reward_weights={list(weights)!r}: reward_aggregation={self.how!r} compares ranks and weighs none, so "
                f"{odd[0]!r} would have no effect. Use 1, -1 (less is better) or 0 (only logged)"
            )
        if not any(weights):
            raise ConfigError(f"reward_weights={list(weights)!r}: at least one must not be 0, or all rewards are equal")

    def _check_tolerances(self, tolerances: Sequence[float], count: int) -> None:
        if self.how != "lexicographic":
            raise ConfigError(
                f"reward_tolerances={list(tolerances)!r}: reward_aggregation={self.how!r} does not use them "
                "('lexicographic' does), remove the setting"
            )
        if len(tolerances) != count:
            raise ConfigError(
                f"reward_tolerances={list(tolerances)!r} has {len(tolerances)} entries for {count} rewards: give one "
                "per reward, 0 where only equal values tie"
            )
        if not all(isinstance(t, int | float) and 0 <= t < math.inf for t in tolerances):
            raise ConfigError(f"reward_tolerances={list(tolerances)!r}: each must be a finite number >= 0")

    def combine(
        self, rewards: Sequence[NamedReward], by_name: Mapping[str, Tensor], among: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The combined reward of each sample, from the values of each reward.

        Args:
            rewards: in the order of their priority, with their weights.
            by_name: (P, M) values of each reward; if it does not apply to a prompt, all of the prompt's values are NaN.
            among: (P, K) values of the samples among which ranks are counted; None: the samples themselves. Not used by
                the sum.

        Returns:
            (P, M): the weighted sum, or ranks in [0, 1].
        """
        weights = [reward.weight for reward in rewards]
        if not self.by_order:
            return weighted_sum([by_name[reward.name].nan_to_num(nan=0.0) for reward in rewards], weights)
        values_JPM = torch.stack([by_name[reward.name] for reward in rewards])
        among_JPK = None if among is None else torch.stack([among[reward.name] for reward in rewards])
        if self.how == "lexicographic":
            tolerances = self.tolerances if self.tolerances is not None else [0.0] * len(rewards)
            return lexicographic_ranks(values_JPM, among_JPK, weights, tolerances)
        if self.how == "worst":
            return worst_ranks(values_JPM, among_JPK, weights)
        return mean_ranks(values_JPM, values_JPM if among_JPK is None else among_JPK, weights)


SUM = Aggregation()


def aggregation_of(options: Mapping[str, Any], weights: Sequence[float] | None, count: int) -> Aggregation:
    """The aggregation of `count` rewards that a command's options describe.

    Raises:
        ConfigError: they do not fit.
    """
    aggregation = Aggregation(str(options.get("reward_aggregation") or "sum"), options.get("reward_tolerances"))
    aggregation.check([1.0] * count if weights is None else weights, count)
    return aggregation
