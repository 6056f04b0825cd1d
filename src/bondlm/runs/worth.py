"""How to describe a policy that certainly loses, so that no N fits it, or whose N is only known from below."""

import math
from collections.abc import Mapping
from typing import Any


def below(result: Mapping[str, Any], reference: str = "the reference") -> str | None:
    """Return "below the reference (win rate 0.31, under 0.5), so there is no N"; None where it may not be below.

    Args:
        result: of an evaluation, with a `win_rate` and its interval.
        reference: what to call it.
    """
    wins = result.get("win_rate")
    if wins is None or wins["high"] is None or not wins["high"] < 0.5:  # a single prompt has no interval
        return None
    return f"below {reference} (win rate {wins['value']:.4g}, under 0.5), so there is no N"


def at_least(result: Mapping[str, Any]) -> str:
    """Return "at least " where N is beyond the reference's samples, of which KL and cost are given then; else "".

    Args:
        result: of an evaluation, or as `eval.json` has it: an N beyond the samples is infinite, or None.
    """
    value = result["effective_n"]["value"]
    return "at least " if value is None or math.isinf(value) else ""
