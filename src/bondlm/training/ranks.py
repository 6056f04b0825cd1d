"""Rewards that are ranks: combining several, and the objectives that can learn from them."""

from typing import Any

from bondlm.errors import ConfigError
from bondlm.objectives import Objective
from bondlm.objectives.make import users
from bondlm.rewards import Aggregation, is_ranking


def aggregation_of_run(args: Any, reward_funcs: Any, objective: Objective) -> Aggregation:
    """How the rewards of a run are combined; refuses rewards that its objective cannot learn from.

    Raises:
        ConfigError: settings do not fit the rewards, or the objective uses the values of rewards but they are ranks.
    """
    specs = reward_funcs if isinstance(reward_funcs, list | tuple) else [] if reward_funcs is None else [reward_funcs]
    aggregation = Aggregation(args.reward_aggregation, args.reward_tolerances)
    if specs:
        weights = [1.0] * len(specs) if args.reward_weights is None else args.reward_weights
        aggregation.check(weights, len(specs))
    elif args.reward_weights is not None:
        raise ConfigError(f"reward_weights={args.reward_weights!r}: there are no reward_funcs to weigh, remove it")
    elif aggregation != Aggregation():
        raise ConfigError(f"reward_aggregation={aggregation.how!r}: there are no reward_funcs to combine, remove it")
    _check_objective(args, aggregation.by_order or any(is_ranking(spec) for spec in specs), aggregation, objective)
    return aggregation


def _check_objective(args: Any, has_ranks: bool, aggregation: Aggregation, objective: Objective) -> None:
    by_value = args.objective in users("beta_rl")
    what = f"reward_aggregation={aggregation.how!r}" if aggregation.by_order else "a reward that ranks"
    if has_ranks and objective.plan.total == 1:
        raise ConfigError(
            f"{what}: objective={args.objective!r} draws one sample per prompt, so there is no other to rank it "
            "among; choose an objective that draws several"
        )
    if has_ranks and by_value and not args.ranks_as_values:
        raise ConfigError(
            f"{what}: objective={args.objective!r} learns from the values of rewards, and a rank among a prompt's own "
            "samples is not one. With ranks_as_values=True it takes ranks in [0, 1] for values (docs/rewards.md says "
            "what it then optimises); jbond and the others of BOND need only the order"
        )
    if args.ranks_as_values and not (has_ranks and by_value):
        why = "nothing ranks" if by_value else f"objective={args.objective!r} learns only from the order"
        raise ConfigError(f"ranks_as_values=True: {why}, remove the setting")
