"""A progress bar for long chains."""

import contextlib
from collections.abc import Callable, Iterator


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
