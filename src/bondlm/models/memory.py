"""After running out of memory, repeat the work with half as many items at a time; for drawing, scoring and learning."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from bondlm.errors import ResourceError

_T = TypeVar("_T")


def try_or_halve(
    work: Callable[[], _T], size: int, things: str, *, doing: str, advice: str, may_halve: bool = True
) -> tuple[_T | None, int]:
    """The result of `work`, and `size`; if memory was too small for it, None and half the size.

    Args:
        work: does something with `size` things at once; it must be repeatable with fewer.
        size: how many.
        things: what they are called.
        doing: what the work is.
        advice: what to change if not even one fits.
        may_halve: False if other processes wait for exactly this work.

    Raises:
        ResourceError: not even one fits, or `may_halve` is False.
    """
    try:
        return work(), size
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        reason = str(error).splitlines()[0]
    # After the `except` block, because the error's traceback holds the tensors that filled the memory.
    happened = f"out of memory while {doing} {size} {things if size > 1 else things.removesuffix('s')}"
    if size == 1 or not may_halve:
        raise ResourceError(f"{happened} ({reason}): {advice}")
    warnings.warn(f"bondlm: {happened}, continuing with {size // 2} ({reason})", stacklevel=3)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, size // 2
