"""Several held-out data sets: their names, and the one that decides in a run."""

import re
from typing import Any

from bondlm.config import BONDConfig
from bondlm.data.sources import named_sets
from bondlm.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,79}")


def main_set(args: BONDConfig, source: Any) -> str | None:
    """The name of the set that `main_eval` names, by default the first; None if the held-out prompts are one data set.

    Raises:
        ConfigError: there is no such name, the name cannot be part of a metric, or a run would stop by a set that was
            not chosen.
    """
    sets = named_sets(source)
    if sets is None:
        if args.main_eval is not None:
            raise ConfigError(
                f"main_eval={args.main_eval!r} names one of several eval sets, but there is only one: remove it, or "
                "give eval_dataset as a dictionary"
            )
        return None
    if not sets:
        raise ConfigError("eval_dataset={}: the dictionary is empty, name a data set or remove it")
    for name in sets:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"eval_dataset: {name!r} becomes part of metrics and file names: use letters and digits")
    if args.main_eval is not None and args.main_eval not in sets:
        raise ConfigError(f"main_eval={args.main_eval!r}: the eval sets are {', '.join(sets)}")
    for goal in ("target_n", "kl_budget"):
        if getattr(args, goal) is not None and args.main_eval is None and len(sets) > 1:
            raise ConfigError(
                f"{goal}={getattr(args, goal)}: with several eval sets, main_eval must name the one that it uses "
                f"({', '.join(sets)})"
            )
    return args.main_eval or next(iter(sets))
