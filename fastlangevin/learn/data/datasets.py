"""Data sets that are not files: tensors, numpy arrays and torch's datasets, read by index."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from fastlangevin.arguments import check_floating
from fastlangevin.gradients.draws import Draws


class Images(Protocol):
    """A data set: its length, the shape (C, H, W) of an image, and batches of images by index."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        """Return images [n, C, H, W], float32 in [-1, 1], mirrored if their ``flip`` is True."""
        ...


Data = Images | Tensor | np.ndarray | Dataset[Any] | DataLoader[Any] | Sequence[Any]


class TensorImages:
    """A tensor [N, ...] as a data set."""

    def __init__(self, op: str, images: Tensor) -> None:
        check_floating(op, "data", images)
        if not bool(images.isfinite().all()):
            raise ValueError(f"{op}: data must be finite, it holds NaN or infinity")
        self.images = images
        self.shape = tuple(images.shape[1:])

    def __len__(self) -> int:
        return self.images.shape[0]

    def batch(self, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        return mirrored(self.images[indices.to(self.images.device)], flip)


class DatasetImages:
    """A dataset of torch, whose items are read one by one, as a data set."""

    def __init__(self, op: str, dataset: Any) -> None:
        self.op, self.dataset = op, dataset
        with Draws(0, torch.device("cpu")).step(0):
            self.shape = tuple(self._image(0).shape) if len(self) else ()

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(
        self, indices: Tensor, flip: Tensor | None = None, seed: int | None = None, first: int = 0
    ) -> Tensor:
        """Return the images at ``indices``.

        With a ``seed``, torch's random numbers in the i-th item's transforms are a function of
        (seed, first + i), and torch's own generators do not advance.
        """
        draws = None if seed is None else Draws(seed, torch.device("cpu"))
        images = []
        for i, index in enumerate(indices.tolist()):
            with nullcontext() if draws is None else draws.step(first + i):
                image = self._image(index)
            if tuple(image.shape) != self.shape:
                raise ValueError(
                    f"{self.op}: all images must have the shape {list(self.shape)} of the first, "
                    f"item {index} has {list(image.shape)}"
                )
            images.append(image.float())
        return mirrored(torch.stack(images), flip)

    def _image(self, index: int) -> Tensor:
        """Return the image of an item: the item itself, or the first part of a tuple."""
        item = self.dataset[index]
        image = item[0] if isinstance(item, tuple | list) and item else item
        image = torch.from_numpy(image) if isinstance(image, np.ndarray) else image
        if not isinstance(image, Tensor) or not image.is_floating_point():
            got = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(
                f"{self.op}: the items of a dataset must be floating tensors in [-1, 1], or tuples "
                f"that begin with one, such as (image, label); item {index} gives {got}"
            )
        return image


def as_images(op: str, data: Any) -> Images:
    """Return data of any kind as a data set.

    Raises TypeError or ValueError, beginning with ``op``, for data without a length and items by
    index, and warns that only the dataset of a DataLoader is used.
    """
    if isinstance(data, DataLoader):
        data = _dataset_of(op, data)
    if isinstance(data, Tensor):
        return TensorImages(op, data)
    if isinstance(data, np.ndarray):
        if data.dtype.kind != "f":
            raise TypeError(f"{op}: data must be of floating dtype, got {data.dtype}")
        return TensorImages(op, torch.from_numpy(np.ascontiguousarray(data)))
    if isinstance(data, IterableDataset):
        raise TypeError(
            f"{op}: data must have a length and items by index, and an IterableDataset has neither;"
            " the order of the data is a function of (seed, iteration)"
        )
    if hasattr(data, "batch") and hasattr(data, "shape"):
        return data
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(
        data, str | dict
    ):
        raise TypeError(
            f"{op}: data must be a tensor or array [N, ...], what load_images returns, a dataset "
            "of torch with len and items by index, or an object with shape, len and "
            f"batch(indices, flip), got {type(data).__name__}"
        )
    return DatasetImages(op, data)


def warn_of_range(op: str, images: Tensor) -> None:
    """Warn of images [n, ...] whose values are not in [-1, 1], such as those in [0, 1].

    Noise that was added to images does not count, up to a standard deviation of about 0.2.
    """
    if images.ndim < 3 or not images.numel():  # points of a plane, for example, have no range
        return
    low, high = float(images.min()), float(images.max())
    beyond = float((images.abs() > 1.5).float().mean())
    if beyond > 0.01 or low >= 0:
        warnings.warn(
            f"{op}: data must be in [-1, 1], where the chains start, and the first batch's values "
            f"are from {low:.3g} to {high:.3g}"
            + ("; use 2 * images - 1" if low >= 0 and 0.5 < high <= 1 else ""),
            stacklevel=4,
        )


def mirrored(images: Tensor, flip: Tensor | None) -> Tensor:
    """Return the images, those with a True ``flip`` mirrored along the last dimension."""
    if flip is None:
        return images
    flips = flip.to(images.device).view(-1, *[1] * (images.ndim - 1))
    return torch.where(flips, images.flip(-1), images)


def _dataset_of(op: str, loader: DataLoader[Any]) -> Dataset[Any]:
    """Return a loader's dataset; ValueError if the loader does more than batch and shuffle it."""
    changes = {
        "a sampler of its own": type(loader.sampler) not in (RandomSampler, SequentialSampler)
        and not isinstance(loader.dataset, IterableDataset),
        "a collate_fn of its own": loader.batch_size is not None
        and loader.collate_fn is not default_collate,
    }
    if owned := [name for name, is_own in changes.items() if is_own]:
        raise ValueError(
            f"{op}: only the dataset of a DataLoader is used, and this one has {owned[0]}; do the "
            "same in the dataset, and give that"
        )
    warnings.warn(
        f"{op}: only the dataset of the DataLoader is used: the learner draws the indices of its "
        "batches itself, as a function of (seed, iteration), with its own batch_size and without "
        "workers",
        stacklevel=5,
    )
    return loader.dataset
