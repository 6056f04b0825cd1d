"""The settings of a run for `eval.json` and the model card: only those that its objective uses."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from bondlm.config import OFF_POLICY, SETTINGS, objective_of
from bondlm.config.changes import settled_settings
from bondlm.rewards import Aggregation, NamedReward


def describe_objective(name: str, objective: Any) -> dict[str, Any]:
    """The objective's name, its settings that are plain values, and the strength that was solved for them."""
    settings = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    settings = {"n": getattr(objective, "n", None)} | settings
    settings["strength"] = getattr(objective, "strength", None)
    return {"name": name} | {k: v for k, v in settings.items() if isinstance(v, bool | int | float | str)}


def describe_settings(args: Any, objective: Any) -> dict[str, Any]:
    """`describe_objective`, the anchor and its schedule, the learning rate; `gamma_ref`, `average_weights` if set."""
    of_anchor = [name for name, setting in SETTINGS.items() if setting.needs == ("anchor", args.anchor)]
    names = ["anchor", *of_anchor, *(["gamma_ref"] if args.gamma_ref else []), "learning_rate"]
    names += ["average_weights"] if args.average_weights else []
    return describe_objective(args.objective, objective) | {name: getattr(args, name) for name in names}


def describe_rewards(rewards: Sequence[NamedReward], aggregation: Aggregation) -> dict[str, Any]:
    """The names of the rewards, and all that makes one reward of them: results compare only if these are the same."""
    names, weights = [reward.name for reward in rewards], [reward.weight for reward in rewards]
    described = {"rewards": names, "reward_weights": weights, "reward_aggregation": aggregation.how}
    if aggregation.how == "lexicographic":
        described["reward_tolerances"] = list(aggregation.tolerances or [0.0] * len(rewards))
    return described


def describe_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`describe_settings` of a run's `config.yaml`, which has only the settings that were set; the rest are defaults.

    For a merge of runs, which has no settings of its own, it lists the runs and the method.
    """
    if isinstance(merge := config.get("merge"), Mapping):
        runs = f"{len(merge['runs'])} {config.get('objective', 'BOND')} runs"
        how = {name: merge[name] for name in ("toward_reference", "rank") if name in merge}
        return {"name": f"{merge['method']} of {runs}"} | how
    args = SimpleNamespace(**settled_settings(config))
    described = describe_settings(args, objective_of(args))
    if args.objective in OFF_POLICY:  # the settings do not tell whether it learned from scored samples
        of_anchor = ["anchor", *(name for name, s in SETTINGS.items() if s.needs == ("anchor", args.anchor))]
        untold = [] if config.get("anchor") else of_anchor
        untold += ["num_samples"] if args.num_samples is None else []  # as many as the data has per prompt
        described = {name: value for name, value in described.items() if name not in untold}
    return described
