"""ROUGE-L against a reference text: F1 of the longest common subsequence of words (Lin 2004).

Words are lower-cased, without punctuation, and not stemmed.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

from bondlm.errors import DataError
from bondlm.evaluation.samples import words
from bondlm.rewards import NamedReward
from bondlm.rewards.answers import Failure
from bondlm.rewards.load import unused_name
from bondlm.rewards.texts import column_text, completion_text

NAME = "rouge_l"


def rouge_l(text: str, reference: str) -> float:
    """F1 in [0, 1]; 0 if either has no word."""
    mine, theirs = words(text), words(reference)
    common = common_subsequence(mine, theirs)
    return 2.0 * common / (len(mine) + len(theirs)) if common else 0.0


def common_subsequence(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, with one big integer per row of the table (Hyyrö 2004)."""
    places: dict[Hashable, int] = {}
    for i, item in enumerate(first):
        places[item] = places.get(item, 0) | 1 << i
    full = (1 << len(first)) - 1
    row = full
    for item in second:
        matches = row & places.get(item, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


def rouge_judge(rows: Sequence[Any], column: str, taken: Collection[str] = ()) -> NamedReward:
    """A judge that compares completions with a text column of the data; `taken` are the names of other rewards.

    Raises:
        DataError: the column is missing, or has a value that is neither text nor a number.
    """
    for i, row in enumerate(rows):
        if isinstance(column_text(column, row.get(column)), Failure):
            known = ", ".join(sorted(name for name in row if name not in ("prompt", "prompt_ids"))) or "none"
            raise DataError(
                f"row {i} has no text in the reference_column {column!r} (other columns: {known}): name a column that "
                "holds the text to compare with in every row"
            )
    return NamedReward(unused_name(NAME, taken), _judge(column), 0.0)


def _judge(column: str) -> Callable[..., list[float]]:
    def score(prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        return [rouge_l(completion_text(c), str(text)) for c, text in zip(completions, columns[column], strict=True)]

    return score
