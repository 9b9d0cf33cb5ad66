"""Are the samples what the data are? A classifier's opinion."""

from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from fastlangevin import noise as _noise
from fastlangevin.learn.data.load import ImageData, spread
from fastlangevin.learn.evaluation.metrics import frechet_distance

# To fit more large images than these takes longer than a small run.
MOST_IMAGES = 5000
_DRAWS = 10


class Confidence(NamedTuple):
    """What a classifier of the real images makes of a set of images."""

    sure: float  # fraction of images with one class's probability above the threshold
    classes: list[int]  # images per most probable class


class ClassifierCheck:
    """Multinomial logistic regression, fitted to labelled images, asked about others.

    Images are clamped to [-1, 1] first, so that no contrast beyond the
    data's makes it sure. Of more than 5,000 images in the data, 5,000 spread over their order are
    used. Raises ValueError for data without labels.
    """

    def __init__(self, data: ImageData, threshold: float = 0.9) -> None:
        if data.labels is None:
            raise ValueError(f"check: {data.name} has no labels to fit a classifier to")
        self.threshold = threshold
        self.classes = int(data.labels.max()) + 1
        some = spread(data, MOST_IMAGES)
        self.images = some.batch(np.arange(len(some)))
        self._model = LogisticRegression(max_iter=5000).fit(_features(self.images), some.labels)

    def __call__(self, images: Tensor) -> Confidence:
        """:class:`Confidence` in images [n, C, H, W]."""
        probabilities = self.probabilities(images)
        best = self._model.classes_[probabilities.argmax(1)]
        return Confidence(
            float((probabilities.max(1) > self.threshold).mean()),
            np.bincount(best, minlength=self.classes).tolist(),
        )

    def probabilities(self, images: Tensor) -> np.ndarray:
        """Of every class that the data have, for images [n, C, H, W]: [n, classes]."""
        return self._model.predict_proba(_features(images))

    def of_data(self) -> Confidence:
        """The upper mark: the real images themselves."""
        return self(self.images)

    def of_noise(self, n: int, seed: int = 0) -> Confidence:
        """The lower mark: uniform noise."""
        shape = (n, *self.images.shape[1:])
        return self(_noise.initial(shape, seed=seed))


def _features(images: Tensor) -> np.ndarray:
    return images.detach().cpu().clamp(-1, 1).flatten(1).numpy()


class Quality(NamedTuple):
    """What a :class:`QualityCheck` finds."""

    sure: float | None  # fraction of images a classifier is sure of; None for data without labels
    frechet: float  # Frechet distance of coarse pixels to the data's; 0 for equal moments


class Mark(NamedTuple):
    """A yardstick of :class:`Quality`, and the counts that its Frechet distance depends on."""

    sure: float | None
    frechet: float
    images: int
    reference: int


class QualityCheck:
    """A classifier's opinion and a Frechet distance, of images [n, C, H, W] against the data's.

    ``sure`` is :class:`ClassifierCheck`'s. ``frechet`` is the distance of two Gaussians,

        |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)),

    fitted to the pixels, clamped to [-1, 1] and averaged over squares down to 8 x 8 where images
    are larger. It is no FID, whose features are Inception's, and compares with itself alone. Of
    more than 5,000 images in the data, 5,000 spread over their order are used.
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
        """What n samples have at best and at worst: as images of the data's law, and as noise.

        A Frechet distance of two sets of one law is not 0 but goes about as 1 / n + 1 / m, so the
        marks have the samples' counts: n, and m images of the data. Few data hold two such sets
        without a common image: for "real images" both are drawn from the data with replacement,
        each independently, and the distance is the mean of 10 pairs. They are images that a model
        of these data trained on, and ``sure`` is of all that the classifier was fitted to.
        """
        sure = None if self._judge is None else self._judge.of_data().sure
        m = len(self.images)
        found = [
            frechet_distance(self._drawn(n, 2 * i), self._drawn(m, 2 * i + 1))
            for i in range(_DRAWS)
        ]
        noise = _noise.initial((n, *self.images.shape[1:]), seed=0)
        return {
            "real images": Mark(sure, sum(found) / _DRAWS, n, m),
            "uniform noise": Mark(*self(noise), n, m),
        }

    def _drawn(self, count: int, draw: int) -> Tensor:
        """The coarse pixels of ``count`` images of the data, drawn with replacement."""
        u = _noise.uniform((count,), seed=0, step=draw, stream=_noise.ORDER)
        return self._pixels[(u.double() * len(self._pixels)).to(torch.int64)]


def coarse(images: Tensor) -> Tensor:
    """The coarse pixels [n, d], float64, of images [n, C, H, W]."""
    x = images.detach().cpu().double().clamp(-1, 1)
    size = min(8, x.shape[-2]), min(8, x.shape[-1])
    return adaptive_avg_pool2d(x, size).flatten(1)
