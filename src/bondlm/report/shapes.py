"""The shapes of the files that a report reads, and the check against them.

A shape is `"number"` (a number or null), `"text"`, `"estimate"` (`{value, low, high}`), `[shape]` for a list, a mapping
for an object whose keys may be absent, or a mapping with the one key `"*"` for an object with any keys.
"""

from collections.abc import Mapping
from typing import Any

from bondlm.errors import DataError

ESTIMATE = ("value", "low", "high")
REQUIRED = ("effective_n", "win_rate", "kl", "reward")
_BASELINE = {
    "reward": "estimate",
    "win_rate": "estimate",
    "effective_n": "estimate",
    "completions/mean_length": "number",
    "completions/clipped_ratio": "number",
    "distinct_2": "number",
}
EVAL_SHAPE: dict[str, Any] = {
    **dict.fromkeys((*REQUIRED, "log_quantile", "kl_k3", "kl_per_token", "kl_k3_per_token"), "estimate"),
    **dict.fromkeys(("kl_of_best_of_n", "kl_ratio", "num_prompts", "num_samples", "steps", "planned_steps"), "number"),
    "last_step": "number",
    **dict.fromkeys(("num_reference_samples", "entropy", "distinct_1", "distinct_2"), "number"),
    **dict.fromkeys(("completions/mean_length", "completions/clipped_ratio", "reward_length_correlation"), "number"),
    "matched": {"*": "estimate"},
    "curve": [{"n": "number", "reward": "estimate", "win_rate": "number", "log_quantile": "number", "kl": "number"}],
    "against_best_of": [{"n": "number", "win_rate": "estimate", "forward_kl": "estimate", "backward_kl": "estimate"}],
    "quantile_histogram": {"edges": ["number"], "policy": ["number"]},
    "baselines": {"*": _BASELINE},
    "opponent": {"win_rate": "estimate"},
    "opponent_model": "text",
    **dict.fromkeys(("reference", "prompts_sha256"), "text"),
    "max_completion_length": "number",
    "stopped": "text",
    "judges": {"*": {"reward": "estimate", "reference_reward": "estimate", "win_rate": "estimate"}},
    "pairwise": {
        "*": {"win_rate": {"*": "estimate"}}
        | dict.fromkeys(("num_pairs", "num_failed", "num_decided", "agreement"), "number")
    },
    "warnings": ["text"],
    "cost": {"*": "number"},
    "rewards": ["text"],
    "reward_aggregation": "text",
    "reward_weights": ["number"],
    "reward_tolerances": ["number"],
    "versions": {"*": "text"},
}
SAMPLE_SHAPE: dict[str, Any] = {"prompt": "text"}
ANSWER_SHAPE: dict[str, Any] = {"text": "text", "reward": "number"}


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Raise a `DataError` that names the first place where `value` does not have the shape."""
    if isinstance(shape, list):
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        for i, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{i}]")
    elif isinstance(shape, Mapping):
        _check_object(value, shape, where)
    elif shape == "estimate":
        if not isinstance(value, Mapping) or any(name not in value for name in ESTIMATE):
            raise _wrong(where, "{value, low, high}", value)
        for name in ESTIMATE:
            check_shape(value[name], "number", f"{where}.{name}")
    elif shape == "text" and not isinstance(value, str):
        raise _wrong(where, "text", value)
    elif shape == "number" and not _is_number(value):
        raise _wrong(where, "a number", value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _check_object(value: Any, shape: Mapping[str, Any], where: str) -> None:
    if not isinstance(value, Mapping):
        raise _wrong(where, "an object", value)
    for name, item in value.items():
        if name in shape or "*" in shape:
            check_shape(item, shape.get(name, shape.get("*")), f"{where}.{name}")


def _wrong(where: str, wanted: str, value: Any) -> DataError:
    return DataError(f"{where} is {str(value)[:80]!r}, not {wanted}: run `bondlm eval` again to rewrite the file")
