"""Settings and checks that several tests of the command use."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[..., Any]
TINY = {
    "width": 2,
    "steps": 2,
    "batch_size": 4,
    "iterations": 4,
    "save_every": 2,
    "log_every": 2,
    "sample_every": 2,
    "samples": 4,
    "device": "cpu",
}


def options(**changes: Any) -> list[str]:
    given = TINY | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_refused(result: Any, match: str) -> None:
    """Exit status 1 and one line that says why: no traceback, no half sentence."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    # The chains may have been announced before.
    (line,) = (line for line in result.stderr.splitlines() if " steps on " not in line)
    assert re.match(rf"error: .*{match}", line), line
