"""Reconstruct, interpolate, restore and transfer with a run's model and its images.

Every task returns a :class:`TaskResult`. Its arguments are those of the command of its name: ``n``
is the number of items, by default fewer than the command's if the source has fewer images; the
options ``fit`` are those of :func:`reconstruct`; and ``report(what, done, total)`` is called on the
way. Errors are mean squares per element, with images in [-1, 1].
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin.coarse import start_seed
from fastlangevin.gradients.modules import device_of
from fastlangevin.learn.build import load_data
from fastlangevin.learn.data.load import load_images
from fastlangevin.learn.evaluation.metrics import kernel_distance
from fastlangevin.learn.images import save_arrays, save_gif, save_grid, save_rows
from fastlangevin.learn.run_data import (
    load_held_out,
    packaged_images,
    run_config,
    spaced_images,
    suggesting,
)
from fastlangevin.learn.tasks.interpolate import interpolate
from fastlangevin.learn.tasks.measurements import Downsample, Operator, identity, measure, picture
from fastlangevin.learn.tasks.reconstruct import ITERATIONS, reconstruct
from fastlangevin.learn.tasks.restore import restore
from fastlangevin.learn.tasks.transfer import guide
from fastlangevin.progress import Report, report_steps, silent
from fastlangevin.sampler import LangevinSampler

_FAR = 3.0  # chains that end beyond this have left the range of images, [-1, 1]

Summary = list[tuple[str, str]]


class TaskResult(NamedTuple):
    """Rows (name, text) that summarise what a task found, and its images in the forms of files."""

    rows: Summary
    save_png: Callable[[Path, int], None]  # (path, size of a tile)
    arrays: Any  # a tensor for a .npy, or tensors by name for a .npz
    frames: Tensor | None = None  # [frames, n, C, H, W] of a .gif, if the task has one

    def save(self, path: Path, tile: int) -> None:
        """Write a .png, a .gif, or a .npy or .npz of the arrays."""
        if path.suffix == ".png":
            self.save_png(path, tile)
        elif path.suffix == ".gif" and self.frames is not None:
            save_gif(self.frames, path, None, tile)
        elif isinstance(self.arrays, Tensor):
            save_arrays(path, self.arrays)
        else:
            save_arrays(path, **self.arrays)


def reconstruct_run(
    run: str | Path,
    sampler: LangevinSampler,
    *,
    n: int | None = None,
    images: str | None = None,
    on_corrupt: str | None = None,
    samples: int = 64,
    seed: int = 0,
    report: Report = silent,
    **fit: Any,
) -> TaskResult:
    """Reconstruct n images that a run held out, or n images of the source ``images``.

    The picture has three rows: the images, their reconstructions and, for comparison, the nearest
    of some random samples. The arrays are images, x, z and error.
    """
    source, truth = _held_out(run, sampler, images, n, default_n=16, on_corrupt=on_corrupt)
    best = reconstruct(sampler, truth, seed=seed, **_reported(fit, report)).best()
    drawn = sampler(n=samples, seed=seed)
    error, nearest = _squares(truth[:, None], drawn[None]).min(1)
    ours, theirs = float(best.error.mean()), float(error.mean())
    rows = [
        ("images", f"{len(truth)} of {source}"),
        ("reconstruction", f"{ours:.5f}   mean squared error per element, in [-1, 1]"),
        (f"best of {samples}", f"{theirs:.5f}   the same for the nearest random sample"),
        ("ratio", f"{ours / theirs if theirs else math.inf:.3f}"),
    ]
    return TaskResult(
        rows,
        lambda path, tile: save_rows(path, tile, truth, best.x, drawn[nearest]),
        {"images": truth, **best._asdict()},
    )


def interpolate_run(
    run: str | Path,
    sampler: LangevinSampler,
    *,
    n: int | None = None,
    frames: int = 9,
    images: str | None = None,
    on_corrupt: str | None = None,
    noise: str = "off",
    seed: int = 0,
    report: Report = silent,
    **fit: Any,
) -> TaskResult:
    """Interpolate between n pairs of random starts, or of starts fitted to images.

    Random starts are those of the first model if chains go coarse to fine. The picture has a row
    per pair, the GIF goes there and back, and the array is [frames, n, ...].
    """
    run_config(run)  # raises an error for a checkpoint without data before any work
    rows: Summary = []
    if images is None:
        z = _first_starts(sampler, 2 * (8 if n is None else n), seed)
    else:
        source, truth = _held_out(run, sampler, images, n, images_per_item=2, on_corrupt=on_corrupt)
        best = reconstruct(sampler, truth, seed=seed, **_reported(fit, report)).best()
        z = best.z
        rows = [
            ("images", f"{len(truth)} of {source}"),
            ("their fit", f"{best.error.mean():.5f}   mean squared error per element, in [-1, 1]"),
        ]
    x = interpolate(
        sampler, z[::2], z[1::2], frames, noise=noise, first=images is None, seed=seed,
        report=report,
    )  # fmt: skip
    return TaskResult(
        rows,
        lambda path, tile: save_grid(x.transpose(0, 1).flatten(0, 1), path, len(x), tile),
        x,
        torch.cat([x, x[1:-1].flip(0)]),
    )


def feature_rows(
    run: str | Path, frames: Tensor, note: Callable[[str], None] | None = None
) -> Summary:
    """Return rows that say how far frames between two ends are from the run's data, in features.

    They hold the kernel distances to at most 512 images of the data: for the end frames, for the
    frames between them, and, for comparison, for crossfades of the end frames' pixels. ``note`` is
    called before the features are computed, which can take a minute. Returns no rows if there are
    fewer than two images between the ends or, with a warning, if the data or features are missing.
    """
    from fastlangevin.learn.evaluation.features import (  # imports scikit-learn
        make_features,
        quantise,
    )

    if len(frames[1:-1].flatten(0, 1)) < 2:
        return []  # the distance needs two images
    try:
        data = packaged_images(run) or load_data(run_config(run))
        features = make_features("auto", data, frames.device)
    except (ImportError, OSError, ValueError) as error:
        warnings.warn(f"no features to judge the frames by: {error}", stacklevel=2)
        return []
    if note is not None:
        note(f"comparing the frames with {data.name} in features")
    real = features(spaced_images(data, min(len(data), 512), frames.device))[0]
    weights = torch.linspace(0, 1, len(frames), dtype=frames.dtype, device=frames.device)
    weights = weights[1:-1, None, None, None, None]
    crossfade = (1 - weights) * frames[0] + weights * frames[-1]
    text = f"kernel distance to {len(real)} images, in {features.name}"
    rows: Summary = []
    for name, x, what in (
        ("end points", frames[[0, -1]], text),
        ("between", frames[1:-1], "the same for the frames between them"),
        ("crossfade", crossfade, "the same for mixtures of the end points' pixels"),
    ):
        distance = kernel_distance(features(quantise(x.flatten(0, 1)))[0], real)
        rows.append((name, f"{distance:.4f}   {what}"))
    return rows


def restore_run(
    run: str | Path,
    sampler: LangevinSampler,
    operator: Operator,
    *,
    n: int | None = None,
    images: str | None = None,
    on_corrupt: str | None = None,
    method: str = "moments",
    measurement_noise: float = 0.0,
    seed: int = 0,
    report: Report = silent,
    **options: Any,
) -> TaskResult:
    """Measure n images that a run held out, or n images of the source ``images``; restore them.

    The picture has a row per image: the image, its measurement, the mean of the answers, and the
    answers. The arrays are images, y, x and mean. ``options`` are those of :func:`restore`, whose
    method "moments" alone takes the noise of the measurements into account.
    """
    source, truth = _held_out(run, sampler, images, n, on_corrupt=on_corrupt)
    if method == "latent":
        options = _reported(options, report)
    else:
        options["callback"] = lambda step, _: report("step", step, sampler.steps)
    if method == "moments":
        options["measurement_noise"] = measurement_noise
    y = measure(operator, truth, measurement_noise, seed)
    x, residual, mean = restore(sampler, y, operator, method=method, seed=seed, **options)
    seen = picture(operator, y, _shape(sampler))
    error = _squares(truth[:, None], x)
    of_mean, of_seen = _squares(truth, mean), _squares(truth, seen)
    spread = x.var(1, correction=0).mean()
    rows = [
        ("images", f"{len(truth)} of {source}"),
        ("answers", f"{error.mean():.5f}   mean squared error per element, in [-1, 1]"),
        ("best", f"{error.amin(1).mean():.5f}   of the {x.shape[1]} for each image"),
        ("their mean", f"{of_mean.mean():.5f}   smallest expected error"),
        ("measurement", f"{of_seen.mean():.5f}   error of the measurement shown as an image"),
        ("residual", f"{residual.mean():.5f}   mean of (y - A x)^2"),
        ("spread", f"{spread:.5f}   mean variance of an element over the answers"),
    ]
    grid = torch.cat([torch.stack([truth, seen, mean], 1), x], 1)
    return TaskResult(
        rows,
        lambda path, tile: save_grid(grid.flatten(0, 1), path, grid.shape[1], tile),
        {"images": truth, "y": y, "x": x, "mean": mean},
    )


def transfer_images(
    sampler: LangevinSampler,
    images: str,
    *,
    n: int | None = None,
    on_corrupt: str | None = None,
    content: int | None = None,
    style: str | None = None,
    frames: int = 1,
    seed: int = 0,
    report: Report = silent,
    **guidance: Any,
) -> TaskResult:
    """Run the chains of ``sampler`` from n images of the source ``images``.

    The picture has a row of source images and a row of the ends of their chains, which are the
    array. The GIF has the source images and at most ``frames`` states after them; with more than
    one, nothing is reported. ``guidance`` holds other options of :func:`guide`. Warns if a chain
    ended far outside [-1, 1].
    """
    channels, size, _ = _shape(sampler)
    device = device_of(sampler.energy)
    options: dict[str, Any] = {"size": size, "channels": channels}
    options["on_corrupt"] = on_corrupt or "error"
    sources = load_images(images, **options)
    x0 = spaced_images(sources, n, device)
    if style is not None:
        patterns = load_images(style, **options)
        guidance["style"] = spaced_images(patterns, len(patterns), device)
    if content is not None:
        guidance["content"] = identity if content == 1 else Downsample(content)
    guided = guide(sampler, x0, **guidance)
    if frames == 1:
        states = torch.stack([x0, guided(x0, seed=seed, **report_steps(report, guided.steps))])
    else:
        states = guided.trajectory(x0, seed=seed, every=-(-guided.steps // frames))
    with torch.no_grad():
        before, after = (sampler.energy(states[i]).mean().item() for i in (0, -1))
    if (reached := float(states[-1].abs().max())) > _FAR:
        warnings.warn(
            f"chains ended at up to {reached:.3g}, but images lie in [-1, 1]", stacklevel=2
        )
    change = _squares(states[0], states[-1]).mean()
    rows = [
        ("images", f"{states.shape[1]} of {sources.name}"),
        ("energy", f"{before:+.4f} at the source, {after:+.4f} after {sampler.steps} steps"),
        ("change", f"{change:.5f}   mean square per element, in [-1, 1]"),
    ]
    return TaskResult(
        rows,
        lambda path, tile: save_rows(path, tile, states[0], states[-1]),
        states[-1],
        states,
    )


def _reported(fit: dict[str, Any], report: Report) -> dict[str, Any]:
    """Return the options of a fit, with a function that reports its iterations."""
    total = fit.get("iterations", ITERATIONS)
    return fit | {"report": lambda i, _: report("fit", i, total)}


def _held_out(
    run: str | Path,
    sampler: LangevinSampler,
    source: str | None,
    n: int | None,
    images_per_item: int = 1,
    default_n: int = 8,
    on_corrupt: str | None = None,
) -> tuple[str, Tensor]:
    """Return the name and the images of n items: the package's, if there are enough for them."""
    config = run_config(run, on_corrupt=on_corrupt)
    data = packaged_images(run) if source is None else None
    if data is None or len(data) < (default_n if n is None else n) * images_per_item:
        with suggesting("images", source):
            data = load_held_out(config, _shape(sampler), source)
    return data.name, spaced_images(data, n, device_of(sampler.energy), images_per_item, default_n)


def _first_starts(sampler: LangevinSampler, n: int, seed: int) -> Tensor:
    """Draw starts from p0, of the first model if the chains go coarse to fine."""
    while sampler.start is not None:
        sampler, seed = sampler.start, start_seed(seed)
    return sampler.starts(n, shape=_shape(sampler), seed=seed)


def _shape(sampler: LangevinSampler) -> tuple[int, int, int]:
    energy: Any = sampler.energy  # a ConvEnergy
    channels, height, width = energy.shape
    return channels, height, width


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared differences per element: [..., C, H, W] -> [...]."""
    return (a - b).square().mean((-3, -2, -1))
