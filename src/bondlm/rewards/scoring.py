"""The only entry point for rewards: one finite number per completion, or an error that names the bad one.

torch and numpy both treat NaN as the largest element, so an unnoticed NaN would be distilled as the winner.

Shapes: B rows (one prompt with one completion each).
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bondlm.bestofn.aggregation import mid_ranks, weighted_sum
from bondlm.errors import ConfigError, DataError, RewardError
from bondlm.rewards.answers import checked, place_of, refuse_non_finite
from bondlm.rewards.calls import RewardFunction, call_all
from bondlm.rewards.extras import NAMES, Extras
from bondlm.rewards.ranking import rows_of


@dataclass(frozen=True)
class NamedReward:
    """A reward function with the name that metrics and errors use and its weight in the sum.

    Raises:
        ConfigError: the weight is not a finite number.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    timeout: float | None = None  # seconds, for asynchronous functions; a server has its own time limits

    def __post_init__(self) -> None:
        is_real = isinstance(self.weight, numbers.Real) and not isinstance(self.weight, bool)
        if not is_real or not math.isfinite(self.weight):
            raise ConfigError(f"reward {self.name!r} has the weight {self.weight!r}: give a finite number.")

    @property
    def ranks(self) -> bool:
        """Whether it compares a prompt's samples (`RankReward`); its values cannot be compared between prompts."""
        return getattr(self.function, "ranks", False) is True  # a user's object may have another attribute of that name


@dataclass(frozen=True)
class Scores:
    """Rewards of B rows: `total` (B,), the weighted sum, and `by_name`, each reward (B,) before its weight.

    All are float64 on the CPU. A reward that does not apply to a row is NaN there and left out of the row's total. The
    value of a reward that ranks is the rank among the rows of the group, in [0, 1] (`mid_ranks`). `bad` gives the
    reason for each row without a finite value; it is empty unless requested.
    """

    total: Tensor
    by_name: dict[str, Tensor]
    bad: dict[int, str] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)  # of `log_extra`, B values each
    metrics: dict[str, float] = field(default_factory=dict)  # of `log_metric`


def score(
    rewards: Sequence[NamedReward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    allow_bad_rows: bool = False,
    groups: Sequence[int] | None = None,
    trainer_state: Any = None,
    num_for_comparison: int = 0,
    add: bool = True,
) -> Scores:
    """Score B completions with every reward and check each value.

    A reward that returns None for all rows of a group does not apply to the group and is left out of its sums.

    Args:
        rewards: at least one, with different names.
        prompts: B strings, or B lists of chat messages.
        completions: B strings, or B lists of chat messages.
        columns: further arguments by name, each a sequence of B; a function gets the ones that its signature accepts.
        allow_bad_rows: instead of raising, note rows whose reward is not one finite real number in `bad`.
        groups: B numbers that say which rows belong to the same prompt. Default: each row is its own group.
        trainer_state: passed to functions that ask for it.
        num_for_comparison: this many of the last rows are only for comparison: rewards that rank see them, other
            rewards do not and are NaN there, and the total leaves them out. Each belongs to the group of an earlier
            row.
        add: whether `total` is wanted. If not, it is 0, and a sum that is not finite is not an error.

    Raises:
        ConfigError: no reward, two rewards of the same name, a reward that ranks without `groups`, or a reward that
            needs a missing argument.
        DataError: prompts, completions and columns differ in length, or a column has the name of an argument.
        RewardError: a reward raised or did not return one finite real number per row.
        ResourceError: a reward ran out of memory.
    """
    offered = _offered_arguments(prompts, completions, columns or {})
    names = [reward.name for reward in rewards]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"rewards are called {names}: give at least one, each with a name of its own.")
    if groups is None and (ranking := [reward.name for reward in rewards if reward.ranks]):
        raise ConfigError(f"reward {ranking[0]!r} ranks a prompt's samples: say in groups which belong together.")
    if not prompts:
        empty = torch.zeros(0, dtype=torch.float64)
        return Scores(empty, {name: empty.clone() for name in names})
    group_B = list(range(len(prompts))) if groups is None else list(groups)
    own = len(prompts) - num_for_comparison
    extras = Extras(own, trainer_state)
    bad: dict[int, str] | None = {} if allow_bad_rows else None
    by_name, missing = _values(rewards, offered, group_B, own, extras, bad)
    if missing:
        _refuse_partly_missing(rewards, missing, prompts, group_B[:own], bad)
    total = torch.zeros(own, dtype=torch.float64)
    if add:
        values = [by_name[reward.name][:own].masked_fill(_rows(missing, reward, own), 0.0) for reward in rewards]
        total = weighted_sum(values, [reward.weight for reward in rewards])
    refuse_non_finite("the weighted sum", total, prompts, bad)
    return Scores(total, by_name, bad or {}, extras.columns, extras.metrics)


