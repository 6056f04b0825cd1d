"""Which settings may change when a run is resumed: one rule for the command line and for Python."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bondlm.config.bond_config import (
    DEFAULTS,
    DERIVED,
    ENDLESS_SCHEDULES,
    LORA_LEARNING_RATE,
    PAPER_LEARNING_RATE,
    SETTINGS,
    default_anchor,
    default_average,
)
from bondlm.errors import ConfigError

# Besides the settings of BONDConfig: what may always change, and what decides which tensors a checkpoint has.
FREE_NAMES = ("eval_dataset", "judges", "resume", "allow_config_change")
FIXED_NAMES = ("use_peft",)
ADAPTER = "peft_config."  # before the fields of an adapter's config
FREE_IN_ADAPTER = ("lora_alpha", "lora_dropout", "alpha_pattern")


def changed_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], folder: Path, *, allowed: bool, edited: Sequence[str] = ()
) -> list[str]:
    """The differences between the settings of the run in `folder` and those given to resume it.

    `edited` are changes to files that the settings only name. A setting that is left out has its default.

    Raises:
        ConfigError: a setting differs that can never change, or any setting does and changes are not `allowed`.
    """
    free = {"always", "if endless"} if _is_endless(now) else {"always"}
    held, asked = settled_settings(before), settled_settings(now)
    known = sorted({*before, *now, *DERIVED})
    names = [n for n in known if held.get(n) != asked.get(n) and _may_change(n) not in free]
    said = {n: f"{n}: {_said(n, before, held)!r} -> {_said(n, now, asked)!r}" for n in names}
    changed = list(said.values())
    if fixed := [n for n in names if _may_change(n) == "never"]:
        values = "; ".join(said[n] for n in fixed)
        raise ConfigError(
            f"{', '.join(fixed)} cannot change in a run ({values}): the checkpoints of {folder} depend "
            "on them (optimizer, adapter, averaged weights). Keep them to continue the run, or start a "
            "new run from its weights in another output_dir"
        )
    changed += edited
    if changed and not allowed:
        only = ", which accepts the same rows under another name" if "train_dataset" in names else ""
        raise ConfigError(
            f"{folder} holds a run that was made with other settings ({'; '.join(changed)}): use those to continue it, "
            f"choose another output_dir, or add --allow_config_change{only} (in Python train(allow_config_change=True))"
        )
    return changed


def _said(name: str, given: Mapping[str, Any], whole: Mapping[str, Any]) -> Any:
    """A setting as it was given; None if it was not, unless its default depends on others."""
    return whole[name] if name in DERIVED else given.get(name)


def settled_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a run: those that are given, and the resulting values of all others."""
    whole = {name: _of(settings, name) for name in (*SETTINGS, *FIXED_NAMES, *settings)}
    if whole["anchor"] is None:
        whole["anchor"] = default_anchor(whole["objective"])
    if whole["average_weights"] is None:
        whole["average_weights"] = default_average(SimpleNamespace(**whole))
    if whole["learning_rate"] is None:
        whole["learning_rate"] = LORA_LEARNING_RATE if whole.get("use_peft") else PAPER_LEARNING_RATE
    return whole


def _of(settings: Mapping[str, Any], name: str) -> Any:
    """A setting's value in canonical form."""
    value = spelled(name, settings.get(name))
    default = DEFAULTS.get(name, False if name == "use_peft" else None)
    return getattr(default, "value", default) if value is None else value


def spelled(name: str, value: Any) -> Any:
    """A setting's value as it was meant: YAML makes False of a bare `no`."""
    return "no" if value is False and name in ("eval_strategy", "save_strategy", "logging_strategy") else value


def _may_change(name: str) -> str:
    """Whether an option may have a different value when a run is resumed: see `bondlm.config.settings.Setting`."""
    if name in FREE_NAMES:
        return "always"
    if name.startswith(ADAPTER):
        return "on demand" if name.removeprefix(ADAPTER) in FREE_IN_ADAPTER else "never"
    if name in FIXED_NAMES:
        return "never"
    return SETTINGS[name].may_change if name in SETTINGS else "on demand"


def _is_endless(settings: Mapping[str, Any]) -> bool:
    """Whether the learning rate of a step is the same however long the run lasts; a warmup below 1 is a share of it."""
    schedule, warmup = str(_of(settings, "lr_scheduler_type")), float(_of(settings, "warmup_steps") or 0)
    return schedule == "constant" or (schedule in ENDLESS_SCHEDULES and not 0 < warmup < 1)
