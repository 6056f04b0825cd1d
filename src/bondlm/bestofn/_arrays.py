"""Numpy or torch in, the same kind out; float64 in between.

Every function of `bondlm.bestofn` starts with `to_float64` and ends with `back`, so it is written once, in torch.
"""

import math
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Array = TypeVar("Array", NDArray[Any], torch.Tensor)


def to_float64(value: object, name: str) -> torch.Tensor:
    """Turn an array, tensor or nested list into a float64 tensor.

    A tensor keeps its device and its autograd graph. Anything else is copied.

    Args:
        value: numpy array, torch tensor, or what `numpy.array` accepts.
        name: the argument's name, for the error.

    Raises:
        ValueError: if `value` is not numeric.
    """
    if isinstance(value, torch.Tensor):
        return value.to(torch.float64)
    try:
        array = np.array(value, dtype=np.float64, order="C")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a numpy array or a torch tensor of numbers; got {value!r:.80}") from error
    return torch.from_numpy(array)


def back(result: torch.Tensor, like: Array, *others: object) -> Array:
    """Hand `result` back as a tensor if any input was one, else as numpy (a 0-dim result as `numpy.float64`)."""
    wanted: Any = result if any(isinstance(x, torch.Tensor) for x in (like, *others)) else result.numpy()[()]
    return wanted  # type: ignore[no-any-return]


def check_no_nan(values: torch.Tensor, name: str) -> None:
    """Raise ValueError on NaN: a NaN would lose every comparison here and win every `argmax` elsewhere."""
    if bool(values.isnan().any()):
        raise ValueError(
            f"{name} contains NaN ({int(values.isnan().sum())} of {values.numel()} values); "
            "give every sample a real reward, or drop it"
        )


def check_finite(values: torch.Tensor, name: str) -> None:
    """Raise ValueError unless every value is a finite number."""
    bad = ~values.isfinite()
    if bool(bad.any()):
        raise ValueError(f"{name} must be finite; got {float(values[bad][0])} ({int(bad.sum())} such values)")


def check_order(n: float) -> float:
    """Return the order of Best-of-N as a float; ValueError unless it is a finite real number >= 1."""
    order = float(n)
    if not (math.isfinite(order) and order >= 1.0):
        raise ValueError(f"n must be a finite real number >= 1; got {n!r}")
    return order


def check_probs(probs: torch.Tensor, name: str) -> torch.Tensor:
    """Check probabilities over the last dimension, return them normalised in float64.

    The sum may be off by 1e-4, as for a softmax over a vocabulary in float32 or lower precision; it is then divided
    out.

    Raises:
        ValueError: on an empty or 0-dim input, negative or non-finite entries, or a sum that is not 1.
    """
    if probs.ndim == 0 or probs.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one outcome in its last dimension; got shape {tuple(probs.shape)}")
    check_finite(probs, name)
    if bool((probs < 0).any()):
        raise ValueError(f"{name} must not be negative; got {float(probs.min())}")
    total = probs.sum(-1, keepdim=True)
    if bool(((total - 1.0).abs() > 1e-4).any()):
        worst = float(total.flatten()[(total - 1.0).abs().argmax()])
        raise ValueError(f"{name} must sum to 1 over the last dimension; got a sum of {worst:.8g}")
    return probs / total


def check_same_shape(first: torch.Tensor, first_name: str, second: torch.Tensor, second_name: str) -> None:
    """Raise ValueError unless both shapes are equal."""
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} and {second_name} must have the same shape; got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
