"""Judge samples by a classifier of the real images, and by the Frechet distance of their pixels."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

import fastlangevin.noise as _noise
from fastlangevin.distributed import Group
from fastlangevin.learn.data.load import ImageData, spread
from fastlangevin.learn.evaluation.metrics import frechet_distance

# Fitting a classifier to more images takes longer than a small training run.
MOST_IMAGES = 5000
_DRAWS = 10


class Confidence(NamedTuple):
    """How sure a classifier of the real images is of a set of images."""

    sure: float  # fraction of images for which one class has a probability above the threshold
    classes: list[int]  # number of images for which each class is the most probable


class ClassifierCheck:
    """A multinomial logistic regression, fitted to labelled images, that judges other images.

    Images are first clamped to [-1, 1], so that excess contrast does not make the classifier sure.
    The regression is fitted to at most 5,000 images, spread over the order of the data. In a group,
    all processes use the fit of rank 0, because fits on different CPUs differ. Raises ValueError
    for data without labels.
    """

    def __init__(self, data: ImageData, threshold: float = 0.9, group: Group | None = None) -> None:
        from sklearn.linear_model import LogisticRegression  # takes seconds to import

        if data.labels is None:
            raise ValueError(f"check: {data.name} has no labels to fit a classifier to")
        self.threshold = threshold
        self.classes = int(data.labels.max()) + 1
        data = spread(data, MOST_IMAGES)
        self.images = data.batch(np.arange(len(data)))
        self._model = model = LogisticRegression(max_iter=5000)
        with (group := group or Group()).working():
            model.fit(_features(self.images), data.labels)
        fit = group.first(lambda: [model.coef_.tolist(), model.intercept_.tolist()], "classifier")
        model.coef_, model.intercept_ = (np.array(x, model.coef_.dtype) for x in fit)

    def __call__(self, images: Tensor) -> Confidence:
        """Return the :class:`Confidence` in images [n, C, H, W]."""
        probabilities = self.probabilities(images)
        best = self._model.classes_[probabilities.argmax(1)]
        return Confidence(
            float((probabilities.max(1) > self.threshold).mean()),
            np.bincount(best, minlength=self.classes).tolist(),
        )

    def probabilities(self, images: Tensor) -> np.ndarray:
        """Return the probabilities [n, classes] of images [n, C, H, W]."""
        return self._model.predict_proba(_features(images))

    def of_data(self) -> Confidence:
        """Return the confidence in the real images, the upper reference."""
        return self(self.images)

    def of_noise(self, n: int, seed: int = 0) -> Confidence:
        """Return the confidence in n images of uniform noise, the lower reference."""
        shape = (n, *self.images.shape[1:])
        return self(_noise.initial(shape, seed=seed))


def _features(images: Tensor) -> np.ndarray:
    return images.detach().cpu().clamp(-1, 1).flatten(1).numpy()


class Quality(NamedTuple):
    """The quality of a set of images, from a :class:`QualityCheck`."""

    sure: float | None  # fraction that a classifier is sure of; None for data without labels
    frechet: float  # Frechet distance to the data in coarse pixels; 0 for equal moments


class Mark(NamedTuple):
    """A reference value of :class:`Quality`, with the counts its Frechet distance depends on."""

    sure: float | None
    frechet: float
    images: int
    reference: int


class QualityCheck:
    """Compares images [n, C, H, W] with the data by two figures that need no download.

    ``sure`` is defined in :class:`Confidence`. ``frechet`` is the distance of two Gaussians,

        |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)),

    fitted to the pixels, which are clamped to [-1, 1] and, in larger images, averaged down to
    8 x 8. It is not FID, whose features are Inception's, and can only be compared with figures of
    this class. At most 5,000 images of the data are used, spread over their order.
    """

    def __init__(self, data: ImageData) -> None:
        data = spread(data, MOST_IMAGES)
        self.images = data.batch(np.arange(len(data)))
        self._judge = None if data.labels is None else ClassifierCheck(data)
        self._pixels = coarse(self.images)

    def __call__(self, images: Tensor) -> Quality:
        sure = None if self._judge is None else self._judge(images).sure
        return Quality(sure, frechet_distance(coarse(images), self._pixels))

    def marks(self, n: int) -> dict[str, Mark]:
        """Return reference values for n samples: the figures of real images and of uniform noise.

        The Frechet distance of two finite sets from the same distribution is not 0 but about
        proportional to 1 / n + 1 / m. The references therefore use the counts of the samples: n
        images, and m images of the data. Most data are too small for two such sets without a common
        image, so both sets of "real images" are drawn independently from the data, with
        replacement, and the distance is the mean over 10 pairs. ``sure`` of "real images" is the
        fraction of all images that the classifier was fitted to.
        """
        sure = None if self._judge is None else self._judge.of_data().sure
        m = len(self.images)
        distances = [
            frechet_distance(self._draw_coarse(n, 2 * i), self._draw_coarse(m, 2 * i + 1))
            for i in range(_DRAWS)
        ]
        noise = _noise.initial((n, *self.images.shape[1:]), seed=0)
        return {
            "real images": Mark(sure, sum(distances) / _DRAWS, n, m),
            "uniform noise": Mark(*self(noise), n, m),
        }

    def _draw_coarse(self, count: int, draw: int) -> Tensor:
        """Draw the coarse pixels of ``count`` images of the data, with replacement."""
        u = _noise.uniform((count,), seed=0, step=draw, stream=_noise.ORDER)
        return self._pixels[(u.double() * len(self._pixels)).to(torch.int64)]


def coarse(images: Tensor) -> Tensor:
    """Return the coarse pixels [n, d], float64, of images [n, C, H, W]."""
    x = images.detach().cpu().double().clamp(-1, 1)
    size = min(8, x.shape[-2]), min(8, x.shape[-1])
    return adaptive_avg_pool2d(x, size).flatten(1)
