"""What long commands show while they run: a line at the start, then bars or occasional lines."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from fastlangevin.cli.outputs import note, printing

PAUSE = 2.0  # least seconds between two lines


def start_line(work: str, sampler: Any, n: int, out: Any = None) -> None:
    """Print what a command begins: its work, and the steps, device, engine and precision.

    n: number of chains that run at a time, on which the choice of the engine may depend.
    """
    import torch

    weight, shape = next(sampler.energy.parameters()), sampler.energy.shape
    x = torch.zeros((n, *shape), dtype=torch.float32, device=weight.device)
    count = torch.get_num_threads()
    # The fused engine tries one thread against all of them, and keeps the faster.
    threads = f" with {'1 thread' if count == 1 else f'up to {count} threads'}"
    threads = threads if x.device.type == "cpu" else ""
    engine, precision = sampler.choose_engine(x, {}).name, sampler.precision or "fp32"
    note(
        f"{work}: {sampler.steps} steps on {'x'.join(map(str, shape))}, {x.device}{threads}, "
        f"engine {engine}, precision {precision}" + ("" if out is None else f", to {out}")
    )


@contextlib.contextmanager
def started(work: str, sampler: Any, n: int, out: Any = None) -> Iterator[Callable[..., None]]:
    """Print the line of :func:`start_line`, and yield the function of :func:`progress`."""
    start_line(work, sampler, n, out)
    with progress() as show:
        yield show


@contextlib.contextmanager
def progress(shown: bool = True, pause: float | None = None) -> Iterator[Callable[..., None]]:
    """Yield a function show(what, done, total, state=""), with a bar for everything it counts.

    If standard error is no terminal, it prints lines instead: at most one for every twentieth, and
    none within ``pause`` seconds (default: 2) of the start or of another line.

    shown: False shows nothing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = Progress(
        "{task.description}", MofNCompleteColumn(), BarColumn(), "{task.fields[rate]}",
        TimeRemainingColumn(), "{task.fields[state]}", console=Console(stderr=True),
        disable=not (shown and sys.stderr.isatty()),
    )  # fmt: skip
    tasks: dict[str, Any] = {}
    twentieth: dict[str, int] = {}
    last, pause = time.monotonic(), PAUSE if pause is None else pause

    def show(what: str, done: int, total: int, state: str = "") -> None:
        nonlocal last
        if not bar.disable:
            with printing():  # add_task prints, too
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total, rate="", state="")
                speed = bar.tasks[tasks[what]].speed
                rate = f"{speed:.1f}/s" if speed else ""
                bar.update(tasks[what], completed=done, total=total, rate=rate)
                if state:
                    bar.update(tasks[what], state=state)
            return
        part = done * 20 // total
        if part < twentieth.get(what, 0):  # another count of the same name has begun
            del twentieth[what]
        if shown and part > twentieth.get(what, 0) and time.monotonic() >= last + pause:
            twentieth[what], last = part, time.monotonic()
            note(f"{what} {done}/{total}" + (f"  {state}" if state else ""))

    with printing():
        bar.start()
    try:
        yield show
    finally:
        with printing():
            bar.stop()
