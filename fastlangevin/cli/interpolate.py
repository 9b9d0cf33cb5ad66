"""interpolate: chains from points between two starting points."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastlangevin.cli.inputs import held_out, run_config, some
from fastlangevin.cli.options import Chains, Count, Run, ShortFit, belong, more
from fastlangevin.cli.outputs import Result, check_out, note, table

if TYPE_CHECKING:
    from fastlangevin.learn.config import TrainConfig
    from fastlangevin.learn.data.load import ImageData


def interpolate(
    run: Run,
    /,
    *,
    n: Count = 8,
    out: Path = Path("interpolated.png"),
    frames: Count | None = None,
    images: str | None = None,
    noise: str = "off",
    chains: Chains = Chains(),
    fit: Annotated[ShortFit | None, more("Fit (--images)")] = None,
) -> Result:
    """Run chains from points between two starting points.

    The points between z1 and z2 are rho z1 + sqrt(1 - rho^2) z2. The two are random. With --images
    they are fitted to a pair of images, as by reconstruct, and the first and the last frame are
    reconstructions. If the run's data have labels, a classifier of them says how sure it is of the
    ends and of the frames between them.

    Args:
        n: Number of pairs, 1 or more.
        out: A .png, a .gif, or a .npy of shape [frames, n, C, H, W].
        frames: Frames of each pair, 2 or more, the ends included (default: 9; 25 in a .gif).
        images: Source of images to go between (default: random starting points).
        noise: Noise in the chain: off, or frozen (always the same).
    """
    import torch

    from fastlangevin import noise as numbers
    from fastlangevin.gradients.network import device_of
    from fastlangevin.learn.evaluation.classifier import ClassifierCheck
    from fastlangevin.learn.images import save_arrays, save_gif, save_grid
    from fastlangevin.learn.tasks import reconstruct as task

    check_out(out, ".png", ".gif", ".npy")
    if images is None:
        belong(fit or (), "--images")
    elif noise != "off":
        raise ValueError("--noise belongs to random starts: --images has them fitted without noise")
    sampler, (config, _) = chains.load(run), run_config(run)
    frames = frames or (25 if out.suffix == ".gif" else 9)
    shape, place = (2 * n, *sampler.energy.shape), device_of(sampler.energy)
    z, rows = numbers.initial(shape, seed=chains.seed, device=place), []
    if images is not None:
        data = held_out(config, sampler, images)
        truth = some(data, n, sampler, 2)
        fitted = task.reconstruct(sampler, truth, seed=chains.seed, **fit or {}).best()
        z, error = fitted.z, float(fitted.error.mean())
        rows += [
            ("images", f"{2 * n} of {data.name}"),
            ("their fit", f"{error:.5f}   mean squared error per element, in [-1, 1]"),
        ]
    x = task.interpolate(sampler, z[::2], z[1::2], frames, noise=noise, seed=chains.seed)
    if out.suffix == ".gif":
        save_gif(torch.cat([x, x[1:-1].flip(0)]), out, None, chains.tile)
    elif out.suffix == ".png":
        save_grid(x.transpose(0, 1).flatten(0, 1), out, frames, chains.tile)
    else:
        save_arrays(out, x)
    labelled = _labelled(config) if frames > 2 else None
    if labelled is not None:
        sure = ClassifierCheck(labelled).probabilities(x.flatten(0, 1)).max(1).reshape(frames, n)
        ends, between = float(sure[[0, -1]].mean()), float(sure[1:-1].mean())
        rows += [
            ("end points", f"{ends:.3f}   the classifier's mean confidence, {2 * n} images"),
            ("between", f"{between:.3f}   {n * (frames - 2)} images"),
            ("ratio", f"{between / ends:.3f}"),
        ]
    return Result(table(*rows), [out])


def _labelled(config: "TrainConfig") -> "ImageData | None":
    """The run's data, if they can be read and have labels; a note if they cannot be read."""
    from fastlangevin.learn.build import load_data

    try:
        data = load_data(config)
    except (ImportError, OSError, ValueError) as error:
        note(f"no classifier: {error}")
        return None
    if data.labels is None:
        return None
    note(f"fitting a classifier to {data.name}")
    return data
