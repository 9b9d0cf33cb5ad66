"""Progress of long work: a bar for long chains, and how functions report what they have done."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

# Called on the way as report(what, done, total): what is counted, how much is done, and all of it.
Report = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


def report_steps(report: Report, steps: int) -> dict[str, Any]:
    """Return the options of a sampler's call that report its steps, a hundred times at most."""
    every = max(1, steps // 100)
    return {"callback": lambda step, _: report("step", step, steps), "callback_every": every}


@contextlib.contextmanager
def step_bar(steps: int) -> Iterator[Callable[[int], None]]:
    """Yield a function of the number of steps done, which moves a bar on standard error.

    The bar is shown on terminals and in notebooks; nothing is written to a file or a pipe.
    """
    from rich.console import Console  # imported here, so that samplers do not wait for it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        "step", MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), console=console,
        disable=not (console.is_terminal or console.is_jupyter),
    )  # fmt: skip
    task = bar.add_task("chain", total=steps)
    with bar:
        yield lambda done: bar.update(task, completed=done)
