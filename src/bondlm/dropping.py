"""Prompts whose reward failed: dropped whole, counted, written down, and too many of them end the run.

Expected quantile of the best of N is N / (N + 1): a missing sample would change N, so that the prompt goes with it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bondlm.errors import RewardError
from bondlm.rollout import Samples
from bondlm.runfolder import DROPPED_FILE, append_jsonl


class DropBudget:
    """Counts dropped prompts against those seen since the process began."""

    def __init__(self, fraction: float, folder: Path) -> None:
        """At most `fraction` of the prompts seen may be dropped; one may be in any case unless it is 0."""
        self._fraction, self._path = fraction, folder / DROPPED_FILE
        self.seen = self.dropped = 0

    def note(self, rows: Sequence[Mapping[str, Any]], samples: Samples, step: int) -> dict[str, float]:
        """Write down the dropped prompts of a step; returns its metric.

        Raises:
            RewardError: they are too many, or all.
        """
        self.seen += len(rows)
        self.dropped += len(samples.dropped)
        if samples.dropped:
            lost = [{"step": step, "prompt": rows[i]["prompt"], "reason": r} for i, r in samples.dropped.items()]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_jsonl(self._path, lost)
        allowed = max(1.0, self._fraction * self.seen) if self._fraction > 0 else 0.0
        if self.dropped > allowed or len(samples.dropped) == len(rows) > 0:
            raise RewardError(
                f"step {step}: the rewards of {len(samples.dropped)} of {len(rows)} prompts failed, {self.dropped} of "
                f"{self.seen} so far (max_skipped_frac={self._fraction}). The first: "
                f"{next(iter(samples.dropped.values()))} All are in {self._path.name}."
            )
        return {"bond/frac_dropped": len(samples.dropped) / len(rows)}
