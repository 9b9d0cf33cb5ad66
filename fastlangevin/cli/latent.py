"""reconstruct, interpolate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlangevin.cli.app import app, check_out, errors, run_config
from fastlangevin.cli.options import (
    FIT,
    Averaged,
    Device,
    Held,
    Run,
    Seed,
    Steps,
    Tile,
    belong,
    with_fit,
)
from fastlangevin.cli.pictures import (
    held_out,
    load_model,
    save_array,
    save_arrays,
    save_rows,
    some,
    squares,
)

if TYPE_CHECKING:
    from fastlangevin.learn.config import TrainConfig
    from fastlangevin.learn.data.load import ImageData


@app.command()
@with_fit("Fit")
def reconstruct(
    run: Run,
    n: Annotated[int, typer.Option(min=1, help="Images.")] = 16,
    out: Annotated[Path, typer.Option(help="A .png, or a .npz of images, x, z and error.")] = Path(
        "reconstructed.png"
    ),
    images: Held = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Random samples, the best of which is the yardstick.")
    ] = 64,
    seed: Seed = 0,
    steps: Steps = None,
    tile: Tile = 32,
    device: Device = "auto",
    averaged: Averaged = True,
    *,
    fit: dict[str, Any],
) -> None:
    """Fit starts whose chains end at held-out images.

    The picture has rows of images, of reconstructions, and of the nearest random samples.
    """
    from fastlangevin.learn.tasks import reconstruct as latent

    with errors():
        check_out(out, ".png", ".npz")
        sampler, config = load_model(run, device, steps, averaged), run_config(run)[0]
        data = held_out(config, sampler, images)
        truth = some(data, n, sampler)
        found = latent.reconstruct(sampler, truth, seed=seed, **fit).best()
        drawn = sampler(n=samples, seed=seed)
        errors_of_drawn, nearest = squares(truth[:, None], drawn[None]).min(1)
        if out.suffix == ".png":
            save_rows(out, tile, truth, found.x, drawn[nearest])
        else:
            save_arrays(out, images=truth, x=found.x, z=found.z, error=found.error)
    ours, theirs = float(found.error.mean()), float(errors_of_drawn.mean())
    typer.echo(f"images          {n} of {data.name}")
    typer.echo(f"reconstruction  {ours:.5f}   mean squared error per element, in [-1, 1]")
    typer.echo(f"best of {samples:<7} {theirs:.5f}   nearest random sample, likewise")
    typer.echo(f"ratio           {ours / theirs:.3f}")
    typer.echo(str(out))


@app.command()
@with_fit("Fit (--images)", ("restarts", "iterations"))
def interpolate(
    run: Run,
    n: Annotated[int, typer.Option(min=1, help="Pairs of starts.")] = 8,
    out: Annotated[
        Path, typer.Option(help="A .png, a .gif, or a .npy \\[frames, n, C, H, W].")
    ] = Path("interpolated.png"),
    frames: Annotated[
        int | None, typer.Option(min=2, help="Ends included.", show_default="9, in a .gif 25")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Images to go between, as reconstructed.", show_default="random starts"),
    ] = None,
    noise: Annotated[str, typer.Option(help=FIT["noise"][1])] = "off",
    seed: Seed = 0,
    steps: Steps = None,
    tile: Tile = 32,
    device: Device = "auto",
    averaged: Averaged = True,
    *,
    fit: dict[str, Any],
) -> None:
    """Chains from starts between two: rho z1 + sqrt(1 - rho^2) z2.

    The two are random, or with --images fitted to a pair of these, as reconstruct does, so that the
    first and the last frame are reconstructions.
    Where the run's data have labels, a classifier of them is asked how sure it is on the way.
    """
    import torch

    from fastlangevin import noise as numbers
    from fastlangevin.learn.evaluation.classifier import ClassifierCheck
    from fastlangevin.learn.images import save_gif, save_grid
    from fastlangevin.learn.tasks import reconstruct as latent

    with errors():
        check_out(out, ".png", ".gif", ".npy")
        if images is None:
            belong(fit, "--images")
        elif noise != "off":
            raise ValueError("--noise belongs to random starts: --images has them fitted without")
        sampler, config = load_model(run, device, steps, averaged), run_config(run)[0]
        frames = frames or (25 if out.suffix == ".gif" else 9)
        where = next(iter(sampler.energy.parameters())).device
        z = numbers.initial((2 * n, *sampler.energy.shape), seed=seed, device=where)
        if images is not None:
            data = held_out(config, sampler, images)
            truth = some(data, n, sampler, 2)
            found = latent.reconstruct(sampler, truth, seed=seed, **fit).best()
            z, error = found.z, float(found.error.mean())
            typer.echo(f"images      {2 * n} of {data.name}")
            typer.echo(f"their fit   {error:.5f}   mean squared error per element, in [-1, 1]")
        x = latent.interpolate(sampler, z[::2], z[1::2], frames, noise=noise, seed=seed)
        if out.suffix == ".gif":
            save_gif(torch.cat([x, x[1:-1].flip(0)]), out, None, tile)
        elif out.suffix == ".png":
            save_grid(x.transpose(0, 1).flatten(0, 1), out, frames, tile)
        else:
            save_array(out, x)
        learned = _labelled(config) if frames > 2 else None
        if learned is not None:
            best = ClassifierCheck(learned).probabilities(x.flatten(0, 1)).max(1).reshape(frames, n)
            ends, between = float(best[[0, -1]].mean()), float(best[1:-1].mean())
            typer.echo(f"end points  {ends:.3f}   the classifier's mean confidence, {2 * n} images")
            typer.echo(f"between     {between:.3f}   {n * (frames - 2)} images")
            typer.echo(f"ratio       {between / ends:.3f}")
    typer.echo(str(out))


def _labelled(config: "TrainConfig") -> "ImageData | None":
    """A run's data if they are here and have labels; a word on it where they are not here."""
    from fastlangevin.learn.build import load_data

    try:
        data = load_data(config)
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"no classifier: {error}", err=True)
        return None
    if data.labels is None:
        return None
    typer.echo(f"fitting a classifier to {data.name}", err=True)
    return data
