"""Benchmarks: measured, never asserted. README.md lists the commands."""

import sys
from types import TracebackType


def explain(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What ends a command: where a package is not installed one line that says how, else the traceback."""
    if isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name:
        where = " (Linux only)" if error.name == "triton" else ""
        print(f"{error}{where}: pip install -c constraints.txt -e '.[bench]'", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = explain
