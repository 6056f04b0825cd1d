"""What is said of a policy that no Best-of-N is worth: it certainly wins less than half against its reference."""

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
