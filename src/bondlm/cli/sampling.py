"""Sampling options of `sample`, `score`, `eval` and `merge --curve`, checked before any work."""

import math
from collections.abc import Mapping
from typing import Any

from bondlm.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16")
LEAST_TEMPERATURE = 0.01  # smaller values mean greedy decoding, and logits divided by them may overflow
_LEAST = {
    **dict.fromkeys(("best_of", "num_samples", "max_completion_length", "max_prompt_length", "max_rows"), 1),
    "num_reference_samples": 2,
    "seed": 0,
}
_MAY_BE_UNSET = ("max_prompt_length", "max_rows")


def check_sampling(options: Mapping[str, Any]) -> None:
    """Refuse numbers with which no sampling is possible.

    Raises:
        ConfigError: an option is out of range.
    """
    for name, least in _LEAST.items():
        if name not in options or (options[name] is None and name in _MAY_BE_UNSET):
            continue
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r}: must be a whole number >= {least}")
    if not _is_temperature(value := options.get("temperature", 1.0)):
        raise ConfigError(f"temperature={value!r}: must be 0 (greedy) or at least {LEAST_TEMPERATURE}")
    if (dtype := options.get("dtype", "auto")) not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")


def _is_temperature(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == 0 or (math.isfinite(value) and value >= LEAST_TEMPERATURE)
