"""Where the commands print."""

import sys

from rich.console import Console

PIPE_WIDTH = 120  # rich assumes 80 columns where there is no terminal, which breaks tables and lines in log files


def make_console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr; no colours, bars or control characters when piped."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH)
