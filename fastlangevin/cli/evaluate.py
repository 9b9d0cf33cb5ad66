"""evaluate: how good a run's samples are, and whether they are new."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlangevin.cli.app import app, check_out, errors, plain_warnings, run_config, unless_given

if TYPE_CHECKING:
    from torch import Tensor

    from fastlangevin.sampler import LangevinSampler

_BATCH = 256


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run, a checkpoint, or a model's name.")],
    n: Annotated[
        int | None, typer.Option(min=8, help="Images.", show_default="those held out, up to 2048")
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(
            help="Read the samples: a folder of pictures, .npy or .npz.",
            show_default="the run's model draws them",
        ),
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
            show_default="evaluate.json in the run's folder; none for a model alone or --samples",
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
    image. Figures are of the features named above them: FID only with those of Inception. Images
    are clamped to [-1, 1], and of each set the table says how much of it was outside.
    """
    from fastlangevin.learn.build import choose_device, load_data, load_held_out
    from fastlangevin.learn.checkpoint import find_checkpoint, load, run_folder
    from fastlangevin.learn.data.load import load_images
    from fastlangevin.learn.evaluation import evaluate as measures
    from fastlangevin.learn.evaluation.features import make_features

    with errors():
        if out is not None:
            check_out(out)
        if samples is not None and not averaged:
            raise ValueError("--no-averaged belongs to samples that the model draws, not --samples")
        checkpoint = find_checkpoint(run)
        config, info = run_config(checkpoint, data)
        place = choose_device(device)
        with unless_given("--data", data):
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
        given = None
        most = {name: len(order)}
        if samples is not None:
            given = load_images(samples, channels=train.shape[0], bounded=False)
            if given.shape != train.shape:
                raise ValueError(
                    f"--samples must be images of {list(train.shape)}, as the data are, got "
                    f"{given.name}"
                )
            most["samples"] = len(given)
        scarce = min(most, key=most.__getitem__)
        if n is not None and n > most[scarce]:
            raise ValueError(f"--n must be at most {most[scarce]}, the {scarce} there are, got {n}")
        n = n or min(2048, most[scarce])
        if n <= k:
            raise ValueError(f"--k must be less than the {n} images of a set, got {k}")
        extract = make_features(features, train, place)
        real = source.batch(order[:n]).to(place)
        marks = measures.yardsticks(real, [0.3] if noise is None else noise, seed)
        facts: dict[str, Any] = {"samples": samples}
        if given is None:
            sampler = load(checkpoint, device=place, averaged=averaged)
            drawn = _draw(sampler, n, seed)
            facts |= {
                "iteration": info.get("iteration"), "averaged": averaged, "steps": sampler.steps,
            }  # fmt: skip
        else:
            drawn = given.batch(measures.shuffled(given, seed)[:n]).to(place)
        with plain_warnings():
            found = measures.evaluate(
                {name: real, "samples": drawn} | marks, train, extract,
                held_out=name if held else None, reference=reference, quantised=quantise, k=k,
                seed=seed,
            )  # fmt: skip
        if given is not None:
            typer.echo(f"samples    {n} of {given.name}")
        typer.echo(measures.to_text(found))
        folder = run_folder(checkpoint) if given is None else None
        if (path := out or (folder and folder / "evaluate.json")) is not None:
            held_out = held.name if held else None
            measures.save(found, path, run=str(run), **facts, seed=seed, held_out=held_out)
            typer.echo(str(path))


def _draw(sampler: "LangevinSampler", n: int, seed: int) -> "Tensor":
    import torch

    firsts = range(0, n, _BATCH)
    return torch.cat([sampler(n=min(_BATCH, n - i), seed=seed, first_chain=i) for i in firsts])
