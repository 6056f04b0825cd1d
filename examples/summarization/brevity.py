"""The second goal of faithful.yaml: of two summaries that are equally faithful the one with fewer words is better."""

from typing import Any


def brevity(completions: list[str], **columns: Any) -> list[float]:
    """Minus the number of words; one without any says nothing, and counts as the longest of all."""
    counts = [len(text.split()) for text in completions]
    return [-float(count) if count else -1000.0 for count in counts]
