"""How good samples are, and whether they are new: distances to the data, beside their yardsticks.

A figure means something only beside its features, its counts and what is done to the images, so
an :class:`Evaluation` carries all of them, and figures of other sets measured in the same way.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin import noise as _noise
from fastlangevin.arguments import check_count, check_positive
from fastlangevin.learn.atomic import replacing
from fastlangevin.learn.data.load import ImageData
from fastlangevin.learn.evaluation import metrics
from fastlangevin.learn.evaluation.features import Features, quantise

FORMAT = "fastlangevin evaluation"
_BLOCK = 2048


class Figures(NamedTuple):
    """Of one set of images. Distances to training images are root mean squares per element."""

    images: int
    frechet_distance: float
    kernel_distance: float
    precision: float
    recall: float
    inception_score: float | None  # of the features' own classifier, where there is one
    nearest: float  # median over images of the distance to the nearest training image
    close: float | None  # share nearer to one than 95 % of the held-out images are
    clamped: float  # share of their elements that were outside [-1, 1]


class Evaluation(NamedTuple):
    """Figures by set, and all that they depend on."""

    features: str
    inception: bool  # only then is the Frechet distance the FID
    dimension: int
    reference: str  # the training data, of which ``reference_images`` are compared with
    reference_images: int
    reference_rank: int  # of the covariance of their features; at most the dimension
    training_images: int  # all searched for the nearest
    neighbours: int  # images of a set, at most, for which it is searched
    levels: int | None  # that images are rounded to, after clamping to [-1, 1]
    k: int  # of precision and recall
    figures: dict[str, Figures]


def evaluate(
    sets: Mapping[str, Tensor],
    train: ImageData,
    features: Features,
    *,
    held_out: str | None = None,
    reference: int = 2048,
    quantised: bool = True,
    k: int = 3,
    neighbours: int = 256,
    seed: int = 0,
) -> Evaluation:
    """Every set of images [n, C, H, W] against ``reference`` of the training images.

    sets: by name; all are clamped to [-1, 1] and, if ``quantised``, rounded to 256 levels.
    held_out: which of them is data that were not trained on, the yardstick of ``close``.
    neighbours: so many of each set, the first, have their nearest training image looked for.

    Frechet and kernel distance, precision, recall and inception score as in
    :mod:`fastlangevin.learn.evaluation.metrics`; nearest neighbours by pixels, among all
    training images. Warns where a set is too small for the features' dimension, whose covariance
    then has not full rank. Raises TypeError for what is no tensor, and ValueError for images of
    another shape than the data's, or that are not finite.
    """
    check_count("evaluate", "reference", reference)
    check_count("evaluate", "k", k)
    check_count("evaluate", "neighbours", neighbours)
    if held_out is not None and held_out not in sets:
        raise ValueError(f"evaluate: held_out must be one of {', '.join(sets)}, got {held_out!r}")
    if not sets:
        raise ValueError("evaluate: sets must hold a set of images, got none")
    for name, images in sets.items():
        if not isinstance(images, Tensor):
            raise TypeError(f"evaluate: {name} must be a tensor, got {type(images).__name__}")
        if tuple(images.shape[1:]) != train.shape or len(images) <= k:
            raise ValueError(
                f"evaluate: {name} must be more than k = {k} images of {list(train.shape)}, got "
                f"{list(images.shape)}"
            )
        if not bool(images.isfinite().all()):
            raise ValueError(f"evaluate: {name} is not finite")
    prepared = {name: _prepare(images, quantised) for name, images in sets.items()}
    device = next(iter(prepared.values())).device
    real = _prepare(train.batch(shuffled(train, seed)[:reference]).to(device), quantised)
    of_real, _ = features(real)
    real_rank = _warned_rank("the reference", of_real)

    few = [images[:neighbours] for images in prepared.values()]
    parts = _nearest(torch.cat(few), train, quantised).split([len(images) for images in few])
    distances = dict(zip(prepared, parts, strict=True))
    near = None if held_out is None else distances[held_out].quantile(0.05)
    figures = {}
    for name, images in prepared.items():
        found, probabilities = features(images)
        if len(found) <= found.shape[1] < len(of_real):
            _warned_rank(name, found)
        figures[name] = Figures(
            len(images),
            metrics.frechet_distance(found, of_real),
            metrics.kernel_distance(found, of_real),
            *metrics.precision_recall(found, of_real, k),
            None if probabilities is None else metrics.inception_score(probabilities),
            float(distances[name].median()),
            None if near is None else float((distances[name] < near).double().mean()),
            float((sets[name].abs() > 1).double().mean()),
        )
    return Evaluation(
        features.name,
        features.inception,
        of_real.shape[1],
        train.name,
        len(of_real),
        real_rank,
        len(train),
        neighbours,
        256 if quantised else None,
        k,
        figures,
    )


def shuffled(data: ImageData, seed: int) -> Tensor:
    """The indices of all images, in the seed's order."""
    return torch.argsort(_noise.words((len(data),), seed=seed, step=0, stream=_noise.ORDER))


