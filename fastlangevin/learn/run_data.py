"""The settings of a trained run, its training images and its held-out images."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlangevin.learn.build import load_data
from fastlangevin.learn.checkpoint import find_checkpoint, iteration_of, read_checkpoint, shipped
from fastlangevin.learn.config import TrainConfig, resolve_saved
from fastlangevin.learn.data.load import ImageData, load_images


def run_config(
    run: str | Path, data: str | None = None, on_corrupt: str | None = None
) -> TrainConfig:
    """Return the settings of a run or checkpoint, with ``data`` and ``on_corrupt`` for its own.

    Raises ValueError for a checkpoint that names no data, and FileError for one that is damaged or
    was written by another version.
    """
    info = read_checkpoint(run)[1]
    if info.get("config") is None:
        raise ValueError(f"{run} was not made by `fastlangevin train`: it names no data")
    changes = {"data": data, "on_corrupt": on_corrupt}
    given = {name: value for name, value in changes.items() if value is not None}
    config = resolve_saved(info, run, given)
    iteration_of(info, run)
    return config


def load_training(
    run: str | Path, data: str | None = None, packaged: bool = False, on_corrupt: str | None = None
) -> tuple[TrainConfig, ImageData]:
    """Return the settings of a run and its training images, or the images of ``data``.

    With ``packaged``, the test images that come with a model in the package take the place of its
    training images, with a warning, if these cannot be read.
    """
    config = run_config(run, data, on_corrupt)
    with suggesting("data", data):
        try:
            return config, load_data(config)
        except (ImportError, OSError, ValueError) as error:
            images = packaged_images(run) if packaged and data is None else None
            if images is None:
                raise
            warnings.warn(f"{error}; using {images.name}, which come with the model", stacklevel=2)
            return config, images


def packaged_images(run: str | Path) -> ImageData | None:
    """Return the test images that come with a model in the package; None for any other run."""
    checkpoint = find_checkpoint(run)
    path = checkpoint.with_suffix(".npz")
    if checkpoint not in shipped().values() or not path.exists():
        return None
    images = load_images(path)
    return dataclasses.replace(images, name=f"{len(images)} test images of the package")


def load_held_out(
    config: TrainConfig, shape: tuple[int, ...], source: str | None = None
) -> ImageData:
    """Load images that a run of ``config`` did not train on, in the shape (C, H, W).

    They come from ``source`` if it is given. Otherwise they are the images past the run's
    ``limit`` or, for a run without a limit, the test split of its data. Raises ValueError if there
    are none.
    """
    channels, size = shape[0], shape[-1]
    options: dict[str, Any] = {"size": size, "channels": channels, "on_corrupt": config.on_corrupt}
    if source is not None:
        return load_images(source, **options)
    if config.data is None:
        raise ValueError("the run names no data")
    if config.limit is None:
        try:
            return load_images(config.data, split="test", **options)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"the run trained on every image of {config.data}; train with --limit N "
                "(in Python limit=N) to hold the others out"
            ) from error
    images = load_images(config.data, **options)
    if len(images) <= config.limit:
        raise ValueError(
            f"the run's limit={config.limit} holds out none of the {len(images)} images of "
            f"{config.data}"
        )
    return dataclasses.replace(
        images,
        pixels=images.pixels[config.limit :],
        labels=None if images.labels is None else images.labels[config.limit :],
        name=f"{config.data}, those past the run's limit of {config.limit}",
    )


def spaced_images(
    data: ImageData,
    n: int | None,
    device: torch.device | None,
    images_per_item: int = 1,
    default_n: int = 8,
) -> Tensor:
    """Return the images of n (default: at most ``default_n``) items, spread over the data."""
    most = len(data) // images_per_item
    if most == 0:
        raise ValueError(f"images must be {images_per_item} or more, got {len(data)}: {data.name}")
    if n is None:
        n = min(default_n, most)
    if n > most:
        each = f", of {images_per_item} images each" if images_per_item > 1 else ""
        raise ValueError(f"n must be at most {most}{each}, the images of {data.name}, got {n}")
    return data.batch(_choose_spaced(data, n * images_per_item)).to(device)


def _choose_spaced(data: ImageData, n: int) -> list[int]:
    """Return the indices of one image out of each of n equal parts of the data.

    It is the first image of its part; with labels, the first of the class that has been chosen
    least often.
    """
    ends = [i * len(data) // n for i in range(n + 1)]
    if data.labels is None:
        return ends[:-1]
    labels = data.labels.tolist()
    times_chosen = dict.fromkeys(labels, 0)
    chosen = []
    for part in map(range, ends, ends[1:]):
        chosen.append(min(part, key=lambda i: times_chosen[labels[i]]))
        times_chosen[labels[chosen[-1]]] += 1
    return chosen


@contextlib.contextmanager
def suggesting(argument: str, value: str | None) -> Iterator[None]:
    """Add to an error about the run's own images, not ``value``, which argument replaces them."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        if value is not None:
            raise
        raise ValueError(
            f"{error}; give --{argument} PATH (in Python {argument}=) to use other images"
        ) from error
