"""Compare the errors of restored images with those of measurements and of answers without a model.

    python -m benchmarks.restorations cifar10 [--json FILE] [--docs docs/results.md]

RUN's held-out images are measured without noise and with noise of 0.1, and restored. Every answer
is clamped to [-1, 1], as a picture is. Errors are mean squares per element, over the hidden pixels
for masks, with standard errors of their means over images. The last row is the difference, image by
image, from the answer without a model whose mean error is the smallest.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import fastlangevin as fl
from benchmarks.tables import fill, table
from fastlangevin.learn import load_images
from fastlangevin.learn.run_data import load_held_out, packaged_images, run_config, spaced_images
from fastlangevin.learn.tasks.measurements import (
    OPERATORS,
    Blur,
    Mask,
    Operator,
    make_operator,
    measure,
    picture,
)
from fastlangevin.learn.tasks.restore import SAMPLES, restore
from fastlangevin.learn.tasks.restore_moments import Conditional, Moments, lacking_std, moments
from fastlangevin.sampler import LangevinSampler

NOISES = (0.0, 0.1)
# Sigma of the blur that removes noise: the best of 0.5, 0.6, 0.7 and 1 on other images.
SMOOTH = 0.6
SIMPLE = {
    "mask": "neighbour fill",
    "downsample": "bicubic",
    "blur": "unsharp mask",
    "grey": "mean colours",
}

Errors = dict[str, Tensor]  # the error of every image, by the name of the answer


def filled(y: Tensor, mask: Mask) -> Tensor:
    """Replace hidden pixels by a harmonic image: each is the mean of its four neighbours."""
    known = mask(torch.ones_like(y))
    x = mask.fill((y.sum((2, 3)) / known.sum((2, 3)))[..., None, None].expand_as(y), y)
    for _ in range(4 * max(y.shape[-2:]) ** 2):
        near = functional.pad(x, (1, 1, 1, 1), mode="replicate")
        rows = near[..., :-2, 1:-1] + near[..., 2:, 1:-1]
        x = mask.fill((rows + near[..., 1:-1, :-2] + near[..., 1:-1, 2:]) / 4, y)
    return x


def simple(name: str, operator: Operator, y: Tensor, mean: Tensor) -> Tensor:
    """Return the answer called SIMPLE[name]."""
    if isinstance(operator, Mask):
        return filled(y, operator)
    if name == "downsample":
        return functional.interpolate(y, size=mean.shape[-2:], mode="bicubic")
    return 2 * y - operator(y) if name == "blur" else y + mean - mean.mean(0)


def without_model(name: str, operator: Operator, y: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Return the answers that need no model; ``mean`` is the mean image."""
    seen, better = picture(operator, y, mean.shape), simple(name, operator, y, mean)
    fill = operator.fill if isinstance(operator, Mask) else lambda x, y: x
    smooth = Blur(SMOOTH)
    return {
        "measurement": seen,
        "mean image": fill(mean.expand_as(seen), y),
        "simple": better,
        "measurement, smoothed": smooth(seen),
        "simple, smoothed": smooth(better),
    }


def model_moments(sampler: LangevinSampler) -> Moments:
    """Return the moments with which :func:`restore` restores images at its default seed."""
    return moments(sampler(n=SAMPLES, seed=0), lacking_std(sampler))


def errors(
    sampler: LangevinSampler,
    images: Tensor,
    name: str,
    noise: float,
    priors: dict[str, Moments],
    methods: Sequence[str] = (),
) -> Errors:
    """Measure and restore images [n, C, H, W]; return the error of every answer and image.

    priors: moments to condition, by the name of the answer. Those called "moments" are the model's,
        and give what :func:`restore` returns, without drawing its samples for every measurement.
    methods: methods of :func:`restore`, the mean of whose answers is taken.
    """
    operator = make_operator(name, tuple(images.shape[1:]))
    y = measure(operator, images, noise, seed=1)
    mean = priors["moments"].mean.to(y.dtype)
    answers = without_model(name, operator, y, mean)
    for key, prior in priors.items():
        start = prior.mean.expand(len(y), *prior.mean.shape)
        answers[key] = Conditional(prior, operator, noise, y.dtype)(start, y)
    for method in methods:
        if method != "clamped" or isinstance(operator, Mask):
            answers[method] = restore(sampler, y, operator, method=method).mean
    hidden = 1 - operator(torch.ones_like(images)) if isinstance(operator, Mask) else 1 + 0 * images
    squares = {name: (x.clamp(-1, 1) - images).square() * hidden for name, x in answers.items()}
    return {name: s.flatten(1).sum(1) / hidden.flatten(1).sum(1) for name, s in squares.items()}


