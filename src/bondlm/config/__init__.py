"""All settings of a run, and the checks on their combinations. What a setting does lives with the code that uses it."""

from bondlm.config.bond_config import (
    DEFAULTS,
    ENDLESS_SCHEDULES,
    LORA_LEARNING_RATE,
    OFF_POLICY,
    PAPER_LEARNING_RATE,
    SETTINGS,
    AnchorSchedule,
    BONDConfig,
    default_anchor,
    default_average,
    objective_of,
)
from bondlm.config.changes import ADAPTER, changed_settings
from bondlm.config.checks import WITHOUT_WARMUP, require_metric_of
from bondlm.config.optimization import check_own

__all__ = [
    "ADAPTER",
    "DEFAULTS",
    "ENDLESS_SCHEDULES",
    "LORA_LEARNING_RATE",
    "OFF_POLICY",
    "PAPER_LEARNING_RATE",
    "SETTINGS",
    "WITHOUT_WARMUP",
    "AnchorSchedule",
    "BONDConfig",
    "changed_settings",
    "check_own",
    "default_anchor",
    "default_average",
    "objective_of",
    "require_metric_of",
]
