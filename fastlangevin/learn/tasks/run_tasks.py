"""Reconstruct, interpolate, restore and transfer with a run's model and its images.

Every result can be saved as a picture or as arrays, and has rows (name, text) that summarise it.
Errors are mean squares per element, with images in [-1, 1].
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin.gradients.network import device_of
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
from fastlangevin.learn.tasks.reconstruct import ITERATIONS, Fit, reconstruct
from fastlangevin.learn.tasks.restore import Restored, restore
from fastlangevin.learn.tasks.transfer import guide
from fastlangevin.progress import Report, report_steps, silent
from fastlangevin.sampler import LangevinSampler

_FAR = 3.0  # chains that end beyond this have left the range of images, [-1, 1]

Summary = list[tuple[str, str]]


class Reconstruction(NamedTuple):
    """Images, their reconstructions and, for comparison, the nearest of some random samples."""

    source: str  # name of the images
    images: Tensor  # [n, C, H, W]
    fit: Fit  # [n, ...]
    samples: int  # number of random samples
    nearest: Tensor  # [n, C, H, W]
    nearest_error: Tensor  # [n]

    def save(self, path: Path, tile: int = 32) -> None:
        """Write a .png of three rows, or a .npz of images, x, z and error."""
        if path.suffix == ".png":
            save_rows(path, tile, self.images, self.fit.x, self.nearest)
        else:
            save_arrays(path, images=self.images, **self.fit._asdict())

    def rows(self) -> Summary:
        ours, theirs = float(self.fit.error.mean()), float(self.nearest_error.mean())
        return [
            ("images", f"{len(self.images)} of {self.source}"),
            ("reconstruction", f"{ours:.5f}   mean squared error per element, in [-1, 1]"),
            (f"best of {self.samples}", f"{theirs:.5f}   the same for the nearest random sample"),
            ("ratio", f"{ours / theirs:.3f}"),
        ]


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
) -> Reconstruction:
    """Reconstruct n images that a run held out, or n images of the source ``images``.

    n: number of images (default: 16, or all of the source if it has fewer).

    report: called as report(what, done, total) on the way.
    fit: options of :func:`reconstruct`.
    """
    source, truth = _held_out(run, sampler, images, n, default_n=16, on_corrupt=on_corrupt)
    best = reconstruct(sampler, truth, seed=seed, **_reported(fit, report)).best()
    drawn = sampler(n=samples, seed=seed)
    error, nearest = _squares(truth[:, None], drawn[None]).min(1)
    return Reconstruction(source, truth, best, samples, drawn[nearest], error)


class Interpolation(NamedTuple):
    """Frames between pairs of starts and, if the starts were fitted to images, the fit's error."""

    x: Tensor  # [frames, n, C, H, W]
    source: str | None = None  # name of the images
    error: float | None = None

    def save(self, path: Path, tile: int = 32) -> None:
        """Write a .png with a row per pair, a .gif that goes there and back, or a .npy of x."""
        if path.suffix == ".gif":
            save_gif(torch.cat([self.x, self.x[1:-1].flip(0)]), path, None, tile)
        elif path.suffix == ".png":
            save_grid(self.x.transpose(0, 1).flatten(0, 1), path, len(self.x), tile)
        else:
            save_arrays(path, self.x)

    def rows(self) -> Summary:
        if self.error is None:
            return []
        return [
            ("images", f"{2 * self.x.shape[1]} of {self.source}"),
            ("their fit", f"{self.error:.5f}   mean squared error per element, in [-1, 1]"),
        ]


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
) -> Interpolation:
    """Interpolate between n pairs of random starts, or of starts fitted to images.

    n: number of pairs (default: 8, or as many as the source of the images has).

    images: source of 2 n images to fit starts to, with the options ``fit`` of :func:`reconstruct`.
    noise: as for :func:`interpolate`.
    report: called as report(what, done, total) on the way.
    """
    run_config(run)  # raises an error for a checkpoint without data before any work
    source = error = None
    if images is None:
        z = sampler.starts(2 * (8 if n is None else n), shape=_shape(sampler), seed=seed)
    else:
        source, truth = _held_out(run, sampler, images, n, images_per_item=2, on_corrupt=on_corrupt)
        best = reconstruct(sampler, truth, seed=seed, **_reported(fit, report)).best()
        z, error = best.z, float(best.error.mean())
    x = interpolate(sampler, z[::2], z[1::2], frames, noise=noise, seed=seed, report=report)
    return Interpolation(x, source, error)


