"""Evaluate samples: their distances to the data, and whether they are new.

A figure is meaningful only with its features, its counts, and the processing of the images.
Therefore an :class:`Evaluation` holds all of these, and the same figures for reference sets.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.arguments import check_count, check_not_text, check_positive, check_tensor
from fastlangevin.distributed import Group, shard, split_rows
from fastlangevin.learn.atomic import save_json
from fastlangevin.learn.data.load import ImageData
from fastlangevin.learn.evaluation import metrics
from fastlangevin.learn.evaluation.features import BATCH, Features, quantise
from fastlangevin.names import check_name
from fastlangevin.progress import Report, silent

FORMAT = "fastlangevin evaluation"
_BLOCK = 2048


class Figures(NamedTuple):
    """The figures of a set. Distances to training images are root mean squares per element."""

    images: int  # number of images
    frechet_distance: float
    kernel_distance: float
    precision: float
    recall: float
    inception_score: float | None  # None if the features come without a classifier
    nearest: float  # median over images of the distance to the nearest training image
    close: float | None  # share of images nearer to one than 95 % of the held-out images are
    clamped: float  # share of elements that were outside [-1, 1]


class Evaluation(NamedTuple):
    """The figures of each set, and everything that they depend on."""

    features: str  # name of the features
    inception: bool  # whether the features are Inception's, so that the Frechet distance is FID
    dimension: int  # of the features
    reference: str  # name of the training data
    reference_images: int  # number of training images that sets are compared with
    reference_rank: int  # rank of the covariance of their features
    training_images: int  # number of images that are searched for the nearest one
    neighbours: int  # most images of a set whose nearest training image is searched for
    levels: int | None  # levels that images are rounded to after clamping; None: not rounded
    k: int  # number of neighbours for precision and recall
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
    group: Group | None = None,
    report: Report = silent,
) -> Evaluation:
    """Compare sets of images [n, C, H, W] with training images.

    The metrics are defined in :mod:`fastlangevin.learn.evaluation.metrics`. Nearest neighbours are
    searched for by pixels, among all training images.

    Args:
        sets: The sets by name. They are clamped to [-1, 1].
        train: The training images.
        features: The features to compare.
        held_out: Name of the set of images that were not trained on, the reference of ``close``.
        reference: Most training images to compare with.
        quantised: Whether to round images to 256 levels.
        k: Number of neighbours for precision and recall.
        neighbours: The first ``neighbours`` images of each set are compared with their nearest
            training image.
        seed: Seed of the choice of the reference.
        group: The processes that share the features and the search for the nearest images. All of
            them call this function with the same sets, and return the same figures.
        report: Called as report("set", done, total) after the reference and after every set.

    Warns if a set has too few images for the dimension of the features, because their covariance
    is then singular. Raises TypeError for a set that is not a tensor, and ValueError for images
    that are not finite or differ in shape from the data.
    """
    group = group or Group()
    check_count("evaluate", "reference", reference)
    check_count("evaluate", "k", k)
    check_count("evaluate", "neighbours", neighbours)
    if held_out is not None:
        check_name("evaluate: held_out", held_out, sets)
    _check_sets(sets, train, k)
    prepared = {name: _prepare(images, quantised) for name, images in sets.items()}
    device = next(iter(prepared.values())).device
    real = _prepare(train.batch(shuffled(train, seed)[:reference]).to(device), quantised)
    of_real, _ = _features(features, real, group, "the features of the reference")
    real_rank = _warned_rank("the reference", of_real)
    report("set", 1, len(prepared) + 1)

    first_images = [images[:neighbours] for images in prepared.values()]
    nearest = _nearest(torch.cat(first_images), train, quantised, group)
    parts = nearest.split([len(images) for images in first_images])
    distances = dict(zip(prepared, parts, strict=True))
    close = None if held_out is None else distances[held_out].quantile(0.05)
    figures = {}
    for name, images in prepared.items():
        what = f"the features of {name}"
        of_images, probabilities = _features(features, images, group, what)
        if len(of_images) <= of_images.shape[1] < len(of_real):
            _warned_rank(name, of_images)
        figures[name] = Figures(
            len(images),
            metrics.frechet_distance(of_images, of_real),
            metrics.kernel_distance(of_images, of_real),
            *metrics.precision_recall(of_images, of_real, k),
            None if probabilities is None else metrics.inception_score(probabilities),
            float(distances[name].median()),
            None if close is None else float((distances[name] < close).double().mean()),
            float((sets[name].abs() > 1).double().mean()),
        )
        report("set", len(figures) + 1, len(prepared) + 1)
    return Evaluation(
        features=features.name, inception=features.inception, dimension=of_real.shape[1],
        reference=train.name, reference_images=len(of_real), reference_rank=real_rank,
        training_images=len(train), neighbours=neighbours, levels=256 if quantised else None,
        k=k, figures=figures,
    )  # fmt: skip


def _check_sets(sets: Mapping[str, Tensor], train: ImageData, k: int) -> None:
    """Raise TypeError or ValueError unless there are sets, of more than k finite images each."""
    if not sets:
        raise ValueError("evaluate: sets must hold a set of images, got none")
    for name, images in sets.items():
        check_tensor("evaluate", name, images)
        if tuple(images.shape[1:]) != train.shape or len(images) <= k:
            raise ValueError(
                f"evaluate: {name} must be more than k = {k} images of {list(train.shape)}, got "
                f"{list(images.shape)}"
            )
        if not bool(images.isfinite().all()):
            raise ValueError(f"evaluate: {name} is not finite")


def shuffled(data: ImageData, seed: int) -> Tensor:
    """Return the indices of all images, in an order that depends on the seed."""
    return torch.argsort(_noise.words((len(data),), seed=seed, step=0, stream=_noise.ORDER))


def yardsticks(real: Tensor, noises: list[float], seed: int = 0) -> dict[str, Tensor]:
    """Return sets that samples should outperform: data with Gaussian noise, and uniform noise."""
    check_not_text("evaluate", "noises", noises, "a list of numbers")
    noises = [check_positive("evaluate", "noise", level) for level in noises]
    normals = _noise.normal(real.shape, seed=seed, step=0, stream=_noise.DATA, device=real.device)
    uniform = _noise.initial(real.shape, seed=seed, device=real.device)
    noisy = {f"data + noise of {level:g}": real + level * normals for level in noises}
    return {**noisy, "uniform noise": uniform}


def to_text(evaluation: Evaluation) -> str:
    """Return the figures as a table, with what they depend on."""
    levels = f", rounded to {evaluation.levels} levels" if evaluation.levels else ""
    label = "FID" if evaluation.inception else "Frechet"
    width = max(map(len, evaluation.figures))
    lines = [
        f"features   {evaluation.features}: {evaluation.dimension}, in the reference of rank "
        f"{evaluation.reference_rank}",
        f"reference  {evaluation.reference_images} of the training images, {evaluation.reference}",
        f"images     clamped to [-1, 1]{levels}",
        f"           {'':<{width}} images {label:>9} kernel    precision  recall  IS"
        "     nearest  close  clamped",
    ]
    for name, row in evaluation.figures.items():
        score = "-" if row.inception_score is None else f"{row.inception_score:.2f}"
        close = "-" if row.close is None else f"{row.close:.1%}"
        lines.append(
            f"           {name:<{width}} {row.images:>6} {row.frechet_distance:>9.4g} "
            f"{row.kernel_distance:<9.4g} {row.precision:>9.3f} {row.recall:>7.3f}  {score:<6} "
            f"{row.nearest:>7.4f} {close:>6} {row.clamped:>8.1%}"
        )
    lines += [
        f"precision and recall with k = {evaluation.k}; IS, the inception score's formula, is of "
        "these features' classifier",
        f"nearest: median distance to the nearest of all {evaluation.training_images} training "
        f"images, root mean square per element, of {evaluation.neighbours} images at most",
        "close: share of images nearer to one than 95 % of the held-out images are (5 %: not "
        "memorised)",
        "clamped: share of elements that were outside [-1, 1]",
    ]
    return "\n".join(lines)


def save(evaluation: Evaluation, path: Path, **facts: Any) -> None:
    """Write the evaluation as JSON, with ``facts`` about what was evaluated."""
    figures = {name: row._asdict() for name, row in evaluation.figures.items()}
    record = {"format": FORMAT, "version": 1, **facts, **evaluation._asdict(), "clamp": [-1, 1]}
    save_json(path, record | {"figures": figures}, indent=1, allow_nan=False)


def _prepare(images: Tensor, quantised: bool) -> Tensor:
    images = images.detach().float()
    return quantise(images) if quantised else images.clamp(-1, 1)


def _features(
    features: Features, images: Tensor, group: Group, what: str
) -> tuple[Tensor, Tensor | None]:
    """Return the features and probabilities of images. Each process computes a share of them."""
    of_images, probabilities = split_rows(
        group, len(images), BATCH, lambda rows: features(images[rows]), what
    )
    assert of_images is not None
    return of_images, probabilities


def _nearest(images: Tensor, train: ImageData, quantised: bool, group: Group) -> Tensor:
    """Return the distances [n] to the nearest training image. Each process searches a share."""
    blocks = torch.arange(len(train), dtype=torch.int64, device="cpu").split(_BLOCK)

    def own_blocks() -> Iterator[Tensor]:
        for rows in blocks[shard(len(blocks), group.rank, group.world_size).rows()]:
            yield _prepare(train.batch(rows).to(images.device), quantised).flatten(1)

    what = "the nearest training images"
    with group.working():
        distance = metrics.nearest(images.flatten(1), own_blocks()).distance
    group.barrier(what)  # unlike all_gather, it waits for a process that is working
    nearest = group.all_gather(distance, what).amin(0)
    return nearest / images[0].numel() ** 0.5


def _warned_rank(name: str, features: Tensor) -> int:
    """Return the rank of the features' covariance, with a warning if it must be singular."""
    rank = metrics.rank(features)
    count, dimension = features.shape
    if count <= dimension:
        warnings.warn(
            f"evaluate: {name} has {count} images for {dimension} features: its covariance has "
            f"rank {rank}, and the Frechet distance is biased upwards",
            stacklevel=3,
        )
    return rank
