"""Learning, built on the sampler: data, Algorithm 1, runs and checkpoints."""

from typing import TYPE_CHECKING, NoReturn

from fastlangevin.learn.config import TrainConfig, resolve
from fastlangevin.learn.data.load import ImageData, load_images
from fastlangevin.learn.divergence import DivergedError, DivergenceGuard
from fastlangevin.learn.images import image_grid, save_gif, save_grid
from fastlangevin.learn.learner import Metrics, ShortRunLearner
from fastlangevin.learn.tasks.interpolate import interpolate
from fastlangevin.learn.tasks.reconstruct import reconstruct
from fastlangevin.learn.tasks.restore import restore
from fastlangevin.learn.tasks.transfer import transfer
from fastlangevin.learn.train import train
from fastlangevin.names import unknown_attribute

__all__ = [
    "DivergedError",
    "DivergenceGuard",
    "ImageData",
    "Metrics",
    "ShortRunLearner",
    "TrainConfig",
    "image_grid",
    "interpolate",
    "load_images",
    "reconstruct",
    "resolve",
    "restore",
    "save_gif",
    "save_grid",
    "train",
    "transfer",
]

if not TYPE_CHECKING:  # a checker would take every name for one of this module

    def __getattr__(name: str) -> NoReturn:
        raise unknown_attribute(__name__, name, __all__)
