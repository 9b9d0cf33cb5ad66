"""train, sample, check, export."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastlangevin.cli.app import (
    app,
    check_out,
    console,
    errors,
    plain_warnings,
    run_config,
    unless_given,
)
from fastlangevin.cli.options import with_settings

Report = Callable[[int, Any], None]
_FRAMES = 50  # of a GIF, at most; and one more, the start


@app.command()
@with_settings("Settings")
def train(
    *,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run.", show_default="runs/PRESET")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Settings to start from; see `presets`.", show_default="digits"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML, TOML or JSON file of settings.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run in OUT first.")
    ] = False,
    settings: dict[str, Any],
) -> None:
    """Learn an energy from images by short-run MCMC, into a folder.

    Settings come from a preset, then the config file, then options; what they resolve to is saved
    as OUT/config.yaml. Ctrl-C saves a checkpoint and stops; so do SIGTERM and SIGHUP. The exit
    status is then 130, 143 or 129.
    """
    from fastlangevin.learn import config as configs
    from fastlangevin.learn import run_folder as folders
    from fastlangevin.learn.train import StopRequest
    from fastlangevin.learn.train import train as learn

    stop = StopRequest()
    with errors(), plain_warnings():
        if resume:
            if out is None:
                raise ValueError("--resume needs --out, the folder of the run")
            if preset is not None or config is not None:
                raise ValueError("--resume takes the run's own settings: no --preset or --config")
            if folders.is_run(out):
                config = out / folders.CONFIG
        resolved = configs.resolve(preset, config, settings)
        name = preset or (config.stem if config else "digits")
        folder = out or _free_folder(Path("runs") / name)
        with _progress(resolved.iterations) as report:
            last = learn(
                resolved, folder, resume=resume, overwrite=overwrite, report=report, stop=stop
            )
    stopped = int(last.stem)
    with _shown():
        typer.echo(f"checkpoint  {last}")
        typer.echo(f"samples     {folder / 'samples.png'}")
        typer.echo(f"settings    {folder / folders.CONFIG}")
        if stopped < resolved.iterations:
            typer.echo(
                f"stopped at {stopped} of {resolved.iterations}; go on with --resume", err=True
            )
    if stopped < resolved.iterations and stop.signal is not None:
        raise typer.Exit(128 + stop.signal)


@app.command()
def sample(
    run: Annotated[
        Path,
        typer.Argument(help="Folder of a run, a checkpoint, or a model that comes with it."),
    ] = Path("digits"),
    n: Annotated[int, typer.Option(min=1, help="Images.")] = 64,
    out: Annotated[
        Path,
        typer.Option(help="A .png for a grid, a .gif of the chains, or a .npy \\[n, C, H, W]."),
    ] = Path("samples.png"),
    seed: Annotated[int, typer.Option(help="Of starting points and noise.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Langevin steps.", show_default="the run's")
    ] = None,
    columns: Annotated[
        int | None, typer.Option(min=1, help="Of the grid.", show_default="a square grid")
    ] = None,
    tile: Annotated[int, typer.Option(min=1, help="Enlarge small images to about this.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    averaged: Annotated[
        bool, typer.Option(help="Use the weights' moving average, where there is one.")
    ] = True,
) -> None:
    """Run chains from noise through a trained model and save the images."""
    import numpy as np

    from fastlangevin.learn.atomic import replacing
    from fastlangevin.learn.build import choose_device
    from fastlangevin.learn.checkpoint import load
    from fastlangevin.learn.images import save_gif, save_grid

    with errors():
        check_out(out, ".png", ".gif", ".npy")
        changes: dict[str, Any] = {} if steps is None else {"steps": steps}
        sampler = load(run, device=choose_device(device), averaged=averaged, **changes)
        if out.suffix == ".gif":
            states = sampler.trajectory(n=n, seed=seed, every=-(-sampler.steps // _FRAMES))
            save_gif(states, out, columns, tile)
        elif out.suffix == ".png":
            save_grid(sampler(n=n, seed=seed), out, columns, tile)
        else:
            with replacing(out) as temporary, temporary.open("wb") as file:
                np.save(file, sampler(n=n, seed=seed).cpu().numpy())
    typer.echo(str(out))


@app.command()
def check(
    run: Annotated[Path, typer.Argument(help="Folder of a run, a checkpoint, or a model's name.")],
    n: Annotated[int, typer.Option(min=1, help="Samples to judge.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 1,
    sure: Annotated[float, typer.Option(help="Fraction of sure samples to pass.")] = 0.5,
    data: Annotated[
        str | None, typer.Option(help="The images.", show_default="those of the run")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Ask a classifier of the real images whether the samples are recognisable.

    Passes (exit status 0) if it is more than 90 % sure of enough samples and finds every class.
    """
    from fastlangevin.learn.build import choose_device, load_data
    from fastlangevin.learn.checkpoint import load
    from fastlangevin.learn.evaluation.classifier import ClassifierCheck

    with errors():
        config = run_config(run, data)[0]
        with unless_given("--data", data):
            judge = ClassifierCheck(load_data(config))
        found = judge(load(run, device=choose_device(device))(n=n, seed=seed))
        for name, value in (
            ("real images", judge.of_data()),
            ("samples", found),
            ("uniform noise", judge.of_noise(n)),
        ):
            typer.echo(f"{name:<14} sure of {value.sure:4.0%}   per class {value.classes}")
    passed = found.sure >= sure and min(found.classes) > 0
    typer.echo("pass" if passed else "fail")
    raise typer.Exit(0 if passed else 1)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, a checkpoint, or a model's name.")],
    out: Annotated[Path, typer.Option(help="A .safetensors file.")] = Path("model.safetensors"),
) -> None:
    """Write a run's averaged weights and settings alone, as a small checkpoint to sample from."""
    from fastlangevin.learn import checkpoint

    with errors():
        check_out(out, ".safetensors")
        checkpoint.export(run, out)
    typer.echo(str(out))


@contextlib.contextmanager
def _progress(iterations: int) -> Iterator[Report]:
    """A progress bar on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        lines = _lines(iterations)

        def report(iteration: int, record: Any) -> None:
            with _shown():
                lines(iteration, record)

        yield report
        return
    columns = (
        TextColumn("iteration"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    bar = Progress(*columns, console=console)
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
    """Print, or go on in silence where the terminal or the reader of a pipe is gone.

    A run outlives them: it has a checkpoint to save.
    """
    with contextlib.suppress(OSError):
        yield
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            # What it still holds is flushed when the process ends, which must not fail.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def _lines(iterations: int) -> Report:
    every = max(1, iterations // 20)

    def report(iteration: int, record: Any) -> None:
        if iteration % every == 0 or iteration == iterations:
            typer.echo(f"iteration {iteration}/{iterations}  {_state(record)}", err=True)

    return report


def _state(record: Any) -> str:
    norm = record["grad_norm"]
    return f"gap {record['gap']:+.3f}" + ("" if norm is None else f"  |grad| {norm:.3f}")


def _free_folder(folder: Path) -> Path:
    """``folder``, or the first of folder-2, folder-3, ... that is not there yet."""
    tries = (folder.with_name(f"{folder.name}-{i}") for i in range(2, 10**6))
    return folder if not folder.exists() else next(path for path in tries if not path.exists())
