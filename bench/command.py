"""How the commands of the benchmarks end: with an exit status, quietly where the reader of their output left, and in a
line where a file cannot be read or written."""

import os
import sys
from collections.abc import Callable
from typing import Any

PIPE_CLOSED = 141  # what a shell reports after SIGPIPE


def exit_with(main: Callable[..., Any], *arguments: Any) -> None:
    """Ends the process with what `main` returns."""
    try:
        try:
            status = main(*arguments)
        finally:
            sys.stdout.flush()  # here, not while Python exits: `| head` closes the pipe
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains while it exits
        status = PIPE_CLOSED
    except OSError as error:
        status = str(error)  # printed, as status 1
    sys.exit(status)
