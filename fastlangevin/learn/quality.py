"""How good samples are, by two simple figures that need no download."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from fastlangevin import noise as _noise
from fastlangevin.learn.check import ClassifierCheck
from fastlangevin.learn.data import ImageData
from fastlangevin.learn.metrics import frechet_distance

# Enough for either figure; a classifier of many large images takes longer than a small run.
MOST_IMAGES = 5000


class Quality(NamedTuple):
    """What a :class:`QualityCheck` finds."""

    sure: float | None  # fraction of images a classifier is sure of; None for data without labels
    frechet: float  # Frechet distance of coarse pixels to the data's; 0 for equal moments


class QualityCheck:
    """A classifier's opinion and a Frechet distance, of images [n, C, H, W] against the data's.

    ``sure`` is :class:`ClassifierCheck`'s. ``frechet`` is the distance of two Gaussians,

        |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)),

    fitted to the pixels, clamped to [-1, 1] and averaged over squares down to 8 x 8 where images
    are larger. It is no FID, whose features are Inception's, and compares with itself alone. Of
    more than 5,000 images in the data, 5,000 evenly spread ones are used.
    """

    def __init__(self, data: ImageData) -> None:
        if len(data) > MOST_IMAGES:
            rows = np.arange(MOST_IMAGES) * len(data) // MOST_IMAGES
            labels = None if data.labels is None else data.labels[rows]
            data = replace(data, pixels=data.pixels[rows], labels=labels)
        self.images = data.batch(np.arange(len(data)))
        self._judge = None if data.labels is None else ClassifierCheck(data)
        self._pixels = coarse(self.images)

    def __call__(self, images: Tensor) -> Quality:
        sure = None if self._judge is None else self._judge(images).sure
        return Quality(sure, frechet_distance(coarse(images), self._pixels))

    def marks(self) -> dict[str, Quality]:
        """What is at best and at worst to be had: the data, half against half, and noise."""
        sure = None if self._judge is None else self._judge.of_data().sure
        noise = _noise.initial((1024, *self.images.shape[1:]), seed=0)
        return {
            "real images": Quality(sure, frechet_distance(self._pixels[::2], self._pixels[1::2])),
            "uniform noise": self(noise),
        }


def coarse(images: Tensor) -> Tensor:
    """The coarse pixels [n, d], float64, of images [n, C, H, W]."""
    x = images.detach().cpu().double().clamp(-1, 1)
    size = min(8, x.shape[-2]), min(8, x.shape[-1])
    return adaptive_avg_pool2d(x, size).flatten(1)
