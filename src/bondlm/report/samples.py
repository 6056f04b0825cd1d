"""The samples of all runs as the page's data, within a budget of bytes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from bondlm.errors import DataError
from bondlm.report.read import Run, Sample
from bondlm.report.safe import script_json, visible

BUDGET = 4_000_000  # bytes of all samples, to keep the page under 5 MB
# Tried in this order: whole texts, then texts cut at this many characters.
CUTS = (None, 4000, 2000, 1000, 500, 250)
CUT_MARK = " […]"


def samples_block(runs: Sequence[Run]) -> tuple[str, str]:
    """Return the JSON block for the page, and the note on texts or rows that were left out ("" if none)."""
    keys = _keys(runs)
    attempts = [(cut, 1) for cut in CUTS] + [(CUTS[-1], 2**k) for k in range(1, 32)]
    for cut, every in attempts:
        block = script_json([_run_data(run, own, cut, every) for run, own in zip(runs, keys, strict=True)])
        if len(block.encode()) <= BUDGET:
            return block, _note(cut, every)
    raise DataError(f"{len(runs)} runs have too many samples for one page: report on fewer runs at a time")


def _keys(runs: Sequence[Run]) -> list[list[int | None]]:
    """What each sample has in common with the other runs' samples of its prompt; None if that is not known.

    Runs on the same prompts have a prompt at the same place. Otherwise it is found by its whole text, where only one
    prompt of its run has that text.
    """
    prompts = {run.result.get("prompts_sha256") for run in runs}
    if len(prompts) == 1 and None not in prompts:
        return [list(range(len(run.samples))) for run in runs]
    known: dict[str, int] = {}
    counts = [Counter(sample.prompt for sample in run.samples) for run in runs]
    return [
        [known.setdefault(s.prompt, len(known)) if count[s.prompt] == 1 else None for s in run.samples]
        for run, count in zip(runs, counts, strict=True)
    ]


def _run_data(run: Run, keys: Sequence[int | None], cut: int | None, every: int) -> dict[str, Any]:
    """`rows` are flat lists: prompt, then text and reward of reference, Best-of-N and policy, then the prompt's key."""
    return {
        "name": visible(run.name),
        "best": run.best_of,
        "rows": [[*_row(sample, cut), key] for sample, key in list(zip(run.samples, keys, strict=True))[::every]],
    }


def _row(sample: Sample, cut: int | None) -> list[Any]:
    row: list[Any] = [_cut(visible(sample.prompt), cut)]
    for text, reward in (sample.reference, sample.best_of_n, sample.policy):
        row += [_cut(visible(text), cut), None if reward is None else float(f"{reward:.6g}")]
    return row


def _cut(text: str, cut: int | None) -> str:
    return text if cut is None or len(text) <= cut else text[:cut] + CUT_MARK


def _note(cut: int | None, every: int) -> str:
    parts = [f"only 1 of every {every} prompts is here"] if every > 1 else []
    parts += [f"texts are cut at {cut} characters"] if cut else []
    return f"To keep this page small, {' and '.join(parts)}; eval_samples.jsonl holds all." if parts else ""
