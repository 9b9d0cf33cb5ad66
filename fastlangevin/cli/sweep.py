"""sweep."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fastlangevin.cli.app import app, errors
from fastlangevin.cli.options import with_settings


@app.command()
@with_settings("Settings: one value, or several to sweep over", lists=True)
def sweep(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the sweep.")] = Path("runs/sweep"),
    preset: Annotated[
        str | None,
        typer.Option(help="Settings to start from; see `presets`.", show_default="digits"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="File of settings, and axes (lists by setting), seeds and grid."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each point.", show_default="3")
    ] = None,
    grid: Annotated[
        bool | None,
        typer.Option(
            "--grid/--axes", help="All combinations, or one axis at a time.", show_default="axes"
        ),
    ] = None,
    settings: dict[str, str],
) -> None:
    """Train over lists of settings and seeds; tables and a plot of what comes of it.

    For example `sweep --steps 5,10,25,50 --width 8,16 --iterations 500 --seeds 3`. Every run is a
    folder in OUT, as of `train`. The same command goes on where it was stopped. Several processes
    share the runs by RANK and WORLD_SIZE in their environment, as torchrun sets them.
    """
    from fastlangevin.learn.sweep.plan import describe, read_sweep
    from fastlangevin.learn.sweep.report import write_report
    from fastlangevin.learn.sweep.run import Run, run_sweep
    from fastlangevin.learn.train import StopRequest

    stop = StopRequest()
    with errors():
        parsed = {name: _values(name, text) for name, text in settings.items()}
        plan = read_sweep(preset, config, parsed, seeds, grid)
        rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        total, count = len(plan.runs()[rank::world_size]), 0

        def report(run: Run, result: Mapping[str, Any]) -> None:
            nonlocal count
            count += 1
            where = f"{count}/{total}  {describe(run.settings)}, seed {run.config.seed}"
            typer.echo(f"{where}  {_outcome(result)}", err=True)

        results = run_sweep(
            plan,
            out,
            rank=rank,
            world_size=world_size,
            device=_own_device(plan.centre.device),
            report=report,
            stop=stop,
        )
        written = [] if results is None else write_report(plan, results, out)
    for path in written:
        typer.echo(str(path))
    if written and out / "sweep.svg" not in written:
        typer.echo('no plot: it needs matplotlib, pip install "fastlangevin[plot]"', err=True)
    if count < total:
        typer.echo("stopped; go on with the same command", err=True)
        raise typer.Exit(128 + (stop.signal or signal.SIGINT))
    if not written:
        typer.echo("done; the runs of other processes are not yet", err=True)


def _values(name: str, text: str) -> list[Any]:
    """A list without its brackets, as YAML: 5,10,25 or [-1, 1],none."""
    from fastlangevin.learn.bounded_yaml import parse_yaml

    try:
        values = parse_yaml(f"[{text}]")
    except ValueError as error:
        raise ValueError(f"--{name.replace('_', '-')} is no list of values: {text!r}") from error
    return [None if value == "none" else value for value in values]


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ValueError(f"{variable} must be a whole number, got {text!r}")
    return int(text)


def _own_device(device: str) -> str | None:
    """A process of torchrun's takes its own GPU."""
    import torch

    if "LOCAL_RANK" not in os.environ or device != "auto" or not torch.cuda.is_available():
        return None
    return f"cuda:{_number('LOCAL_RANK', 0) % torch.cuda.device_count()}"


def _outcome(result: Mapping[str, Any]) -> str:
    if result["diverged"]:
        return f"diverged at iteration {result['diverged']['iteration']}"
    sure = "" if result["sure"] is None else f"sure of {result['sure']:.0%}, "
    return f"{sure}Frechet distance {result['frechet']:.3g}"
