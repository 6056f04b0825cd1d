"""Where the commands print."""

import sys

from rich.console import Console

from bondlm.runfolder import is_main_process

PIPE_WIDTH = 120  # rich assumes 80 columns where there is no terminal, which breaks tables and lines in log files


def make_console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr; no colours, bars or control characters when piped.

    Of several processes of a run only the main one prints; errors, on stderr, come from all.
    """
    stream = sys.stderr if stderr else sys.stdout
    quiet = not stderr and not is_main_process()
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH, quiet=quiet)
