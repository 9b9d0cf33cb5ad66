"""reconstruct, interpolate, restore, transfer."""

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlangevin.cli.app import app, check_out, errors, run_config, unless_given

if TYPE_CHECKING:
    from torch import Tensor

    from fastlangevin.learn.config import TrainConfig
    from fastlangevin.learn.data import ImageData
    from fastlangevin.sampler import LangevinSampler

_COLUMNS = 16
_FAR = 3.0  # times the bounds of images: chains that end beyond it have left them
_FRAMES = 50  # of a GIF of chains, at most; and one more, the start

Run = Annotated[Path, typer.Argument(help="Folder of a run, a checkpoint, or a model's name.")]
Held = Annotated[
    str | None, typer.Option(help="A source of images.", show_default="those the run held out")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Langevin steps.", show_default="the run's")]
Seed = Annotated[int, typer.Option(help="Of starting points and noise.")]
Tile = Annotated[int, typer.Option(min=1, help="Enlarge small images to about this.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Averaged = Annotated[
    bool, typer.Option(help="Use the weights' moving average, where there is one.")
]
# Options of a fit, by the name of `latent.reconstruct`'s argument: type, help, the rest.
_FIT: dict[str, tuple[type, str, dict[str, Any]]] = {
    "restarts": (int, "Starts that are fitted to each image; the best counts.", {"min": 1}),
    "iterations": (int, "Descent steps on the start.", {"min": 1}),
    "optimizer": (str, "adam, or gd for plain gradient descent.", {}),
    "lr": (float, "Of the descent.", {"show_default": "0.1 for adam, 0.05 for gd"}),
    "noise": (str, "In the chain: off, or frozen (always the same).", {}),
    "grad_through": (
        str, "exact: unrolled through the chain; straight: d M / d z taken as 1.", {}
    ),
    "checkpoint": (str, "none, step, auto, states, or bytes as 2GiB.", {}),
}  # fmt: skip


def _with_fit(
    panel: str, names: Iterable[str] = _FIT, **defaults: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options of a fit, and it, as ``fit``, those that the user sets.

    ``defaults`` are shown where they are not `reconstruct`'s.
    """
    from fastlangevin.learn import latent

    arguments = inspect.signature(latent.reconstruct).parameters

    def add(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        parameters = [p for p in signature.parameters.values() if p.name != "fit"]
        for name in names:
            kind, text, rest = _FIT[name]
            shown = {"show_default": defaults.get(name, str(arguments[name].default))}
            option = typer.Option(help=text, rich_help_panel=panel, **shown | rest)
            parameters.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[kind | None, option],
                )
            )

        def wrapped(*arguments: Any, **values: Any) -> None:
            fit = {name: values.pop(name, None) for name in names}
            fit = {name: value for name, value in fit.items() if value is not None}
            if fit.get("checkpoint", "").isdecimal():
                fit["checkpoint"] = int(fit["checkpoint"])
            command(*arguments, **values, fit=fit)

        wrapped.__doc__ = command.__doc__
        wrapped.__name__ = command.__name__
        wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapped

    return add


@app.command()
@_with_fit("Fit")
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
    from fastlangevin.learn import latent

    with errors():
        check_out(out, ".png", ".npz")
        sampler, config = _load(run, device, steps, averaged), run_config(run)[0]
        data = _held_out(config, sampler, images)
        truth = _some(data, n, sampler)
        found = latent.reconstruct(sampler, truth, seed=seed, **fit).best()
        drawn = sampler(n=samples, seed=seed)
        errors_of_drawn, nearest = _squares(truth[:, None], drawn[None]).min(1)
        if out.suffix == ".png":
            _save_rows(out, tile, truth, found.x, drawn[nearest])
        else:
            _save_arrays(out, images=truth, x=found.x, z=found.z, error=found.error)
    ours, theirs = float(found.error.mean()), float(errors_of_drawn.mean())
    typer.echo(f"images          {n} of {data.name}")
    typer.echo(f"reconstruction  {ours:.5f}   mean squared error per element, in [-1, 1]")
    typer.echo(f"best of {samples:<7} {theirs:.5f}   nearest random sample, likewise")
    typer.echo(f"ratio           {ours / theirs:.3f}")
    typer.echo(str(out))


@app.command()
@_with_fit("Fit (--images)", ("restarts", "iterations"))
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
    noise: Annotated[str, typer.Option(help=_FIT["noise"][1])] = "off",
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
    from fastlangevin.learn import latent
    from fastlangevin.learn.check import ClassifierCheck
    from fastlangevin.learn.images import save_gif, save_grid

    with errors():
        check_out(out, ".png", ".gif", ".npy")
        if images is None:
            _belong(fit, "--images")
        elif noise != "off":
            raise ValueError("--noise belongs to random starts: --images has them fitted without")
        sampler, config = _load(run, device, steps, averaged), run_config(run)[0]
        frames = frames or (25 if out.suffix == ".gif" else 9)
        where = next(iter(sampler.energy.parameters())).device
        z = numbers.initial((2 * n, *sampler.energy.shape), seed=seed, device=where)
        if images is not None:
            data = _held_out(config, sampler, images)
            truth = _some(data, n, sampler, 2)
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
            _save_array(out, x)
        learned = _labelled(config) if frames > 2 else None
        if learned is not None:
            best = ClassifierCheck(learned).probabilities(x.flatten(0, 1)).max(1).reshape(frames, n)
            ends, between = float(best[[0, -1]].mean()), float(best[1:-1].mean())
            typer.echo(f"end points  {ends:.3f}   the classifier's mean confidence, {2 * n} images")
            typer.echo(f"between     {between:.3f}   {n * (frames - 2)} images")
            typer.echo(f"ratio       {between / ends:.3f}")
    typer.echo(str(out))


@app.command()
@_with_fit("Fit (--method latent)", restarts="1")
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

    from fastlangevin.learn import inverse, operators

    with errors():
        check_out(out, ".png", ".npz")
        given = {"mask": mask, "factor": factor, "sigma": sigma}
        options: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        own = {"mask": "mask", "downsample": "factor", "blur": "sigma"}.get(operator)
        if others := [f"--{name}" for name in options if name != own]:
            verb = "do" if others[1:] else "does"
            raise ValueError(f"{', '.join(others)} {verb} not belong to --operator {operator}")
        if method != "latent":
            _belong(fit, f"--method latent, got {method!r}")
        sampler, config = _load(run, device, steps, averaged), run_config(run)[0]
        shape = sampler.energy.shape
        measure = operators.make_operator(operator, shape, **options)
        data = _held_out(config, sampler, images)
        truth = _some(data, n, sampler)
        y = measure(truth)
        restored = inverse.restore(
            sampler, y, measure, method=method, answers=answers, zeta=zeta, seed=seed, **fit
        )
        seen, x = operators.picture(measure, y, shape), restored.x
        if out.suffix == ".png":
            rows = torch.cat([truth[:, None], seen[:, None], x], 1)
            _save_grid(out, rows.flatten(0, 1), 2 + answers, tile)
        else:
            _save_arrays(out, images=truth, y=y, x=x)
    error, spread = _squares(truth[:, None], x), x.var(1, correction=0).mean()
    typer.echo(f"images       {n} of {data.name}")
    typer.echo(f"answers      {error.mean():.5f}   mean squared error per element, in [-1, 1]")
    typer.echo(f"best         {error.amin(1).mean():.5f}   of the {answers} for each image")
    typer.echo(f"their mean   {_squares(truth, x.mean(1)).mean():.5f}")
    typer.echo(f"measurement  {_squares(truth, seen).mean():.5f}   as the picture shows it")
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

    from fastlangevin.learn.data import load_images
    from fastlangevin.learn.images import save_gif
    from fastlangevin.learn.operators import Downsample, identity
    from fastlangevin.learn.style import guide

    with errors():
        check_out(out, ".png", ".gif", ".npy")
        options = {"zeta": zeta, "weight": weight, "statistics": statistics}
        given: dict[str, Any] = {
            name: value for name, value in options.items() if value is not None
        }
        if content is None:
            _belong(given.keys() & {"zeta"}, "--content")
        if style is None:
            _belong(given.keys() & {"weight", "statistics"}, "--style")
        sampler = _load(run, device, steps, averaged)
        channels, size, _ = sampler.energy.shape
        sources = load_images(images, size=size, channels=channels)
        x0 = _some(sources, n, sampler)
        pattern = None
        if style is not None:
            patterns = load_images(style, size=size, channels=channels)
            pattern = _some(patterns, len(patterns), sampler)
        keep = None if content is None else identity if content == 1 else Downsample(content)
        guided = guide(sampler, x0, content=keep, style=pattern, **given)
        if out.suffix == ".gif":
            states = guided.trajectory(x0, seed=seed, every=-(-guided.steps // _FRAMES))
            save_gif(states, out, None, tile)
            x = states[-1]
        else:
            x = guided(x0, seed=seed)
        if out.suffix == ".png":
            _save_rows(out, tile, x0, x)
        elif out.suffix == ".npy":
            _save_array(out, x)
        with torch.no_grad():
            before, after = (sampler.energy(at).mean().item() for at in (x0, x))
    typer.echo(f"images   {n} of {sources.name}")
    typer.echo(f"energy   {before:+.4f} at the source, {after:+.4f} after {sampler.steps} steps")
    typer.echo(f"change   {_squares(x0, x).mean():.5f}   mean square per element, in [-1, 1]")
    if (reached := float(x.abs().max())) > _FAR:
        typer.echo(f"warning: chains ended at up to {reached:.3g}, images lie in [-1, 1]", err=True)
    typer.echo(str(out))


def _load(run: Path, device: str, steps: int | None, averaged: bool) -> Any:
    from fastlangevin.learn.build import choose_device
    from fastlangevin.learn.checkpoint import load

    changes: dict[str, Any] = {} if steps is None else {"steps": steps}
    return load(run, device=choose_device(device), averaged=averaged, **changes)


def _held_out(config: "TrainConfig", sampler: Any, source: str | None) -> "ImageData":
    from fastlangevin.learn.build import load_held_out

    with unless_given("--images", source):
        return load_held_out(config, sampler.energy.shape, source)


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


def _belong(names: Iterable[str], owner: str) -> None:
    """ValueError if options were given, by name, that belong to another that was not."""
    if given := ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names)):
        raise ValueError(f"{given} {'belong' if ',' in given else 'belongs'} to {owner}")


def _some(data: "ImageData", n: int, sampler: "LangevinSampler", each: int = 1) -> "Tensor":
    """n times ``each`` images spread evenly over the data, on the sampler's device."""
    import torch

    from fastlangevin.scores.general import device_of

    if n * each > len(data):
        most = f"{len(data) // each}" + (f", of {each} images each" if each > 1 else "")
        raise ValueError(f"--n must be at most {most}, the images of {data.name}, got {n}")
    n *= each
    return data.batch(torch.arange(n) * len(data) // n).to(device_of(sampler.energy))


def _squares(a: "Tensor", b: "Tensor") -> "Tensor":
    """Mean squared difference per element: [..., C, H, W] -> [...]."""
    return (a - b).square().mean((-3, -2, -1))


def _save_rows(out: Path, tile: int, *rows: "Tensor") -> None:
    """A picture of bands of rows, in each what belongs together one above the other."""
    import torch

    bands = []
    for parts in zip(*(row.split(_COLUMNS) for row in rows), strict=True):
        width = min(len(rows[0]), _COLUMNS)
        for part in parts:  # the last band's rows are filled up with white
            white = part.new_ones((width - len(part), *part.shape[1:]))
            bands.append(torch.cat([part, white]))
    _save_grid(out, torch.cat(bands), width, tile)


def _save_grid(out: Path, images: "Tensor", columns: int, tile: int) -> None:
    from fastlangevin.learn.images import save_grid

    save_grid(images, out, columns, tile)


def _save_array(out: Path, array: "Tensor") -> None:
    import numpy as np

    from fastlangevin.learn.files import replacing

    with replacing(out) as temporary, temporary.open("wb") as file:
        np.save(file, array.detach().cpu().numpy())


def _save_arrays(out: Path, **arrays: "Tensor") -> None:
    import numpy as np

    from fastlangevin.learn.files import replacing

    found = {name: array.detach().cpu().numpy() for name, array in arrays.items()}
    with replacing(out) as temporary, temporary.open("wb") as file:
        np.savez(file, **found)  # type: ignore[arg-type]
