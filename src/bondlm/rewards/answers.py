"""Turn what a reward function returns into numbers: one per completion, or an error that names the bad one.

Shapes: B rows (one prompt with one completion each).
"""

import math
import numbers
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bondlm.errors import RewardError

_ADVICE = "Return one finite number per completion."


@dataclass(frozen=True)
class Failure:
    """Stands for a missing number and says why it is missing. Its prompt is dropped, or the reward fails."""

    reason: str


def checked(name: str, answer: Any, prompts: Sequence[Any], bad: dict[int, str] | None) -> tuple[Tensor, set[int]]:
    """Turn an answer into a float64 tensor (B,), and the set of rows for which it has None; these rows are NaN.

    All other values are finite; otherwise RewardError is raised or the row is noted in `bad`.
    """
    source = f"reward {name!r}"
    missing: set[int] = set()
    if isinstance(answer, np.ndarray):
        answer = _from_array(source, answer)
    if isinstance(answer, Tensor):
        values = _from_tensor(source, answer, len(prompts))
    elif isinstance(answer, Iterable) and not isinstance(answer, str | bytes | Mapping | Set):
        listed = list(answer)
        _refuse_wrong_count(source, len(listed), len(prompts))
        missing = {row for row, value in enumerate(listed) if value is None}
        numbers_B = [
            math.nan if value is None else _number(source, value, row, prompts, bad) for row, value in enumerate(listed)
        ]
        values = torch.tensor(numbers_B, dtype=torch.float64)
    else:
        raise RewardError(
            f"{source} returned a {type(answer).__name__} ({reprlib.repr(answer)}) for {len(prompts)} completions: "
            "return a list of numbers, an array or a tensor."
        )
    refuse_non_finite(source, values, prompts, bad, but=missing)
    return values, missing


def _from_array(source: str, array: np.ndarray) -> Tensor | list[Any]:
    if array.dtype.kind in "iufb":
        return torch.from_numpy(array.astype(np.float64))
    if array.dtype.kind == "O" and array.ndim == 1:
        return list(array)
    raise RewardError(f"{source} returned an array of {array.dtype}: return real numbers.")


def _from_tensor(source: str, tensor: Tensor, count: int) -> Tensor:
    if tensor.is_complex():
        raise RewardError(f"{source} returned a tensor of {tensor.dtype}: return real numbers.")
    if tensor.ndim == 2 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.ndim != 1:
        raise RewardError(
            f"{source} returned a tensor of shape {tuple(tensor.shape)} for {count} completions: "
            f"return shape ({count},), one number per completion."
        )
    _refuse_wrong_count(source, len(tensor), count)
    return tensor.detach().cpu().to(torch.float64)  # CPU first: some devices have no float64


def _refuse_wrong_count(source: str, seen: int, wanted: int) -> None:
    if seen != wanted:
        raise RewardError(
            f"{source} returned {seen} values for {wanted} completions: return one number per completion, in order."
        )


def _number(source: str, value: Any, row: int, prompts: Sequence[Any], bad: dict[int, str] | None) -> float:
    """One element of a list as a float, booleans as 0 and 1; anything that is not a real number is refused."""
    if isinstance(value, np.bool_) or (isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1):
        value = value.item()
    if not isinstance(value, numbers.Real):
        problem = (
            f"{source} {value.reason} {place_of(row, prompts)}"
            if isinstance(value, Failure)
            else f"{source} returned {reprlib.repr(value)} ({type(value).__name__}) {place_of(row, prompts)}: "
            f"that is not a real number. {_ADVICE}"
        )
        if bad is None:
            raise RewardError(problem)
        bad.setdefault(row, problem)
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an int beyond float64
        return math.inf


def refuse_non_finite(
    source: str, values: Tensor, prompts: Sequence[Any], bad: dict[int, str] | None, but: Set[int] = frozenset()
) -> None:
    """Raise RewardError for the first value (B,) that is not finite, or note all in `bad`; rows in `but` may be NaN."""
    bad_rows = [row for row in torch.nonzero(~torch.isfinite(values))[:, 0].tolist() if row not in but]
    if bad is not None:
        for row in bad_rows:
            bad.setdefault(row, f"{source} is {values[row].item()} {place_of(row, prompts)}. {_ADVICE}")
    elif bad_rows:
        row = bad_rows[0]
        more = f" ({len(bad_rows)} rows in all)" if len(bad_rows) > 1 else ""
        raise RewardError(f"{source} is {values[row].item()} {place_of(row, prompts)}{more}. {_ADVICE}")


def place_of(row: int, prompts: Sequence[Any]) -> str:
    """Where a bad value is: the row and the head of its prompt, escaped so that it cannot steer a terminal."""
    prompt = prompts[row]
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")) if prompt else ""
    return f"for row {row} of {len(prompts)} (prompt {text[:80]!r})"
