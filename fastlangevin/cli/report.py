"""report: a run, or a model, as one page."""

import contextlib
import functools
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlangevin.cli.app import app, errors
from fastlangevin.cli.evaluate import evaluate
from fastlangevin.cli.inverse import restore
from fastlangevin.cli.latent import interpolate, reconstruct
from fastlangevin.cli.measures import diagnose

if TYPE_CHECKING:
    from fastlangevin.learn.html_report import Weights

Commands = dict[str, Callable[..., None]]

# Sixteen times fewer evaluations than the command's own: seconds for the shipped model.
_SHORT: dict[str, Any] = {"n": 8, "restarts": 1, "iterations": 100}


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run, a checkpoint, or a model that comes with it.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page.", show_default="report.html in RUN, or here for a model alone"
        ),
    ] = None,
    compute: Annotated[
        bool,
        typer.Option(
            "--compute",
            help="First make what RUN lacks or has of other weights: tasks, evaluation, diagnosis.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="For what is made: auto, cpu, cuda or cuda:N.")] = (
        "auto"
    ),
) -> None:
    """Write one self-contained HTML page: samples, curves, results, diagnosis and settings.

    Pictures in RUN are shown with the text file of their name; --compute makes those of
    reconstruct, interpolate and restore, each as its command would, and says what it could not.
    For a model alone samples, interpolations and short fits of reconstructions are always made; it
    has no curves.
    """
    from fastlangevin.learn.build import choose_device
    from fastlangevin.learn.checkpoint import load
    from fastlangevin.learn.html_report import find_weights, write_report
    from fastlangevin.learn.images import save_grid
    from fastlangevin.learn.run_folder import is_run

    tasks: Commands = {"reconstructed.png": reconstruct, "interpolated.png": interpolate}
    more: Commands = {
        "restored.png": restore,
        "evaluate.json": evaluate,
        "diagnose.json": diagnose,
    }
    with errors():
        weights = find_weights(run)
        if is_run(run):
            if compute:
                _compute(run, run, weights, tasks | more, device)
            path = out or run / "report.html"
            write_report(run, path)
        else:
            path = out or Path("report.html")
            sampler = load(run, device=choose_device(device))
            with tempfile.TemporaryDirectory() as name:
                made = Path(name)
                save_grid(sampler(n=64, seed=0), made / "samples.png")
                if not compute:
                    tasks["reconstructed.png"] = functools.partial(reconstruct, **_SHORT)
                _compute(run, made, weights, tasks | more if compute else tasks, device)
                write_report(run, path, made)
    typer.echo(str(path))


def _compute(run: Path, folder: Path, weights: "Weights", commands: Commands, device: str) -> None:
    from fastlangevin.learn.atomic import replacing
    from fastlangevin.learn.html_report import ITERATION, age

    for name, command in commands.items():
        path = folder / name
        if path.exists() and not age(path, weights):
            continue
        typer.echo(f"computing {name}", err=True)
        said = io.StringIO()
        # One that fails has said why, and the page is made of the others.
        with contextlib.suppress(typer.Exit), contextlib.redirect_stdout(said):
            command(run, out=folder if command is diagnose else path, device=device)
            if path.suffix == ".png":
                lines = said.getvalue().splitlines()[:-1]  # the last is the picture's path
                text = [f"{ITERATION}{weights.iteration}", *lines]
                with replacing(path.with_suffix(".txt")) as temporary:
                    temporary.write_text("\n".join(text) + "\n", "utf-8")
