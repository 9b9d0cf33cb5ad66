"""Child processes for tests: forked where that is safe, as importing torch takes seconds."""

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

# macOS and Windows cannot fork a process that has loaded torch.
_CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def start(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A started child process that runs a function; ``exitcode`` is negative after a signal."""
    process = _CONTEXT.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process
