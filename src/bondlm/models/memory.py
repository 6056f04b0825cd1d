"""Out of memory: half as many at a time, and the same work again. Drawing, scoring and learning all do this."""

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
    """What `work` returns, and `size`; if the memory was too small for it, None and half the size.

    Args:
        work: does something with `size` things at once; it must be possible to do it anew, with fewer.
        size: how many.
        things: their name.
        doing: what the work is.
        advice: what to change if not even one fits.
        may_halve: False if others wait for this very work.

    Raises:
        ResourceError: not even one fits, or `may_halve` is False.
    """
    try:
        return work(), size
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        reason = str(error).splitlines()[0]
    # Behind the `except`: the error's traceback holds the tensors that filled the memory.
    happened = f"out of memory while {doing} {size} {things if size > 1 else things.removesuffix('s')}"
    if size == 1 or not may_halve:
        raise ResourceError(f"{happened} ({reason}): {advice}")
    warnings.warn(f"bondlm: {happened}, continuing with {size // 2} ({reason})", stacklevel=3)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, size // 2
