"""Commands in processes of their own, for what must be decided before Python, or Triton, is imported."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def run(
    *command: object, cwd: Path = ROOT, path: Iterable[Path] = (), timeout: float | None = None, **environment: str
) -> str:
    """The standard output of `command`, with `path` first on Python's; its standard error is shown where it fails."""
    paths = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(code: str, *arguments: object, **options: Any) -> str:
    """The standard output of a script; `options` are those of `run`."""
    return run(sys.executable, "-c", code, *arguments, **options)
