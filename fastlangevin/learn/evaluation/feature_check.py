"""Compare images with training images by features, many sets with the same ones."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.learn.data.load import ImageData
from fastlangevin.learn.evaluation.evaluate import shuffled
from fastlangevin.learn.evaluation.features import make_features, quantise
from fastlangevin.learn.evaluation.metrics import (
    frechet_distance,
    kernel_distance,
    precision_recall,
)

_MOST = 2048  # most images of the data to compare with, as in evaluate
_SEED = 1  # of their choice, also as there
_NEIGHBOURS = 3  # for recall


class FeatureQuality(NamedTuple):
    """The quality of a set of images, from a :class:`FeatureCheck`."""

    feature_frechet: float
    feature_kernel: float
    feature_recall: float


class FeatureCheck:
    """Compares images [n, C, H, W] with the data by features.

    The figures are those of the command ``evaluate`` for the same images, which are clamped to
    [-1, 1] and rounded to 256 levels. The reference is half of the data, and at most 2,048 images.
    Raises ValueError for fewer than 8 images of data, and what :func:`make_features` raises.
    """

    def __init__(self, data: ImageData, features: str, device: torch.device | None = None) -> None:
        self._data = data
        self._device = device
        self._features = make_features(features, data, device)
        order = shuffled(data, _SEED)
        count = min(_MOST, len(data) // 2)
        if count <= _NEIGHBOURS:
            raise ValueError(
                f"features: the data must have at least {2 * _NEIGHBOURS + 2} images, "
                f"got {len(data)}"
            )
        self._chosen, self._others = order[:count], order[count:]

    def __call__(self, images: Tensor) -> FeatureQuality:
        x, real = self._extract(images), self._of_data
        return FeatureQuality(
            frechet_distance(x, real),
            kernel_distance(x, real),
            precision_recall(x, real, _NEIGHBOURS)[1],
        )

    def marks(self, n: int) -> dict[str, FeatureQuality]:
        """Return the figures of n other images of the data, and of n images of uniform noise."""
        return {
            "real images": self(self._data.batch(self._others[:n])),
            "uniform noise": self(_noise.initial((n, *self._data.shape), seed=0)),
        }

    @functools.cached_property
    def _of_data(self) -> Tensor:
        return self._extract(self._data.batch(self._chosen))

    def _extract(self, images: Tensor) -> Tensor:
        return self._features(quantise(images.to(self._device or "cpu")))[0]