def won(found: Errors) -> Tensor:
    """Return how much smaller than the best answer without a model "moments" is, per image."""
    names = list(found)[: list(found).index("simple, smoothed") + 1]
    return found["moments"] - found[min(names, key=lambda name: float(found[name].mean()))]


def cell(values: Tensor | None) -> str:
    """A mean over images and its standard error."""
    if values is None:
        return ""
    error = float(values.std()) / len(values) ** 0.5
    return f"{float(values.mean()):.4f} ± {error:.4f}"


def tables(results: dict[tuple[str, float], Errors]) -> str:
    """A table for every level of noise, with a column per operator and a row per answer."""
    parts = []
    for noise in sorted({noise for _, noise in results}):
        columns = {name: found for (name, level), found in results.items() if level == noise}
        names = list(dict.fromkeys(key for found in columns.values() for key in found))
        kinds = ", ".join(SIMPLE[name] for name in columns)
        labels = {
            "simple": kinds,
            "simple, smoothed": f"{kinds}; smoothed",
            "moments": "**`restore`** (moments)",
            "photographs": "the same with the moments of photographs",
        }
        rows = [
            [labels.get(key, f"`{key}`" if key in ("posterior", "clamped") else key)]
            + [cell(found.get(key)) for found in columns.values()]
            for key in names
        ]
        rows.append(
            ["`restore` less the best without a model", *map(cell, map(won, columns.values()))]
        )
        heading = "without noise" if noise == 0 else f"with noise of {noise:g}"
        parts.append(table([heading, *columns], rows))
    return "\n\n".join(parts)


def measured(
    sampler: LangevinSampler,
    images: Tensor,
    priors: dict[str, Moments],
    methods: Sequence[str] = (),
    noises: Sequence[float] = NOISES,
    report: Callable[[str], None] = print,
) -> Iterator[tuple[tuple[str, float], Errors]]:
    """Yield the errors for every operator that suits the images, and every level of noise."""
    for name in OPERATORS:
        for noise in noises if name != "grey" or images.shape[1] > 1 else ():
            report(f"{name}, noise {noise:g}")
            yield (name, noise), errors(sampler, images, name, noise, priors, methods)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restorations")
    parser.add_argument("run", help="a run, a checkpoint or a model in the package")
    parser.add_argument("--images", help="source of images (default: those that the run held out)")
    parser.add_argument("--n", type=int, default=64, help="number of images")
    parser.add_argument("--noises", nargs="+", type=float, default=NOISES, help="in measurements")
    parser.add_argument("--methods", nargs="*", default=(), help="more methods of restore")
    parser.add_argument("--photographs", help="source of training images, whose moments are used")
    parser.add_argument("--json", type=Path, help="write the error of every image")
    parser.add_argument("--docs", type=Path, help="write the tables between a page's markers")
    chosen = parser.parse_args()
    sampler = fl.load(chosen.run)
    energy: Any = sampler.energy
    shape = energy.shape
    data = packaged_images(chosen.run) if chosen.images is None else None
    if data is None or len(data) < chosen.n:
        data = load_held_out(run_config(chosen.run), shape, chosen.images)
    images = spaced_images(data, chosen.n, None)
    priors = {"moments": model_moments(sampler)}
    if chosen.photographs:
        source = load_images(chosen.photographs, size=shape[-1], channels=shape[0])
        priors["photographs"] = moments(spaced_images(source, SAMPLES, None))
    results = dict(measured(sampler, images, priors, chosen.methods, chosen.noises))
    text = tables(results)
    print(text)
    if chosen.json:
        rows = [
            {"operator": name, "noise": noise, "errors": {k: e.tolist() for k, e in found.items()}}
            for (name, noise), found in results.items()
        ]
        content = {"benchmark": "restorations", "run": chosen.run, "images": data.name}
        chosen.json.write_text(json.dumps(content | {"results": rows}) + "\n", "utf-8")
    if chosen.docs:
        fill(chosen.docs, f"restorations {chosen.run}", text)


if __name__ == "__main__":
    main()