def _values(
    rewards: Sequence[NamedReward],
    offered: Mapping[str, list[Any]],
    groups: Sequence[int],
    own: int,
    extras: Extras,
    bad: dict[int, str] | None,
) -> tuple[dict[str, Tensor], dict[str, set[int]]]:
    """Each reward's checked values (B,), and the rows that it does not apply to."""
    functions = [r.function.over(offered, groups, r.name) if r.ranks else r.function for r in rewards]  # type: ignore[attr-defined]
    answers = call_all(
        list(zip([reward.name for reward in rewards], functions, strict=True)),
        {name: values[:own] for name, values in offered.items()},
        {reward.name: reward.timeout for reward in rewards},
        extras.offered,
    )
    by_name: dict[str, Tensor] = {}
    missing: dict[str, set[int]] = {}
    unscored = torch.full((len(groups) - own,), math.nan, dtype=torch.float64)
    for reward, answer in zip(rewards, answers, strict=True):
        prompts = offered["prompts"] if reward.ranks else offered["prompts"][:own]
        values, rows = checked(reward.name, answer, prompts, bad)
        by_name[reward.name] = _ranked(values, groups) if reward.ranks else torch.cat([values, unscored])
        if rows:
            missing[reward.name] = rows
    return by_name, missing


def _ranked(values: Tensor, groups: Sequence[int]) -> Tensor:
    """Each value's rank (B,) among those of its group; a group without numbers stays NaN."""
    ranks = torch.full_like(values, math.nan)
    for rows in rows_of(groups):
        if not values[rows].isnan().any():
            ranks[rows] = mid_ranks(values[rows][None], values[rows][None])[0]
    return ranks


def _rows(missing: Mapping[str, set[int]], reward: NamedReward, count: int) -> Tensor:
    """Which of the first `count` rows a reward does not apply to, (count,) bool."""
    left_out = missing.get(reward.name, set())
    return torch.tensor([row in left_out for row in range(count)], dtype=torch.bool)


def applies_everywhere(by_name: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the rewards of judges after checking that each applies to all prompts, on which judges are compared.

    Raises:
        RewardError: a judge leaves out a prompt.
    """
    for name, values in by_name.items():
        if values.isnan().any():
            raise RewardError(f"judge {name!r} is None for some prompts: return one finite number for each completion")
    return dict(by_name)


def refuse_uneven(by_name: Mapping[str, Tensor], among: Mapping[str, Tensor], prompts: Sequence[Any]) -> None:
    """Refuse a reward that is None (NaN) for a prompt's samples here, (P, M), and not there, (P, K), or vice versa.

    The two sums would differ in a term.

    Raises:
        RewardError: there is such a reward and prompt.
    """
    for name in [name for name in by_name if name in among]:
        uneven_P = by_name[name].isnan().any(dim=1) != among[name].isnan().any(dim=1)
        for row in uneven_P.nonzero()[:1, 0].tolist():
            raise RewardError(
                f"reward {name!r} is None for some of the samples that an evaluation compares, but a number for others "
                f"{place_of(row, prompts)}: return None for all completions of a prompt, if it does not apply there, "
                "or for none"
            )


def _refuse_partly_missing(
    rewards: Sequence[NamedReward],
    missing: Mapping[str, set[int]],
    prompts: Sequence[Any],
    groups: Sequence[int],
    bad: dict[int, str] | None,
) -> None:
    """Refuse None for only some samples of a prompt, or from all rewards: None means that a reward does not apply.

    A reward that is left out for only some samples would change which of them is best.
    """
    weighed = [reward.name for reward in rewards if reward.weight] or [reward.name for reward in rewards]
    for rows in rows_of(groups):
        problem = None
        for name in missing:
            if 0 < (count := len(missing[name].intersection(rows))) < len(rows):
                problem = (
                    f"reward {name!r} is None for {count} of {len(rows)} completions {place_of(rows[0], prompts)}: "
                    "return None for all completions of a prompt, if it does not apply there, or for none"
                )
        if problem is None and all(rows[0] in missing.get(name, ()) for name in weighed):
            problem = (
                f"reward {weighed[0]!r} is None {place_of(rows[0], prompts)}, and no other reward applies there. "
                "Return one finite number for each completion"
            )
        if problem is None:
            continue
        if bad is None:
            raise RewardError(problem)
        for row in rows:
            bad.setdefault(row, problem)


def _offered_arguments(
    prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> dict[str, list[Any]]:
    for name in ("prompts", "completions", *NAMES):
        if name in columns:
            raise DataError(f"the dataset column {name!r} has the name of a reward function's argument: rename it.")
    offered = {"prompts": list(prompts), "completions": list(completions)}
    offered |= {name: list(values) for name, values in columns.items()}
    for name, values in offered.items():
        if len(values) != len(prompts):
            raise DataError(f"{name!r} has {len(values)} rows for {len(prompts)} prompts: give one per prompt.")
    return offered
