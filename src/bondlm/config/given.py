"""Which settings a user gave: in the constructor of `BONDConfig`, or by setting an attribute later."""

import copy
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from bondlm.errors import ConfigError
from bondlm.migration import SETTINGS, own_names

# What transformers last made of a default ("none" becomes [], None an object). `dataclasses.replace` passes it to the
# new object, although no user gave it.
_settled_defaults: dict[str, Any] = {}


def given_settings(config: Any, defaults: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The settings of an object under construction that are not their defaults."""
    values = {name: getattr(config, name) for name in names}
    unasked = {n for n, v in values.items() if n in _settled_defaults and v == _settled_defaults[n]}
    return {n: v for n, v in values.items() if v != defaults.get(n, []) and n not in unasked}


def note_settled(config: Any, names: Iterable[str], derived: Iterable[str]) -> None:
    """Remember the final values of the settings; the defaults of `derived` ones depend on other settings."""
    config.settled = {name: getattr(config, name) for name in names}
    config.made = frozenset(vars(config))
    _settled_defaults.update({n: v for n, v in config.settled.items() if n not in config.given and n not in derived})


def own_copy(config: Any) -> Any:
    """A copy for a trainer, which fills in defaults; attributes set since are checked like constructor arguments.

    Raises:
        ConfigError: it is no `BONDConfig`; the constructor refuses a value that was set, or its name is TRL's or
            nearly a setting's.
    """
    from bondlm.config.bond_config import BONDConfig  # it imports this module

    if not hasattr(config, "settled"):
        raise ConfigError(
            f"args is a {type(config).__name__}, but BONDTrainer needs a BONDConfig, which has the settings of "
            "TrainingArguments and those of BOND (docs/trl.md)"
        )
    mine = copy.copy(config)
    mine.given = config.given | _set_since(config, config.settled)
    if mine.given != config.given:
        made = vars(BONDConfig(**mine.given))
        vars(mine).update({n: v for n, v in made.items() if n not in ("given", "settled", "made")})
    names = [name for name in vars(config).keys() - config.made if name in SETTINGS or _is_near(name, config.settled)]
    own_names({name: getattr(config, name) for name in sorted(names)}, config.settled)
    mine.settled, mine.copied_from = {name: getattr(config, name) for name in config.settled}, config
    return mine


def _is_near(name: str, known: Iterable[str]) -> bool:
    """Whether it is a misspelt setting rather than an attribute of the script's own."""
    return bool(difflib.get_close_matches(name, list(known), n=1, cutoff=0.85))


def refuse_later(mine: Any) -> None:
    """Refuse attributes that were set on the original after it was copied.

    Raises:
        ConfigError: something was.
    """
    for name, value in _set_since(mine.copied_from, mine.settled).items():
        raise ConfigError(
            f"{name}={value!r} was set after the trainer had copied its args: set it before, or set trainer.args.{name}"
        )


def _set_since(config: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    return {name: now for name, value in before.items() if (now := getattr(config, name)) != value}
