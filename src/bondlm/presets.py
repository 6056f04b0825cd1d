"""Named settings: `preset: NAME` fills in what the user has not set."""

from collections.abc import Mapping
from typing import Any

from bondlm.errors import ConfigError

# "paper" is BONDConfig's defaults (Sessa et al. 2024, sections 5 and 6). Others name only what differs from them.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
}


def with_preset(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the preset that they name filled in below them; without `preset` they stay as they are.

    Raises:
        ConfigError: there is no such preset.
    """
    name = options.get("preset")
    if name is None:
        return dict(options)
    if name not in PRESETS:
        raise ConfigError(f"preset={name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name] | dict(options)