def feature_rows(
    run: str | Path, frames: Tensor, note: Callable[[str], None] | None = None
) -> Summary:
    """Return rows that say how far frames between two ends are from the run's data, in features.

    They hold the kernel distances to at most 512 images of the data: for the end frames, for the
    frames between them, and, for comparison, for crossfades of the end frames' pixels.

    frames: [frames, n, C, H, W]. note: called with a line before the features are computed, which
        can take a minute.

    Returns no rows if there are fewer than two images between the ends or, with a warning, if the
    data or the features are not available.
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
    rows = []
    for name, x, what in (
        ("end points", frames[[0, -1]], text),
        ("between", frames[1:-1], "the same for the frames between them"),
        ("crossfade", crossfade, "the same for mixtures of the end points' pixels"),
    ):
        distance = kernel_distance(features(quantise(x.flatten(0, 1)))[0], real)
        rows.append((name, f"{distance:.4f}   {what}"))
    return rows


class Restoration(NamedTuple):
    """Images, their measurements, and the answers found for each measurement."""

    source: str  # name of the images
    images: Tensor  # [n, C, H, W]
    y: Tensor  # [n, ...]
    seen: Tensor  # [n, C, H, W], the measurements as images
    restored: Restored

    def save(self, path: Path, tile: int = 32) -> None:
        """Write a .png with a row per image, or a .npz of images, y, x and mean."""
        x, _, mean = self.restored
        if path.suffix == ".png":
            rows = torch.cat([torch.stack([self.images, self.seen, mean], 1), x], 1)
            save_grid(rows.flatten(0, 1), path, rows.shape[1], tile)
        else:
            save_arrays(path, images=self.images, y=self.y, x=x, mean=mean)

    def rows(self) -> Summary:
        x, residual, mean = self.restored
        error = _squares(self.images[:, None], x)
        of_mean, of_seen = _squares(self.images, mean), _squares(self.images, self.seen)
        spread = x.var(1, correction=0).mean()
        return [
            ("images", f"{len(self.images)} of {self.source}"),
            ("answers", f"{error.mean():.5f}   mean squared error per element, in [-1, 1]"),
            ("best", f"{error.amin(1).mean():.5f}   of the {x.shape[1]} for each image"),
            ("their mean", f"{of_mean.mean():.5f}   smallest expected error"),
            ("measurement", f"{of_seen.mean():.5f}   error of the measurement shown as an image"),
            ("residual", f"{residual.mean():.5f}   mean of (y - A x)^2"),
            ("spread", f"{spread:.5f}   mean variance of an element over the answers"),
        ]


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
) -> Restoration:
    """Measure n images that a run held out, or n images of the source ``images``; restore them.

    n: number of images (default: 8, or all of the source if it has fewer).

    measurement_noise: standard deviation of the noise that is added to the measurements. Only the
        method "moments" takes it into account.
    report: called as report(what, done, total) on the way.
    method, options: as for :func:`restore`.
    """
    source, truth = _held_out(run, sampler, images, n, on_corrupt=on_corrupt)
    if method == "latent":
        options = _reported(options, report)
    else:
        options["callback"] = lambda step, _: report("step", step, sampler.steps)
    if method == "moments":
        options["measurement_noise"] = measurement_noise
    y = measure(operator, truth, measurement_noise, seed)
    restored = restore(sampler, y, operator, method=method, seed=seed, **options)
    seen = picture(operator, y, _shape(sampler))
    return Restoration(source, truth, y, seen, restored)


class Transferred(NamedTuple):
    """Source images, and the states of the chains that started at them."""

    source: str  # name of the images
    steps: int
    energies: tuple[float, float]  # means at the source and at the end
    states: Tensor  # [states, n, C, H, W], from the source images to the ends of the chains

    def save(self, path: Path, tile: int = 32) -> None:
        """Write a .png of two rows, a .gif of all states, or a .npy of the last one."""
        if path.suffix == ".gif":
            save_gif(self.states, path, None, tile)
        elif path.suffix == ".png":
            save_rows(path, tile, self.states[0], self.states[-1])
        else:
            save_arrays(path, self.states[-1])

    def rows(self) -> Summary:
        before, after = self.energies
        change = _squares(self.states[0], self.states[-1]).mean()
        return [
            ("images", f"{self.states.shape[1]} of {self.source}"),
            ("energy", f"{before:+.4f} at the source, {after:+.4f} after {self.steps} steps"),
            ("change", f"{change:.5f}   mean square per element, in [-1, 1]"),
        ]


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
) -> Transferred:
    """Run the chains of ``sampler`` from n images of the source ``images``.

    n: number of images (default: 8, or all of the source if it has fewer).

    content: side of the squares whose means are preserved; 1 preserves the pixels.
    style: source of images whose statistics guide the chains.
    frames: the largest number of states to return after the source images.
    report: called as report(what, done, total) on the way, unless there are frames.
    guidance: other options of :func:`guide`.

    Warns if a chain ended far outside [-1, 1].
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
    return Transferred(sources.name, sampler.steps, (before, after), states)


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
    """Return the name of the held-out images, and the images of n items.

    The images that come with a model in the package are used if there are enough.
    """
    config = run_config(run, on_corrupt=on_corrupt)
    data = packaged_images(run) if source is None else None
    if data is None or len(data) < (default_n if n is None else n) * images_per_item:
        with suggesting("images", source):
            data = load_held_out(config, _shape(sampler), source)
    return data.name, spaced_images(data, n, device_of(sampler.energy), images_per_item, default_n)


def _shape(sampler: LangevinSampler) -> tuple[int, int, int]:
    energy: Any = sampler.energy  # a ConvEnergy
    channels, height, width = energy.shape
    return channels, height, width


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared differences per element: [..., C, H, W] -> [...]."""
    return (a - b).square().mean((-3, -2, -1))
