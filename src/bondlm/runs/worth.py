"""What is said of a policy that no Best-of-N is worth: it wins less than half against its reference."""

from collections.abc import Mapping
from typing import Any


def below(result: Mapping[str, Any], reference: str = "the reference") -> str | None:
    """Return "below the reference (win rate 0.31, under 0.5), so there is no N"; None where the policy is not below.

    Args:
        result: of an evaluation, with a `win_rate`.
        reference: what to call it.
    """
    wins = result.get("win_rate", {}).get("value")
    if wins is None or wins >= 0.5:
        return None
    return f"below {reference} (win rate {wins:.4g}, under 0.5), so there is no N"
