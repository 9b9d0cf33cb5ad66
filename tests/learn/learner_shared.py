"""The energies and the plain loop that the tests of Learner share."""

from typing import Any

import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.learn import ShortRunLearner

B = 6
SHAPE = (1, 8, 8)


class Recorder:
    """A data set that remembers what it was asked for."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.shape = images, tuple(images.shape[1:])
        self.indices: list[Tensor] = []
        self.flips: list[Tensor | None] = []

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        self.indices.append(indices)
        self.flips.append(flip)
        return self.images[indices]


class Linear(nn.Module):
    """U(x) = |x|^2 / 2 + <w, x>: the cheapest energy that learns."""

    def __init__(self, elements: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(elements))

    def forward(self, x: Tensor) -> Tensor:
        return (x.square() / 2 + x * self.weight).flatten(1).sum(1)


class Normed(nn.Module):
    """An energy with BatchNorm, a frozen parameter and an output [n, 1, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 1, 6)
        )
        self.layers[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def images(n: int = 11) -> Tensor:
    return 2 * fl.noise.uniform((n, *SHAPE), seed=9, step=0) - 1


def net(**options: Any) -> fl.ConvEnergy:
    torch.manual_seed(1)
    return fl.ConvEnergy(1, 8, 4, **options)


def sampler(energy: nn.Module | None = None, **options: Any) -> fl.LangevinSampler:
    return fl.LangevinSampler(energy or net(), **{"steps": 3} | options)


def learner(
    chain: fl.LangevinSampler | None = None, data: Any = None, **options: Any
) -> ShortRunLearner:
    defaults = {"batch_size": B, "lr": 1e-2, "data_noise": 0.1, "seed": 5}
    data = images() if data is None else data
    return ShortRunLearner(chain or sampler(), data, **defaults | options)


def state(learning: ShortRunLearner) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in learning.tensors().items()}


def same_state(these: dict[str, Tensor], those: dict[str, Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(v, those[k]) for k, v in these.items())
