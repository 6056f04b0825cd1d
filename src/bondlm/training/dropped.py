"""Bad rows and prompts whose reward failed, which a run leaves out: counted, listed and limited in number.

Prompts that `missing_eos='drop'` leaves out are also counted and listed, but nothing failed, so they have no limit.

A prompt is dropped as a whole. The expected quantile of the best of N is N / (N + 1), so continuing with its remaining
samples would change the target of that prompt.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.prompts import load_prompts
from bondlm.data.scored import group_scored, usable_scored
from bondlm.errors import DataError, RewardError, listed
from bondlm.rollout.samples import Samples
from bondlm.rollout.truncated import REASON
from bondlm.runs.folder import DROPPED_FILE, SKIPPED_FILE
from bondlm.training.logs import append_by_each, unwritable
from bondlm.training.processes import World

_log = logging.getLogger(__name__)


class DropBudget:
    """Counts what is left out, on all processes and over the whole run, across resumes."""

    def __init__(self, fraction: float, folder: Path, *, skips_rows: bool = False) -> None:
        """At most `fraction` may be left out, both of the rows of the data and of the prompts seen so far.

        Unless `fraction` is 0, one is always allowed: otherwise the first prompts of a run would have no budget, since
        1% of ten prompts is less than one. Bad rows of the data are refused unless `skips_rows`.
        """
        self._skips_rows = skips_rows
        self._fraction, self._path = fraction, folder / DROPPED_FILE
        self.skipped_rows: list[str] = []
        self._num_rows = 0
        self._places: list[str] = []  # of the remaining rows, until they are encoded
        self.seen = self.dropped = self.left_out = 0

    def state(self) -> dict[str, int]:
        """The counts of prompts seen and left out so far, for a checkpoint."""
        return {"seen": self.seen, "dropped": self.dropped, "left_out": self.left_out}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Continue from a checkpoint."""
        self.seen, self.dropped, self.left_out = state["seen"], state["dropped"], state["left_out"]

    def load(self, source: Any, *, token_ids: bool = False) -> Dataset:
        """Read prompts; with `token_ids` they may be lists of token ids.

        Raises:
            DataError: prompts that cannot be used, or too many bad rows.
        """
        return self._without_bad(
            lambda skipped: load_prompts(source, skipped=skipped, token_ids=token_ids, places=self._places)
        )

    def usable(self, scored: Dataset, args: Any) -> Dataset:
        """Usable scored samples of prompts that have enough of them.

        Raises:
            DataError: see `usable_scored`, or too many bad rows.
        """
        return self._without_bad(lambda skipped: usable_scored(scored, args, self._places, skipped))

    def group(self, scored: Dataset, encoder: PromptEncoder, args: Any) -> Dataset:
        """One row per prompt, with its scored samples.

        Raises:
            DataError: see `group_scored`, or too many bad rows.
        """
        return self._without_bad(lambda skipped: group_scored(scored, encoder, args, self._places, skipped))

    def encode(self, prompts: Dataset, encoder: PromptEncoder) -> Dataset:
        """Encode prompts; those that are too long or refused by the chat template count as bad rows.

        Raises:
            ConfigError: the tokenizer or the settings do not fit.
            DataError: prompts that cannot be used, or too many bad rows.
        """
        where, self._places = self._places.__getitem__, []
        return self._without_bad(lambda skipped: encoder.with_ids(prompts, skipped, where))

    def _without_bad(self, read: Callable[[list[str] | None], Dataset]) -> Dataset:
        """The data that `read` keeps; only the first call counts rows, since grouped samples are fewer rows."""
        skipped = list[str]()
        dataset = read(skipped if self._skips_rows else None)
        self._num_rows = self._num_rows or len(dataset) + len(skipped)
        found = [*self.skipped_rows, *skipped]
        self.note_rows(found, self._num_rows - len(found))
        return dataset

    def note_rows(self, skipped: Sequence[str], num_good: int) -> None:
        """Record the bad rows of the data that were left out, each with its place and reason.

        Raises:
            DataError: there are too many.
        """
        self.skipped_rows = list(skipped)
        total = num_good + len(skipped)
        if self._is_too_many(len(skipped), total):
            raise DataError(
                f"{len(skipped)} of {total} rows are bad, more than max_skipped_frac={self._fraction} allows:\n"
                + listed(skipped, "bad rows")
            )

    def note(
        self, rows: Sequence[Mapping[str, Any]], samples: Samples, step: int, is_real_P: Tensor, world: World
    ) -> dict[str, float]:
        """Write the prompts of this process that a step drops; returns the metric over all processes.

        Rows that are not `is_real_P` were used before. Every process must call this.

        Raises:
            RewardError: on all processes, if too many rewards failed; the step is then not counted.
            ResourceError: on all processes, if one cannot write its prompts; the step is then not counted either.
        """
        dropped = {i: reason for i, reason in samples.dropped.items() if is_real_P[i]}
        left_out = [i for i in sorted(samples.left_out) if is_real_P[i]]
        ranks = world.gather(torch.tensor([[int(is_real_P.sum()), len(dropped), len(left_out)]]))
        num_rows, num_dropped, num_left_out = ranks.sum(dim=0).tolist()
        seen, all_dropped, all_left_out = self.seen + num_rows, self.dropped + num_dropped, self.left_out + num_left_out
        lost = dropped | dict.fromkeys(left_out, REASON)
        listed_rows = [{"step": step, "prompt": rows[i]["prompt"], "reason": r} for i, r in lost.items()]
        if failure := append_by_each(self._path, listed_rows, world):
            raise unwritable(failure, step)
        if num_left_out == num_rows and world.is_main:
            _log.warning(
                "step %d is skipped: for every prompt %s. Raise max_completion_length, or use missing_eos='worst'",
                step,
                REASON,
            )
        if self._is_too_many(all_dropped, seen):
            first = next(iter(dropped.values()), "None of them is on this process").rstrip(".")
            error = RewardError(
                f"step {step}: the rewards of {num_dropped} of {num_rows} prompts failed, {all_dropped} of "
                f"{seen} so far (max_skipped_frac={self._fraction}). {first}. All are in {self._path.name}."
            )
            error.known_to_all = True
            raise error
        self.seen, self.dropped, self.left_out = seen, all_dropped, all_left_out
        return {"bond/frac_dropped": (num_dropped + num_left_out) / num_rows}

    def summary(self) -> list[str]:
        """The summary at the end of a run: one line for each kind of omission."""
        lines = []
        if self.skipped_rows:
            lines.append(f"left out: {len(self.skipped_rows)} bad rows of train_dataset, first {self.skipped_rows[0]}")
        if self.dropped:
            lines.append(f"dropped: {self.dropped} of {self.seen} prompts, whose reward failed ({self._path})")
        if self.left_out:
            lines.append(f"dropped: {self.left_out} of {self.seen} prompts, because {REASON} ({self._path})")
        skipped = self._path.with_name(SKIPPED_FILE)
        if skipped.is_file():
            steps = {json.loads(line)["step"] for line in skipped.read_bytes().splitlines()}
            lines.append(f"skipped: {len(steps)} steps, whose loss or gradient was not finite ({skipped})")
        return lines

    def _is_too_many(self, count: int, total: int) -> bool:
        return count > (max(1.0, self._fraction * total) if self._fraction > 0 else 0.0)
