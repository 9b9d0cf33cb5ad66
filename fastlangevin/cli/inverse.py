"""restore, transfer."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastlangevin.cli.app import app, check_out, errors, run_config
from fastlangevin.cli.options import (
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
    save_tiles,
    some,
    squares,
)

_FAR = 3.0  # times the bounds of images: chains that end beyond it have left them
_FRAMES = 50  # of a GIF of chains, at most; and one more, the start


@app.command()
@with_fit("Fit (--method latent)", restarts="1")
def restore(
    run: Run,
    operator: Annotated[
        str, typer.Option(help="What is lost: mask, downsample, blur or grey.")
    ] = "mask",
    method: Annotated[
        str, typer.Option(help="posterior, clamped (masks) or latent.")
    ] = "posterior",
    n: Annotated[int, typer.Option(min=1, help="Images.")] = 8,
    answers: Annotated[int, typer.Option(min=1, help="Per image.")] = 4,
    out: Annotated[
        Path, typer.Option(help="A .png, or a .npz of images, y and x \\[n, answers, C, H, W].")
    ] = Path("restored.png"),
    images: Held = None,
    mask: Annotated[
        str | None,
        typer.Option(help="box, half, or a picture or .npy, 0 hidden.", show_default="box"),
    ] = None,
    factor: Annotated[int | None, typer.Option(help="Of downsample.", show_default="2")] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Of blur, in pixels.", show_default="1.0")
    ] = None,
    zeta: Annotated[
        float | None,
        typer.Option(help="Of posterior: |y - A x|^2 / zeta^2.", show_default="|A| sqrt(2 a)"),
    ] = None,
    seed: Seed = 0,
    steps: Steps = None,
    tile: Tile = 32,
    device: Device = "auto",
    averaged: Averaged = True,
    *,
    fit: dict[str, Any],
) -> None:
    """Restore held-out images from linear measurements y = A x: several answers for each.

    The picture has a row per image: the image, the measurement, the answers.
    """
    import torch

    from fastlangevin.learn.tasks import measurements as operators
    from fastlangevin.learn.tasks import restore as inverse

    with errors():
        check_out(out, ".png", ".npz")
        given = {"mask": mask, "factor": factor, "sigma": sigma}
        options: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        own = {"mask": "mask", "downsample": "factor", "blur": "sigma"}.get(operator)
        if others := [f"--{name}" for name in options if name != own]:
            verb = "do" if others[1:] else "does"
            raise ValueError(f"{', '.join(others)} {verb} not belong to --operator {operator}")
        if method != "latent":
            belong(fit, f"--method latent, got {method!r}")
        sampler, config = load_model(run, device, steps, averaged), run_config(run)[0]
        shape = sampler.energy.shape
        measure = operators.make_operator(operator, shape, **options)
        data = held_out(config, sampler, images)
        truth = some(data, n, sampler)
        y = measure(truth)
        restored = inverse.restore(
            sampler, y, measure, method=method, answers=answers, zeta=zeta, seed=seed, **fit
        )
        seen, x = operators.picture(measure, y, shape), restored.x
        if out.suffix == ".png":
            rows = torch.cat([truth[:, None], seen[:, None], x], 1)
            save_tiles(out, rows.flatten(0, 1), 2 + answers, tile)
        else:
            save_arrays(out, images=truth, y=y, x=x)
    error, spread = squares(truth[:, None], x), x.var(1, correction=0).mean()
    typer.echo(f"images       {n} of {data.name}")
    typer.echo(f"answers      {error.mean():.5f}   mean squared error per element, in [-1, 1]")
    typer.echo(f"best         {error.amin(1).mean():.5f}   of the {answers} for each image")
    typer.echo(f"their mean   {squares(truth, x.mean(1)).mean():.5f}")
    typer.echo(f"measurement  {squares(truth, seen).mean():.5f}   as the picture shows it")
    typer.echo(f"residual     {restored.residual.mean():.5f}   mean of (y - A x)^2")
    typer.echo(f"spread       {spread:.5f}   mean variance of an element over the answers")
    typer.echo(str(out))


@app.command()
def transfer(
    run: Annotated[Path, typer.Argument(help="The target domain's run, or a checkpoint of it.")],
    images: Annotated[str, typer.Option(help="The source images.", show_default=False)],
    n: Annotated[int, typer.Option(min=1, help="Images.")] = 8,
    out: Annotated[
        Path, typer.Option(help="A .png, a .gif of the chains, or a .npy \\[n, C, H, W].")
    ] = Path("transferred.png"),
    content: Annotated[
        int | None,
        typer.Option(min=1, help="Hold the source's means over squares of this side; 1: pixels."),
    ] = None,
    zeta: Annotated[
        float | None,
        typer.Option(help="Of content: |A x0 - A x|^2 / zeta^2.", show_default="|A| sqrt(2 a)"),
    ] = None,
    style: Annotated[str | None, typer.Option(help="Images whose statistics guide.")] = None,
    weight: Annotated[
        float | None, typer.Option(help="Of the style's term in the energy.", show_default="1.0")
    ] = None,
    statistics: Annotated[
        str | None, typer.Option(help="Of the style: gram or mean-std.", show_default="gram")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    steps: Steps = None,
    tile: Tile = 32,
    device: Device = "auto",
    averaged: Averaged = True,
) -> None:
    """Start chains of the target domain's model at source images.

    The picture has rows of source images and of what they became.
    """
    import torch

    from fastlangevin.learn.data.load import load_images
    from fastlangevin.learn.images import save_gif
    from fastlangevin.learn.tasks.measurements import Downsample, identity
    from fastlangevin.learn.tasks.transfer import guide

    with errors():
        check_out(out, ".png", ".gif", ".npy")
        options = {"zeta": zeta, "weight": weight, "statistics": statistics}
        given: dict[str, Any] = {
            name: value for name, value in options.items() if value is not None
        }
        if content is None:
            belong(given.keys() & {"zeta"}, "--content")
        if style is None:
            belong(given.keys() & {"weight", "statistics"}, "--style")
        sampler = load_model(run, device, steps, averaged)
        channels, size, _ = sampler.energy.shape
        sources = load_images(images, size=size, channels=channels)
        x0 = some(sources, n, sampler)
        pattern = None
        if style is not None:
            patterns = load_images(style, size=size, channels=channels)
            pattern = some(patterns, len(patterns), sampler)
        keep = None if content is None else identity if content == 1 else Downsample(content)
        guided = guide(sampler, x0, content=keep, style=pattern, **given)
        if out.suffix == ".gif":
            states = guided.trajectory(x0, seed=seed, every=-(-guided.steps // _FRAMES))
            save_gif(states, out, None, tile)
            x = states[-1]
        else:
            x = guided(x0, seed=seed)
        if out.suffix == ".png":
            save_rows(out, tile, x0, x)
        elif out.suffix == ".npy":
            save_array(out, x)
        with torch.no_grad():
            before, after = (sampler.energy(at).mean().item() for at in (x0, x))
    typer.echo(f"images   {n} of {sources.name}")
    typer.echo(f"energy   {before:+.4f} at the source, {after:+.4f} after {sampler.steps} steps")
    typer.echo(f"change   {squares(x0, x).mean():.5f}   mean square per element, in [-1, 1]")
    if (reached := float(x.abs().max())) > _FAR:
        typer.echo(f"warning: chains ended at up to {reached:.3g}, images lie in [-1, 1]", err=True)
    typer.echo(str(out))
