"""The sampler, images and loops that the tests of the tasks share."""

import math
from typing import Any

import torch
from torch import Tensor

import fastlangevin as fl
from fastlangevin.learn.tasks.measurements import (
    Blur,
    Downsample,
    Grey,
    Mask,
    identity,
    make_operator,
)

SHAPE = (3, 8, 8)
BOX = make_operator("mask", SHAPE)


def per_channel() -> Mask:
    known = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5
    return Mask(known)


OPERATORS = {
    "identity": identity,
    "mask": BOX,
    "mask per channel": per_channel(),
    "downsample": Downsample(4),
    "blur": Blur(0.8),
    "blur wider than the image": Blur(5.0),
    "grey": Grey(),
}


def net(activation: str = "silu", channels: int = 3, **options: Any) -> fl.ConvEnergy:
    """A small random net whose gradients matter over a few steps."""
    torch.manual_seed(3)
    made = fl.ConvEnergy(channels, 8, 4, activation=activation, **options)
    with torch.no_grad():
        made.layers[-1].weight.mul_(20)
    return made


def images(n: int, channels: int = 3, seed: int = 11) -> Tensor:
    return 2 * fl.noise.uniform((n, channels, 8, 8), seed=seed, step=0) - 1


def start(n: int, seed: int, channels: int = 3) -> Tensor:
    return 2 * fl.noise.uniform((n, channels, 8, 8), seed=seed, step=0) - 1


def dense(operator: Any) -> Tensor:
    """The matrix of an operator, column by column."""
    basis = torch.eye(math.prod(SHAPE), dtype=torch.float64).view(-1, *SHAPE)
    return operator(basis).flatten(1).T
