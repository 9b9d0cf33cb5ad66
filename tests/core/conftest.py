"""Fixtures of the tests of the step and of the sampler."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from tests.core.sampler_shared import SHAPE, make_net, numbers
from tests.core.step_shared import A, B


@pytest.fixture
def step_(backend: str, device: torch.device) -> Iterator[Callable[..., Tensor]]:
    """langevin_step_ by one backend, at an address and with coefficients that tests override.

    Tensors that tests create meanwhile are on the backend's device.
    """

    def run(x: Tensor, grad: Tensor | None, **options: Any) -> Tensor:
        defaults = {"step_size": A, "noise_std": B, "seed": 3, "step": 5, "backend": backend}
        return fl.langevin_step_(x, grad, **defaults | options)

    with device:
        yield run


@pytest.fixture
def net() -> nn.Sequential:
    return make_net(nn.Tanh())


@pytest.fixture
def x0() -> Tensor:
    return 0.7 * numbers(SHAPE)
