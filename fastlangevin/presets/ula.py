"""The unadjusted Langevin algorithm at a temperature."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlangevin.arguments import Schedule, check_number
from fastlangevin.sampler import LangevinSampler


def ula(
    energy: Callable[..., Tensor],
    temperature: float | Tensor = 1.0,
    *,
    steps: int = 100,
    step_size: Schedule = 1e-2,
    **settings: Any,
) -> LangevinSampler:
    """Make a :class:`LangevinSampler` of the unadjusted Langevin algorithm at a temperature.

        x <- x - a dE/dx + sqrt(2 a T) z

    The chain's law tends to exp(-E / T) as a tends to 0. temperature T >= 0: a number, or a tensor
    [n] with one per chain. step_size a: a number, a sequence of K, or a tensor [n], [K, 1] or
    [K, n]. ``settings`` are the sampler's other settings. Raises TypeError for noise_std, which a
    and T determine.
    Source: Roberts and Tweedie 1996, sec. 1.4.1.
    """
    if "noise_std" in settings:
        raise TypeError("ula: takes no noise_std, which is sqrt(2 step_size temperature)")
    a: Any = step_size
    if not isinstance(a, Tensor | int | float):
        a = torch.as_tensor(a, dtype=torch.float64, device="cpu")[:, None]
    if not isinstance(temperature, Tensor):
        temperature = check_number("ula", "temperature", temperature)
    product = 2 * a * temperature
    std = product.sqrt() if isinstance(product, Tensor) else math.sqrt(product)
    return LangevinSampler(energy, steps=steps, step_size=step_size, noise_std=std, **settings)
