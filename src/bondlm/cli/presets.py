"""Named settings: `preset: NAME` fills in settings that the user has not set."""

from collections.abc import Mapping
from typing import Any

from bondlm.errors import ConfigError

# "paper" is BONDConfig's defaults (Sessa et al. 2024, sections 5 and 6). Others list only differences from it.
# "fast" is for tens of steps: with the paper's eta the anchor needs hundreds to follow (docs/results.md).
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "fast": {"eta": 0.3, "learning_rate": 1e-4, "warmup_steps": 2},
}
LORA = {"fast": {"learning_rate": 3e-4}}  # few weights, larger steps


def with_preset(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, completed from the preset that they name; unchanged without `preset`.

    Raises:
        ConfigError: there is no such preset.
    """
    name = options.get("preset")
    if name is None:
        return dict(options)
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"preset={name!r}: choose one of {', '.join(PRESETS)}")
    settings = PRESETS[name] | (LORA.get(name, {}) if options.get("use_peft") else {})
    from bondlm.config import SETTINGS, WITHOUT_WARMUP, BONDConfig, default_anchor

    anchor = options.get("anchor") or default_anchor(str(options.get("objective", BONDConfig.objective)))
    # Settings for another schedule or anchor would be refused although the user has not set them.
    if options.get("lr_scheduler_type") in WITHOUT_WARMUP:
        settings.pop("warmup_steps", None)
    used = (None, ("anchor", anchor))
    return {key: value for key, value in settings.items() if SETTINGS[key].needs in used} | dict(options)
