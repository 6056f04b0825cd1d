"""The only door through which rewards enter: one finite number a completion, or an error that says which is not.

torch and numpy both call NaN the largest element, so one NaN that slipped through would be distilled as the winner.

Shapes: B rows (one prompt with one completion each).
"""

import math
import numbers
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bondlm.errors import ConfigError, DataError, RewardError
from bondlm.rewards.calls import RewardFunction, call_all

_ADVICE = "Return one finite number a completion, and a low one for completions that cannot be judged."


@dataclass(frozen=True)
class NamedReward:
    """A reward function with the name that metrics and errors use and its weight in the sum.

    Raises:
        ConfigError: The weight is not a finite number.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    timeout: float | None = None  # seconds, of an asynchronous function; a server has time limits of its own

    def __post_init__(self) -> None:
        if not _is_real(self.weight) or not math.isfinite(self.weight):
            raise ConfigError(f"reward {self.name!r} has the weight {self.weight!r}: give a finite number.")


@dataclass(frozen=True)
class Scores:
    """Rewards of B rows: ``total`` (B,), the weighted sum, and ``by_name``, each reward (B,) before its weight.

    All are float64 on the CPU. ``bad`` says of each row without a finite total why, and is empty unless asked for.
    """

    total: Tensor
    by_name: dict[str, Tensor]
    bad: dict[int, str] = field(default_factory=dict)


def score(
    rewards: Sequence[NamedReward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    allow_bad_rows: bool = False,
) -> Scores:
    """Score B completions with every reward and check each value.

    Args:
        rewards: At least one, with different names.
        prompts: B strings, or B lists of chat messages.
        completions: B strings, or B lists of chat messages.
        columns: Further arguments by name, each a sequence of B; a function gets those that its signature accepts.
        allow_bad_rows: Note a row whose reward is not one finite real number in ``bad`` instead of raising.

    Raises:
        ConfigError: No reward, two rewards of one name, or a reward that wants an argument that is not there.
        DataError: Prompts, completions and columns differ in length, or a column is called like an argument.
        RewardError: A reward raised or did not return one finite real number a row.
        ResourceError: A reward ran out of memory.
    """
    offered = _offered_arguments(prompts, completions, columns or {})
    names = [reward.name for reward in rewards]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"rewards are called {names}: give at least one, each with a name of its own.")
    if not prompts:
        empty = torch.zeros(0, dtype=torch.float64)
        return Scores(empty, {name: empty.clone() for name in names})
    limits = {reward.name: reward.timeout for reward in rewards}
    answers = call_all([(reward.name, reward.function) for reward in rewards], offered, limits)
    bad: dict[int, str] | None = {} if allow_bad_rows else None
    by_name = {name: _checked(name, answer, prompts, bad) for name, answer in zip(names, answers, strict=True)}
    total = torch.zeros(len(prompts), dtype=torch.float64)
    for reward in rewards:
        total = total + reward.weight * by_name[reward.name]
    _refuse_non_finite("the weighted sum", total, prompts, bad)
    return Scores(total, by_name, bad or {})


def _offered_arguments(
    prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> dict[str, list[Any]]:
    for name in ("prompts", "completions"):
        if name in columns:
            raise DataError(f"the dataset column {name!r} has the name of a reward function's argument: rename it.")
    offered = {"prompts": list(prompts), "completions": list(completions)}
    offered |= {name: list(values) for name, values in columns.items()}
    for name, values in offered.items():
        if len(values) != len(prompts):
            raise DataError(f"{name!r} has {len(values)} rows and there are {len(prompts)} prompts: give one a prompt.")
    return offered


def _checked(name: str, answer: Any, prompts: Sequence[Any], bad: dict[int, str] | None) -> Tensor:
    """Turn an answer into a float64 tensor (B,) of finite numbers; raise RewardError, or note the rows in `bad`."""
    source = f"reward {name!r}"
    if isinstance(answer, np.ndarray):
        answer = _from_array(source, answer)
    if isinstance(answer, Tensor):
        values = _from_tensor(source, answer, len(prompts))
    elif isinstance(answer, (list, tuple)):
        _refuse_wrong_count(source, len(answer), len(prompts))
        numbers_B = [_number(source, value, row, prompts, bad) for row, value in enumerate(answer)]
        values = torch.tensor(numbers_B, dtype=torch.float64)
    else:
        raise RewardError(
            f"{source} returned a {type(answer).__name__} ({reprlib.repr(answer)}) for {len(prompts)} completions: "
            "return a list of numbers, an array or a tensor."
        )
    _refuse_non_finite(source, values, prompts, bad)
    return values


def _from_array(source: str, array: np.ndarray) -> Tensor | list[Any]:
    if array.dtype.kind in "iuf":
        return torch.from_numpy(array.astype(np.float64))
    if array.dtype.kind == "O" and array.ndim == 1:
        return list(array)
    raise RewardError(f"{source} returned an array of {array.dtype}: return real numbers.")


def _from_tensor(source: str, tensor: Tensor, count: int) -> Tensor:
    if tensor.dtype is torch.bool or tensor.is_complex():
        raise RewardError(f"{source} returned a tensor of {tensor.dtype}: return real numbers.")
    if tensor.ndim == 2 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.ndim != 1:
        raise RewardError(
            f"{source} returned a tensor of shape {tuple(tensor.shape)} for {count} completions: "
            f"return shape ({count},), one number a completion."
        )
    _refuse_wrong_count(source, len(tensor), count)
    return tensor.detach().cpu().to(torch.float64)  # CPU first: some devices have no float64


def _refuse_wrong_count(source: str, seen: int, wanted: int) -> None:
    if seen != wanted:
        raise RewardError(
            f"{source} returned {seen} values for {wanted} completions: return one number a completion, in order."
        )


def _number(source: str, value: Any, row: int, prompts: Sequence[Any], bad: dict[int, str] | None) -> float:
    """One element of a list as a float; bool, str, None and everything else that is not a real number is refused."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if not _is_real(value):
        problem = (
            f"{source} returned {reprlib.repr(value)} ({type(value).__name__}) {_place(row, prompts)}: "
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


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _refuse_non_finite(source: str, values: Tensor, prompts: Sequence[Any], bad: dict[int, str] | None) -> None:
    bad_rows = torch.nonzero(~torch.isfinite(values))[:, 0].tolist()
    if bad is not None:
        for row in bad_rows:
            bad.setdefault(row, f"{source} is {values[row].item()} {_place(row, prompts)}. {_ADVICE}")
    elif bad_rows:
        row = bad_rows[0]
        more = f" ({len(bad_rows)} rows in all)" if len(bad_rows) > 1 else ""
        raise RewardError(f"{source} is {values[row].item()} {_place(row, prompts)}{more}. {_ADVICE}")


def _place(row: int, prompts: Sequence[Any]) -> str:
    """Where a bad value is: the row and the head of its prompt, escaped so that it cannot steer a terminal."""
    prompt = prompts[row]
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")) if prompt else ""
    return f"for row {row} of {len(prompts)} (prompt {text[:80]!r})"
