"""All objectives, by their name in `objective:` of a config; each uses the settings that its dataclass has as fields.

To add an objective, write a file with a dataclass and add a line here.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bondlm.errors import ConfigError
from bondlm.objectives.base import Objective
from bondlm.objectives.best_of_n_regression import BestOfNRegression
from bondlm.objectives.best_of_n_sft import BestOfNSFT
from bondlm.objectives.bonbon import BoNBoN
from bondlm.objectives.bond import BOND
from bondlm.objectives.grpo import GRPO
from bondlm.objectives.jbond import JBOND
from bondlm.objectives.listwise import Listwise
from bondlm.objectives.reinforce import Reinforce
from bondlm.objectives.rloo import RLOO
from bondlm.objectives.rules import one_of
from bondlm.objectives.self_bond import SelfBOND
from bondlm.objectives.vbon import VBON

OBJECTIVES: dict[str, type[Any]] = {
    "jbond": JBOND,
    "bond": BOND,
    "best_of_n_sft": BestOfNSFT,
    "reinforce": Reinforce,
    "rloo": RLOO,
    "grpo": GRPO,
    "vbon": VBON,
    "bonbon": BoNBoN,
    "best_of_n_regression": BestOfNRegression,
    "self_bond": SelfBOND,
    "listwise": Listwise,
}


def make_objective(name: str, settings: Mapping[str, Any], *, num_logged: int | None = None) -> Objective:
    """The objective of that name, with the settings that it uses; None stands for the objective's own default.

    Args:
        name: a key of `OBJECTIVES`.
        settings: a run's settings, plain values by name.
        num_logged: scored samples per prompt in the file, if the objective learns from a file.

    Raises:
        ConfigError: there is no such objective, or it refuses a setting.
    """
    if (problem := one_of(*OBJECTIVES).problem("objective", name)) is not None:
        raise ConfigError(problem)
    own = [field.name for field in fields(OBJECTIVES[name])]
    given = {setting: settings[setting] for setting in own if settings.get(setting) is not None}
    objective: Objective = OBJECTIVES[name](**(_dependent_defaults(name, settings, num_logged) | given))
    return objective


def _dependent_defaults(name: str, settings: Mapping[str, Any], num_logged: int | None) -> dict[str, Any]:
    """Defaults that follow from another setting, or from the data."""
    if name == "bond" and settings.get("quantile") == "learned":
        return {"num_anchor_samples": 1}
    if name == "bond" and settings.get("beta") == 0:  # the forward term's n are all that it learns from
        return {"num_anchor_samples": max(2, settings["n"])}
    if name == "best_of_n_regression":
        return {"num_samples": num_logged or settings.get("n")}
    if name == "listwise" and num_logged:
        return {"num_samples": num_logged}
    return {}


def anchor_may_move(name: str) -> bool:
    """Whether the anchor may move; an objective with `anchor_moves = False` compares with the initial model."""
    return bool(getattr(OBJECTIVES.get(name), "anchor_moves", True))


def users(setting: str) -> tuple[str, ...]:
    """The objectives that use a setting; empty if it is not a setting of objectives."""
    return tuple(name for name, kind in OBJECTIVES.items() if setting in {field.name for field in fields(kind)})
