"""The command line: `bondlm train | sample | score | check | eval | sft | prefer | reward-model | merge | report`.

Nothing heavy is imported until a command runs, so that `--help` answers at once. This is the only place that turns
errors into exit codes.
"""

import atexit
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pickle import UnpicklingError
from types import TracebackType
from typing import Any

from bondlm import __version__
from bondlm.cli.help import command_help, greeting, main_help
from bondlm.cli.options import COMMANDS, parse
from bondlm.errors import BondError, ConfigError, RewardError, Terminated, out_of_space
from bondlm.runs.redact import redact, visible

INTERRUPTED = 128 + signal.SIGINT
CHECKPOINT, OUT_OF_RESOURCES, STOPPED = 6, 7, 75
UNREAD = 141  # as of a process that SIGPIPE ends
IN_ONE_PROCESS = ("sample", "score", "eval", "prefer", "merge", "report")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the documented exit code (docs/cli.md)."""
    if argv is None:  # the process is ours: unexpected errors must not print secrets either
        sys.excepthook = _write_traceback
    agreed = True
    try:
        code = _run(argv)
    except Terminated:  # only in this process, with nothing to save
        code, agreed = STOPPED, False
    except SystemExit as stop:
        agreed = False
        if isinstance(stop.__context__, BrokenPipeError):  # write_out and rich raise it
            code = UNREAD
        else:
            text = f"code that this command loaded has called sys.exit({stop.code!r}): it must raise an error instead"
            code = _fail(text, 1)
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        _leave_group(torch.distributed, code, agreed=agreed and code in (0, STOPPED))
    return code


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("--version", "-V"):
        return _say(f"bondlm {__version__}")
    if not arguments:
        return _say(greeting())
    if arguments[0] in ("--help", "-h", "help"):
        return _say(main_help())
    command, rest = arguments[0], arguments[1:]
    if command in COMMANDS and any(word in ("--help", "-h") for word in rest):
        return _say(command_help(command))
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # they are for bondlm's authors
    try:
        options = parse(command, rest)
        _refuse_several(command)
        return int(import_module(f"bondlm.cli.{command.replace('-', '_')}").run(options))
    except BondError as error:
        _show_users_traceback(error)
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except UnpicklingError as error:  # Trainer loads them only as data, so foreign code does not run
        return _fail(f"a file of the checkpoint is no plain data and was not loaded: {error}", CHECKPOINT)
    except Exception as error:
        spent = _what_is_spent(error)
        if spent is None:
            raise
        return _fail(f"{spent}: {str(error).partition(chr(10))[0]}", OUT_OF_RESOURCES)


def _refuse_several(command: str) -> None:
    """Refuse several processes: without sharing the work, each would do all of it and write the same files."""
    size = os.environ.get("WORLD_SIZE", "1")
    if command in IN_ONE_PROCESS and size.isdecimal() and int(size) > 1:
        raise ConfigError(
            f"bondlm {command} runs in one process, but WORLD_SIZE={size} says that a launcher has started several: "
            "start it without torchrun or accelerate launch, or unset WORLD_SIZE"
        )


def _what_is_spent(error: Exception) -> str | None:
    if out_of_space(error):
        return "the disk is full"
    return "out of memory" if _is_out_of_memory(error) else None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, including PyTorch's errors on GPU and CPU that a smaller batch did not avoid."""
    if isinstance(error, MemoryError) or "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from accelerate.utils.memory import should_reduce_batch_size

    return should_reduce_batch_size(error)


def _leave_group(distributed: Any, code: int, *, agreed: bool) -> None:
    """End one of several processes here, without the interpreter's own exit.

    Threads of gloo outlive the group if an FSDP2 mesh or a model still holds it, and a thread that asks a dying
    interpreter for its lock sometimes aborts the process (code 134).
    """
    several = distributed.get_world_size() > 1
    if agreed:  # all ranks end this way and none is in a collective; a single rank would wait for the others here
        distributed.destroy_process_group()
    if several:
        if agreed:
            atexit._run_exitfuncs()  # here experiment trackers end their runs
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _say(text: str) -> int:
    write_out(text.rstrip() + "\n")
    return 0


def write_out(text: str) -> None:
    """Write to stdout at once.

    Raises:
        SystemExit: the reader of the pipe has gone; as in rich, nothing more is written there.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(UNREAD) from None


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"bondlm: error: {visible(redact(message))}\n")
    return code


def _show_users_traceback(error: BondError) -> None:
    """Show the traceback of a user's reward function; the error itself follows."""
    cause = error.__cause__
    if isinstance(error, RewardError) and cause is not None and not isinstance(cause, BondError):
        _write_traceback(type(cause), cause, cause.__traceback__)


def _write_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback as Python would, without secrets and control characters."""
    sys.stderr.write(visible(redact("".join(traceback.format_exception(kind, error, trace)))))
