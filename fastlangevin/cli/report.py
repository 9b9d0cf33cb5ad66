"""report: a run as one page."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fastlangevin.cli.app import app, errors
from fastlangevin.cli.evaluate import evaluate
from fastlangevin.cli.measures import diagnose
from fastlangevin.cli.tasks import interpolate, reconstruct, restore


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[
        Path | None, typer.Option(help="The page.", show_default="report.html in RUN")
    ] = None,
    compute: Annotated[
        bool,
        typer.Option("--compute", help="First make what RUN lacks: tasks, evaluation, diagnosis."),
    ] = False,
    device: Annotated[str, typer.Option(help="For --compute: auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Write one self-contained HTML page: samples, curves, results, diagnosis and settings.

    Pictures in RUN are shown with the text file of their name; --compute makes those of
    reconstruct, interpolate and restore, each as its command would, and says what it could not.
    """
    from fastlangevin.learn.folder import CONFIG, is_run
    from fastlangevin.learn.report import write_report

    with errors():
        if not is_run(run):
            raise FileNotFoundError(f"report: {run} holds no run (it has no {CONFIG} of one)")
        if compute:
            _compute(run, device)
        path = out or run / "report.html"
        write_report(run, path)
    typer.echo(str(path))


def _compute(run: Path, device: str) -> None:
    commands: dict[str, Callable[..., None]] = {
        "reconstructed.png": reconstruct,
        "interpolated.png": interpolate,
        "restored.png": restore,
        "evaluate.json": evaluate,
        "diagnose.json": diagnose,
    }
    for name, command in commands.items():
        if (run / name).exists():
            continue
        typer.echo(f"computing {name}", err=True)
        said = io.StringIO()
        # One that fails has said why, and the page is made of the others.
        with contextlib.suppress(typer.Exit), contextlib.redirect_stdout(said):
            command(run, out=run if command is diagnose else run / name, device=device)
            if name.endswith(".png"):
                lines = said.getvalue().splitlines()[:-1]  # the last is the picture's path
                (run / name).with_suffix(".txt").write_text("\n".join(lines) + "\n", "utf-8")
