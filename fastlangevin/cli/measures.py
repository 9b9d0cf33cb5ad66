"""diagnose: what a finished run's learning and chains do."""

from pathlib import Path
from typing import Annotated

import typer

from fastlangevin.cli.app import app, errors, run_config, unless_given


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="Folder of a run, a checkpoint, or a model's name.")],
    n: Annotated[int, typer.Option(min=16, help="Data, and chains, to compare.")] = 256,
    long: Annotated[int, typer.Option(min=1, help="Length of the long run, times K.")] = 10,
    starts: Annotated[int, typer.Option(min=2, help="Starts, and noises, for mixing.")] = 16,
    lags: Annotated[int, typer.Option(min=1, help="Of the correlations.")] = 15,
    seed: Annotated[int, typer.Option(help="Of data, chains and noise.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the files.", show_default="the run's, none for a model alone"
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The images.", show_default="those of the run")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    averaged: Annotated[
        bool, typer.Option(help="Look at the weights' moving average, not at what was learned.")
    ] = False,
) -> None:
    """Say how learning went, whether samples have the data's moments, and what the chains do.

    Prints a table and writes diagnose.json and, where matplotlib is installed, diagnose.png. A
    shipped or exported model has no log and no folder: files are written where --out says.
    """
    from fastlangevin.learn.build import choose_device, load_data
    from fastlangevin.learn.checkpoint import find_checkpoint, load, run_folder
    from fastlangevin.learn.diagnosis import diagnose as measures
    from fastlangevin.learn.diagnosis import report as reports
    from fastlangevin.learn.log import read_records, read_series
    from fastlangevin.learn.train import annealed

    with errors():
        checkpoint = find_checkpoint(run)
        folder = run_folder(checkpoint)
        config, info = run_config(checkpoint, data)
        sampler = load(checkpoint, device=choose_device(device), averaged=averaged)
        _, data_noise = annealed(config, info["iteration"] - 1)
        with unless_given("--data", data):
            learned = load_data(config)
        images = measures.noisy_batch(learned, n, data_noise, seed, choose_device(device))
        logs = ([], []) if folder is None else (read_records(folder), read_series(folder))
        # An older checkpoint's run went on: what its log says later is of other weights.
        until = [[line for line in log if line["iteration"] <= info["iteration"]] for log in logs]
        found = measures.diagnose(
            sampler, images, *until, seed=seed, long=long, starts=starts, lags=lags
        )
        typer.echo(reports.to_text(found))
        if (place := out or folder) is not None:
            facts = {"iteration": info.get("iteration"), "averaged": averaged, "seed": seed}
            for path in reports.save(found, place, f"{checkpoint.stem}, {n} chains", **facts):
                typer.echo(str(path))
