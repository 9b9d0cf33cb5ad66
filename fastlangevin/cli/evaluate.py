"""evaluate: how good a run's samples are, and whether they are new."""

from pathlib import Path
from typing import Annotated

import typer

from fastlangevin.cli.app import app, errors, plain_warnings

_BATCH = 256


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run, a checkpoint, or a model's name.")],
    n: Annotated[
        int | None, typer.Option(min=8, help="Images.", show_default="those held out, up to 2048")
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            help="auto, pixels, classifier, efficientnet-lite0, inception or module:attribute."
        ),
    ] = "auto",
    reference: Annotated[int, typer.Option(min=8, help="Training images to compare with.")] = 2048,
    noise: Annotated[
        list[float] | None,
        typer.Option(help="Of noisy data, as a yardstick; repeatable.", show_default="0.3"),
    ] = None,
    quantise: Annotated[
        bool, typer.Option(help="Round all images to 256 levels, as in picture files.")
    ] = True,
    k: Annotated[int, typer.Option(min=1, help="Of precision and recall.")] = 3,
    seed: Annotated[int, typer.Option(help="Of samples, noise and the choice of data.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The figures as JSON.",
            show_default="evaluate.json in the run's folder, none for a model alone",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The training images.", show_default="those of the run")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Held-out images.", show_default="those the run held out")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    averaged: Annotated[
        bool, typer.Option(help="Use the weights' moving average, where there is one.")
    ] = True,
) -> None:
    """Measure samples against the data, beside held-out data, noisy data and uniform noise.

    Frechet and kernel distance, precision and recall, inception score, and the nearest training
    image. Figures are of the features named above them: FID only with those of Inception.
    """
    import torch

    from fastlangevin.learn import evaluate as measures
    from fastlangevin.learn.build import choose_device, load_data, load_held_out
    from fastlangevin.learn.checkpoint import find_checkpoint, load, read_checkpoint, run_folder
    from fastlangevin.learn.config import resolve
    from fastlangevin.learn.features import make_features

    with errors():
        checkpoint = find_checkpoint(run)
        info = read_checkpoint(checkpoint)[1]
        if info.get("config") is None:
            raise ValueError(f"{run} was not made by `fastlangevin train`: it names no data")
        config = resolve(overrides=info["config"] | ({} if data is None else {"data": data}))
        place = choose_device(device)
        sampler = load(checkpoint, device=place, averaged=averaged)
        train = load_data(config)
        try:
            held = load_held_out(config, train.shape, images)
        except ValueError as error:
            if images is not None:
                raise
            typer.echo(f"no held-out images: {' '.join(str(error).split())}", err=True)
            held = None
        order = measures.shuffled(train if held is None else held, seed)
        if held is None:  # training images that the reference does not use
            reference = min(reference, len(train) // 2)
            order = order[reference:]
        name, source = ("held-out data", held) if held else ("other training images", train)
        if n is not None and n > len(order):
            raise ValueError(f"--n must be at most {len(order)}, the {name} there are, got {n}")
        n = n or min(2048, len(order))
        extract = make_features(features, train, place)
        real = source.batch(order[:n]).to(place)
        samples = torch.cat(
            [
                sampler(n=min(_BATCH, n - first), seed=seed, first_chain=first)
                for first in range(0, n, _BATCH)
            ]
        )
        sets = {name: real, "samples": samples}
        sets |= measures.yardsticks(real, [0.3] if noise is None else noise, seed)
        with plain_warnings():
            found = measures.evaluate(
                sets, train, extract, held_out=name if held else None, reference=reference,
                quantised=quantise, k=k, seed=seed,
            )  # fmt: skip
        typer.echo(measures.to_text(found))
        folder = run_folder(checkpoint)
        if (path := out or (folder and folder / "evaluate.json")) is not None:
            measures.save(
                found, path, run=str(run), iteration=info.get("iteration"), averaged=averaged,
                steps=sampler.steps, seed=seed, held_out=held.name if held else None,
            )  # fmt: skip
            typer.echo(str(path))
