"""Errors that bondlm raises on purpose: each says what, where, the value seen and what to do.

Every class is also a standard exception, so `except ValueError` keeps working in user code, and carries the exit
code with which the command line ends (`cli` is the only place that turns one into the other).
"""

import errno
import re
from collections.abc import Sequence

MAX_LISTED = 10


class BondError(Exception):
    """Root of all errors that bondlm raises on purpose."""

    exit_code = 2
    # Whether every process of the run raises the same error at the same place, and can still save with the others.
    known_to_all = False


class Terminated(BaseException):
    """SIGTERM when there is nothing to finish or save; like KeyboardInterrupt, `except Exception` does not catch it."""


class ConfigError(BondError, ValueError):
    """A contradictory, unknown or impossible setting (exit code 2)."""

    exit_code = 2


class DataError(BondError, ValueError):
    """A prompt, row or file that cannot be used (exit code 3)."""

    exit_code = 3


class RewardError(BondError, RuntimeError):
    """A reward that raised or returned something that is not one finite number per completion (exit code 4)."""

    exit_code = 4


class RewardOutageError(RewardError):
    """A reward server that was down for longer than the run waits; the run is saved (exit code 4)."""


class NonFiniteError(BondError, ArithmeticError):
    """A loss, gradient or log-probability that is not finite (exit code 5)."""

    exit_code = 5


class CheckpointError(BondError, RuntimeError):
    """A checkpoint or run folder that is missing, incomplete or in use (exit code 6)."""

    exit_code = 6


class ResourceError(BondError, RuntimeError):
    """Out of memory or disk (exit code 7)."""

    exit_code = 7


class DataDesyncError(BondError, RuntimeError):
    """Processes of one run that work on different data, settings or steps (exit code 6)."""

    exit_code = 6


class WeightDesyncError(BondError, RuntimeError):
    """Processes of one run whose weights have drifted apart (exit code 5)."""

    exit_code = 5


class EngineError(BondError, RuntimeError):
    """A generation server that does not sample from the weights that are trained (exit code 5)."""

    exit_code = 5


class LostRankError(BondError, RuntimeError):
    """Another process of the run died, or did not answer within ddp_timeout (exit code 6)."""

    exit_code = 6


def out_of_space(error: BaseException) -> bool:
    """Whether a write failed because a disk or quota is full, or a file too large."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (
        found := re.search(r"\(os error (\d+)\)", str(error))
    ):  # raised by Rust, as safetensors does
        number = int(found.group(1))
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def listed(problems: Sequence[str], what: str) -> str:
    """For a message: one line each for the first 10 problems, and the number of the others."""
    lines = list(problems[:MAX_LISTED])
    if len(problems) > MAX_LISTED:
        lines.append(f"... and {len(problems) - MAX_LISTED} more {what}")
    return "\n".join(lines)


def as_list(text: object) -> str:
    """For a message: how a list is written, if this text may have been meant as one."""
    if not isinstance(text, str) or "," not in text:
        return ""
    return f" (a list is written '[{', '.join(part.strip() for part in text.split(','))}]')"
