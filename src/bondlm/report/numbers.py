"""The numbers of a report: headline, data for its tables, and formatting of numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bondlm.report.read import Run
from bondlm.runs.worth import below

NONE = "–"


def best_of_n_kl(n: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return KL(Best-of-N ‖ reference) = log N − (N−1)/N nats of continuous rewards (Beirami et al. 2024, 2401.01879).

    The same as `bondlm.bestofn.kl_bound`, for arrays, and repeated here so that a report does not import PyTorch.
    """
    return np.log(n) - (n - 1) / n


def best_of_n_win_rate(n: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Best-of-N's win rate against one reference sample, N/(N+1), of continuous rewards."""
    return n / (n + 1)


def number(value: Any) -> str:
    """Write a number with three significant digits; None (not finite, or absent) as a dash."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def percent(value: Any) -> str:
    """Write a share as whole percent."""
    return NONE if value is None else f"{value:.0%}"


def estimate(value: Mapping[str, Any] | None, decimals: int | None = None) -> str:
    """Write `{value, low, high}` as "0.86 [0.84, 0.88]"; an effective N has its own text.

    Args:
        value: the estimate.
        decimals: decimals of all three numbers; None uses `interval_decimals`.
    """
    if not value:
        return NONE
    if value.get("text"):
        return str(value["text"])
    ends = [value[name] for name in ("value", "low", "high")]
    if all(end is None for end in ends):
        return NONE
    decimals = interval_decimals(value) if decimals is None else decimals
    if decimals is None:
        shown = [number(end) for end in ends]
    else:
        shown = [NONE if end is None else f"{end:,.{decimals}f}" for end in ends]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def interval_decimals(value: Mapping[str, Any]) -> int | None:
    """Decimals that show two digits of half the interval's width; None if it has no width."""
    known = [value[name] for name in ("value", "low", "high") if value[name] is not None]
    spread = max(known) - min(known) if len(known) > 1 else 0.0
    return None if spread == 0.0 else min(max(1 - math.floor(math.log10(spread / 2)), 0), 6)


def kl_ratio(result: Mapping[str, Any]) -> float | None:
    """Return the policy's KL in units of the KL that Best-of-N needs at its effective N.

    None where N is unknown or cannot be distinguished from 1 (its interval contains 1), where any KL is an arbitrarily
    large multiple; also where the KL cannot be distinguished from 0, since the estimate may be negative.
    """
    value, low = result["effective_n"]["value"], result["effective_n"].get("low")
    if value is None or (low is not None and low <= 1):
        return None  # beyond the reference's samples, only a bound of N is known
    if any(end is not None and end <= 0 for end in (result["kl"]["value"], result["kl"].get("low"))):
        return None
    if "kl_ratio" in result:
        return _number_or_none(result["kl_ratio"])
    kl, needed = result["kl"]["value"], result.get("kl_of_best_of_n")
    return kl / needed if kl is not None and needed else None


def _number_or_none(value: Any) -> float | None:
    return None if value is None else float(value)


def headline(result: Mapping[str, Any]) -> str:
    """Return "One sample = Best-of-6.3 [5.1, 7.8], at 1.4x the KL that Best-of-6.3 needs."."""
    if (lost := below(result)) is not None:
        return f"One sample is {lost}."
    effective, ratio = result["effective_n"], kl_ratio(result)
    text = estimate(effective)
    if effective["value"] is None:
        return f"One sample = Best-of-N with N {text}."
    at = "" if ratio is None else f", at {ratio:.1f}x the KL that Best-of-{text.split(' ')[0]} needs"
    return f"One sample = Best-of-{text}{at}."


def curve(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the reference's Best-of-n rewards, `[{"n", "reward"}]`; from the baselines if there is no curve."""
    if result.get("curve"):
        return [dict(row) for row in result["curve"] if row.get("n") and row.get("reward")]
    baselines = result.get("baselines", {})
    points = (
        [{"n": 1, "reward": baselines["reference"]["reward"]}] if "reward" in baselines.get("reference", {}) else []
    )
    for name, row in baselines.items():
        order = name.removeprefix("reference, best of ")
        if order.isdecimal() and "reward" in row:
            points.append({"n": int(order), "reward": row["reward"]})
    return sorted(points, key=lambda point: point["n"])


def untouched_reward(result: Mapping[str, Any]) -> float | None:
    """Return the mean reward of the reference's samples, if the evaluation has it."""
    first = next(iter(curve(result)), None)
    return _number_or_none(first["reward"]["value"]) if first and first["n"] == 1 else None


def baseline_rows(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return name and numbers of the policy and of each baseline, the policy first."""
    return [("policy", result), *result.get("baselines", {}).items()]


def differences(runs: Sequence[Run]) -> list[str]:
    """List how runs differ from the first one in things that the numbers depend on, if both values are known."""
    first, found = runs[0], []
    for other in runs[1:]:
        for key, name, hit, show in COMPARED:
            mine, theirs = first.result, other.result
            if None not in (mine.get(key), theirs.get(key)) and mine[key] != theirs[key]:
                found.append(
                    f"{first.name} and {other.name} differ in {name} ({show(mine)}; {show(theirs)}): their {hit} do "
                    "not compare"
                )
    return found


def _shown(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda result: _listed(result[key])


def _shown_prompts(result: Mapping[str, Any]) -> str:
    count = f"{number(result.get('num_prompts'))} prompts"
    return f"{_listed(result['dataset'])}, {count}" if result.get("dataset") else count


_OF_REWARDS = "mean rewards, win rates and effective N"
COMPARED = (
    ("rewards", "their rewards", _OF_REWARDS, _shown("rewards")),
    ("reward_weights", "the weights of their rewards", _OF_REWARDS, _shown("reward_weights")),
    ("reward_aggregation", "how their rewards are combined", _OF_REWARDS, _shown("reward_aggregation")),
    ("reward_tolerances", "the tolerances of their rewards", _OF_REWARDS, _shown("reward_tolerances")),
    ("reference", "their reference", "win rates, effective N and KL", _shown("reference")),
    ("prompts_sha256", "their held-out prompts", "numbers", _shown_prompts),
    ("max_completion_length", "the maximum length of their answers", "numbers", _shown("max_completion_length")),
)


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def evaluation_points(run: Run) -> list[dict[str, Any]]:
    """Return the evaluations of a run in order: step, and each measure as `{value, low, high}`.

    The one from eval.json is at the step of the saved weights; the others are from the trainer, with its own (smaller)
    number of samples.
    """
    names = ("effective_n", "win_rate", "kl", "reward")
    points = [
        {"step": row.get("step")}
        | {name: {end: row.get(f"eval_{name}{tail}") for end, tail in _TAILS.items()} for name in names}
        for row in run.evaluations
    ]
    points.append({"step": run.result.get("steps")} | {name: run.result[name] for name in names})
    return sorted(points, key=lambda point: math.inf if point["step"] is None else point["step"])


_TAILS = {"value": "", "low": "_low", "high": "_high"}


def report_numbers(runs: Sequence[Run], version: str) -> dict[str, Any]:
    """Return the contents of `report.json`: each run's eval.json unchanged, its headline and its evaluations."""
    return {
        "bondlm": version,
        "differences": differences(runs),
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "headline": headline(run.result),
                "kl_ratio": kl_ratio(run.result),
                "evaluations": evaluation_points(run),
                "num_steps_logged": len(run.steps),
                "eval": run.result,
            }
            for run in runs
        ],
    }