def yardsticks(real: Tensor, noises: list[float], seed: int = 0) -> dict[str, Tensor]:
    """What samples should be better than: the data with Gaussian noise, and uniform noise."""
    noises = [check_positive("evaluate", "noise", level) for level in noises]
    normals = _noise.normal(real.shape, seed=seed, step=0, stream=_noise.DATA, device=real.device)
    uniform = _noise.initial(real.shape, seed=seed, device=real.device)
    noisy = {f"data + noise of {level:g}": real + level * normals for level in noises}
    return {**noisy, "uniform noise": uniform}


def to_text(found: Evaluation) -> str:
    """The table, under what its figures are of."""
    levels = f", rounded to {found.levels} levels" if found.levels else ""
    label = "FID" if found.inception else "Frechet"
    width = max(map(len, found.figures))
    lines = [
        f"features   {found.features}: {found.dimension}, in the reference of rank "
        f"{found.reference_rank}",
        f"reference  {found.reference_images} of the training images, {found.reference}",
        f"images     clamped to [-1, 1]{levels}",
        f"           {'':<{width}} images {label:>9} kernel    precision  recall  IS"
        "     nearest  close  clamped",
    ]
    for name, row in found.figures.items():
        score = "-" if row.inception_score is None else f"{row.inception_score:.2f}"
        close = "-" if row.close is None else f"{row.close:.1%}"
        lines.append(
            f"           {name:<{width}} {row.images:>6} {row.frechet_distance:>9.4g} "
            f"{row.kernel_distance:<9.4g} {row.precision:>9.3f} {row.recall:>7.3f}  {score:<6} "
            f"{row.nearest:>7.4f} {close:>6} {row.clamped:>8.1%}"
        )
    lines += [
        f"precision and recall with k = {found.k}; IS, the inception score's formula, is of these "
        "features' classifier",
        f"nearest: median distance to the nearest of all {found.training_images} training images, "
        f"root mean square per element, of {found.neighbours} images at most",
        "close: share of images nearer to one than 95 % of the held-out images are (5 %: not "
        "memorised)",
        "clamped: share of elements that were outside [-1, 1]",
    ]
    return "\n".join(lines)


def save(found: Evaluation, path: Path, **facts: Any) -> None:
    """Write all of it as JSON, with ``facts`` about what was evaluated."""
    figures = {name: row._asdict() for name, row in found.figures.items()}
    record = {
        "format": FORMAT,
        "version": 1,
        **facts,
        **found._asdict(),
        "clamp": [-1, 1],
        "figures": figures,
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", "utf-8")


def _prepare(images: Tensor, quantised: bool) -> Tensor:
    images = images.detach().float()
    return quantise(images) if quantised else images.clamp(-1, 1)


def _nearest(images: Tensor, train: ImageData, quantised: bool) -> Tensor:
    """Distances [n] to the nearest training image, root mean square per element."""

    def blocks() -> Iterator[Tensor]:
        for rows in torch.arange(len(train), dtype=torch.int64, device="cpu").split(_BLOCK):
            yield _prepare(train.batch(rows).to(images.device), quantised).flatten(1)

    return metrics.nearest(images.flatten(1), blocks()).distance / images[0].numel() ** 0.5


def _warned_rank(name: str, features: Tensor) -> int:
    rank = metrics.rank(features)
    count, dimension = features.shape
    if count <= dimension:
        warnings.warn(
            f"evaluate: {name} has {count} images for {dimension} features: its covariance has "
            f"rank {rank}, and the Frechet distance is biased upwards",
            stacklevel=3,
        )
    return rank
