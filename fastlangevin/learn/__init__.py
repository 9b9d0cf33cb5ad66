"""Learning, built on the sampler: data, Algorithm 1, runs and checkpoints."""

from fastlangevin.learn.config import TrainConfig, resolve
from fastlangevin.learn.data import ImageData, load_images
from fastlangevin.learn.guard import DivergedError, DivergenceGuard
from fastlangevin.learn.images import save_grid
from fastlangevin.learn.learner import Metrics, ShortRunLearner
from fastlangevin.learn.run import train

__all__ = [
    "DivergedError",
    "DivergenceGuard",
    "ImageData",
    "Metrics",
    "ShortRunLearner",
    "TrainConfig",
    "load_images",
    "resolve",
    "save_grid",
    "train",
]
