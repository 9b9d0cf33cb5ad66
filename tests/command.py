"""Runs the `fastlangevin` command in this process, as a shell would run it in another."""

import contextlib
import io
import os
from typing import Any, NamedTuple
from unittest import mock

from fastlangevin.cli import main


class Finished(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def run_command(*arguments: Any, **environment: str) -> Finished:
    """Run `fastlangevin` on a wide terminal without colours; unexpected exceptions pass."""
    out, err = io.StringIO(), io.StringIO()
    wide = {"COLUMNS": "300", "NO_COLOR": "1", **environment}
    exits: Any = None
    with (
        mock.patch.dict(os.environ, wide),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit:
            exits = exit.code
    assert isinstance(exits, int), exits
    return Finished(exits, out.getvalue(), err.getvalue())
