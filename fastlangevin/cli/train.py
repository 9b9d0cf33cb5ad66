"""train: learn an energy from images."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from fastlangevin.cli.options import Flag, more, settings_options
from fastlangevin.cli.outputs import Result, flush, note, table

Report = Callable[[int, Any], None]


def train(
    *,
    out: Path | None = None,
    config: str | None = None,
    resume: Flag = False,
    overwrite: Flag = False,
    settings: "Annotated[settings_options(), more('Settings')]" = None,  # type: ignore[valid-type]
) -> Result:
    """Learn an energy from images by short-run MCMC, into a folder.

    Options change settings of the config. All settings of the run are saved as OUT/config.yaml.
    Ctrl-C, SIGTERM and SIGHUP save a checkpoint and stop the run, with exit status 130, 143 or 129.

    Args:
        out: Folder of the run (default: runs/CONFIG, or runs/CONFIG-2, ... if that exists).
        config: Settings to start from: a config in the package (see configs), or a YAML, TOML or
            JSON file (default: digits).
        resume: Continue the run in OUT.
        overwrite: Delete the run in OUT first.
    """
    from fastlangevin.learn import run_folder
    from fastlangevin.learn.config import resolve
    from fastlangevin.learn.train import StopRequest
    from fastlangevin.learn.train import train as learn

    stop = StopRequest()
    name = Path(config or "digits").stem
    if resume:
        if out is None:
            raise ValueError("--resume needs --out, the folder of the run")
        if config is not None:
            raise ValueError("--resume uses the settings of the run: do not give --config")
        if run_folder.is_run(out):
            config = str(out / run_folder.CONFIG)
    resolved = resolve(config, settings)
    folder = out or run_folder.free_folder(Path("runs") / name)
    with _progress(resolved.iterations) as report:
        last = learn(resolved, folder, resume=resume, overwrite=overwrite, report=report, stop=stop)
    text = table(
        ("checkpoint", str(last)),
        ("samples", str(folder / "samples.png")),
        ("settings", str(folder / run_folder.CONFIG)),
    )
    if (reached := int(last.stem)) < resolved.iterations:
        with _shown():
            note(f"stopped at {reached} of {resolved.iterations}; continue with --resume")
        if stop.signal is not None:
            return Result(text, status=128 + stop.signal)
    return Result(text)


@contextlib.contextmanager
def _progress(iterations: int) -> Iterator[Report]:
    """Yield a function that shows progress: as a bar on a terminal, else as occasional lines."""
    if not sys.stderr.isatty():
        lines = _lines(iterations)

        def print_line(iteration: int, record: Any) -> None:
            with _shown():
                lines(iteration, record)

        yield print_line
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("iteration"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("train", total=iterations, rate="", state="")

    def update(iteration: int, record: Any) -> None:
        speed = bar.tasks[task].speed
        with _shown():
            bar.update(task, completed=iteration, rate=f"{speed:.1f}/s" if speed else "")
            if record["grad_norm"] is not None:
                bar.update(task, state=_state(record))

    bar.start()
    try:
        yield update
    finally:
        with _shown():
            bar.stop()


@contextlib.contextmanager
def _shown() -> Iterator[None]:
    """Ignore errors of printing if the terminal or the reader of a pipe is gone.

    The run must continue, because it has a checkpoint to save.
    """
    with contextlib.suppress(OSError):
        yield
    flush()


def _lines(iterations: int) -> Report:
    every = max(1, iterations // 20)

    def report(iteration: int, record: Any) -> None:
        if iteration % every == 0 or iteration == iterations:
            note(f"iteration {iteration}/{iterations}  {_state(record)}")

    return report


def _state(record: Any) -> str:
    norm = record["grad_norm"]
    return f"gap {record['gap']:+.3f}" + ("" if norm is None else f"  |grad| {norm:.3f}")
