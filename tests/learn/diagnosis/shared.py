"""What the tests of diagnoses share."""

from torch import Tensor

import fastlangevin as fl


def normal(*shape: int, seed: int = 0) -> Tensor:
    return fl.noise.normal(shape, seed=seed, step=0, stream=fl.noise.USER)
