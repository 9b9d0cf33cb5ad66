"""Pictures and arrays that the tests of data share."""

import numpy as np
import torch
from PIL import Image

RNG = np.random.default_rng(0)


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def unit(pixels):
    """uint8 [n, C, H, W] as the floats a batch must hold."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).float() / 127.5 - 1


def everything(data):
    return data.batch(np.arange(len(data)))


def write_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
