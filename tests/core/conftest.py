"""The fixtures of the step."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlangevin as fl
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
