"""Sampling options of `sample`, `score`, `eval` and `merge --curve`, checked before any work, and limits of rewards."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from bondlm.errors import ConfigError
from bondlm.objectives.rules import above, at_least, check, one_of, temperature

DTYPES = ("auto", "float32", "bfloat16")
_LEAST = {
    **dict.fromkeys(("best_of", "num_samples", "max_completion_length", "max_prompt_length", "max_rows"), 1),
    "num_reference_samples": 2,
    "seed": 0,
}
_MAY_BE_UNSET = ("max_prompt_length", "max_rows")
_RULES = {
    "reward_timeout_s": above(0, "seconds"),
    "reward_outage_s": at_least(0, "seconds"),
    "truncate_prompt": one_of("never", "left"),
    "temperature": temperature(),
}


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
    if (dtype := options.get("dtype", "auto")) not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    if not isinstance(graphs := options.get("cuda_graphs", True), bool):
        raise ConfigError(f"cuda_graphs={graphs!r}: must be true or false")
    rules = {name: rule for name, rule in _RULES.items() if name in options}
    check(SimpleNamespace(**{name: options[name] for name in rules}), **rules)


def reward_limits(options: Mapping[str, Any]) -> dict[str, Any]:
    """The time limits that the options set, as `load_rewards` takes them."""
    keywords = {"reward_timeout_s": "timeout", "reward_outage_s": "outage"}
    return {keyword: options[name] for name, keyword in keywords.items() if name in options}
