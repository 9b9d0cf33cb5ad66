"""Real processes with the environment variables of torchrun, forked because torch loads slowly."""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.processes import start


def launch(world_size: int, log: Path, function: Callable[..., Any], *arguments: Any) -> list[int]:
    """The exit status of every rank after ``function(*arguments)``; all print to ``log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("wb") as file:
        output = file.fileno()
        ranks = [
            start(_run, rank, world_size, port, output, function, arguments)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.join(120)
    return [-1 if process.exitcode is None else process.exitcode for process in ranks]


def _run(
    rank: int,
    world_size: int,
    port: int,
    output: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    for name, value in {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        os.environ[name] = str(value)
    function(*arguments)
