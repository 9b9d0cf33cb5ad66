"""Are the samples what the data are? A classifier's opinion."""

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fastlangevin import noise as _noise
from fastlangevin.learn.data.load import ImageData, spread

# To fit more large images than these takes longer than a small run.
MOST_IMAGES = 5000


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
