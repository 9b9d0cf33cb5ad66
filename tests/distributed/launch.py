"""Real processes with the environment variables of torchrun.

They are not forked from this process, which has threads of Gloo, whose locks a fork would copy. On
Linux they are forked from a server that has imported torch and has no threads: each rank alone
would take seconds for that.
"""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
_CONTEXT.set_forkserver_preload(["tests.distributed.test_launched"])


def launch(world_size: int, log: Path, function: Callable[..., Any], *arguments: Any) -> list[int]:
    """The exit status of every rank after ``function(*arguments)``; all print to ``log``.

    The function is one of a module, so that another interpreter can import it. A rank that has
    been stopped by SIGSTOP is killed when those above it have ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.write_bytes(b"")
    ranks = [
        _CONTEXT.Process(
            target=_run, args=(rank, world_size, port, log, function, arguments), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in reversed(ranks):
        deadline = time.monotonic() + 240
        while process.is_alive() and not _is_stopped(process.pid) and time.monotonic() < deadline:
            process.join(0.1)
        process.kill()
        process.join()
    return [-1 if process.exitcode is None else process.exitcode for process in ranks]


def _is_stopped(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # it has ended, or this is not Linux
        return False


def _run(
    rank: int,
    world_size: int,
    port: int,
    log: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
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
