"""Schedules of step sizes and noise along a chain, in the form that LangevinSampler takes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fastlangevin.arguments import check_count, check_number


class Annealed(NamedTuple):
    """The schedules of a chain through noise levels, and the level of every step."""

    steps: int  #: K = L steps_each
    step_size: list[float]  #: [K]
    noise_std: list[float]  #: [K]
    sigma: list[float]  #: [K] the noise level of the step
    level: list[int]  #: [K] its index from 0 to L - 1, the input of label-conditioned networks


def levels(sigmas: Sequence[float] | Tensor, steps_each: int, step_lr: float) -> Annealed:
    """Schedules of annealed Langevin dynamics for noise-conditional score networks.

        a_i = step_lr (sigma_i / sigma_L)^2,      b_i = sqrt(2 a_i)

    Every level samples at temperature 1. For a network net(x, sigma) and states x0:

        plan = fl.anneal.levels(sigmas, steps_each=100, step_lr=2e-5)
        sampler = fl.LangevinSampler.from_score(
            net, steps=plan.steps, step_size=plan.step_size, noise_std=plan.noise_std
        )
        x = sampler(x0, step_kwargs={"sigma": plan.sigma})

    Source: Song & Ermon, arXiv 1907.05600, algorithm 1. As in the authors' code, step_lr is half of
    its epsilon.

    Args:
        sigmas: L noise levels > 0 in the order of sampling, the largest first.
        steps_each: The number of steps at each level.
        step_lr: The step size at the last level, >= 0.

    Raises:
        TypeError, ValueError: An argument does not fit. The message names it.
    """
    if not isinstance(sigmas, Sequence | Tensor | np.ndarray) or isinstance(sigmas, str):
        raise TypeError(f"levels: sigmas must be a sequence or a tensor [L], got {sigmas!r}")
    values = [check_number("levels", "sigmas", sigma) for sigma in sigmas]
    if not values or min(values) == 0:
        raise ValueError(f"levels: sigmas must be one or more values > 0, got {values}")
    steps_per_level = check_count("levels", "steps_each", steps_each)
    rate = check_number("levels", "step_lr", step_lr)
    sizes = [rate * (sigma / values[-1]) ** 2 for sigma in values]
    level = [i for i in range(len(values)) for _ in range(steps_per_level)]
    return Annealed(
        steps=len(level),
        step_size=[sizes[i] for i in level],
        noise_std=[math.sqrt(2 * sizes[i]) for i in level],
        sigma=[values[i] for i in level],
        level=level,
    )


def cooldown(settings: Mapping[str, Any], steps: int = 10) -> dict[str, Any]:
    """Settings of a sampler whose chain goes on with ``steps`` small steps without noise.

    The added step sizes fall from a / 2 to a / 20 with a constant ratio, a being the step size of
    the chain. They remove the noise that the chain has added and leave its image. The result no
    longer follows exp(-E / T). For samples of a short-run model:

        sampler = fl.load("runs/mine")
        cooled = fl.LangevinSampler(sampler.energy, **fl.anneal.cooldown(sampler.settings()))

    Args:
        settings: What :meth:`LangevinSampler.settings` returns. step_size and noise_std must be
            numbers.
        steps: The number of steps to add, >= 1.

    Raises:
        TypeError, ValueError: An argument does not fit. The message names it.
    """
    count = check_count("cooldown", "steps", steps)
    for name in ("step_size", "noise_std"):
        if not isinstance(settings[name], int | float):
            raise TypeError(
                f"cooldown: {name} must be a number, and not a schedule or a tensor, got "
                f"{settings[name]!r}"
            )
    first, a, b = settings["steps"], settings["step_size"], settings["noise_std"]
    return {
        **settings,
        "steps": first + count,
        "step_size": [a] * first + [a * factor for factor in geometric(0.5, 0.05, count)],
        "noise_std": [b] * first + [0.0] * count,
    }


def geometric(first: float, last: float, steps: int) -> list[float]:
    """K values from ``first`` to ``last``, both > 0, with a constant ratio between neighbours."""
    first, last = check_number("geometric", "first", first), check_number("geometric", "last", last)
    count = check_count("geometric", "steps", steps)
    if not first * last > 0:
        raise ValueError(f"geometric: first and last must be > 0, got {first} and {last}")
    ratio = last / first
    return [first * ratio ** (k / max(count - 1, 1)) for k in range(count)]


def linear(value: float, steps: int) -> list[float]:
    """K values ``value`` (K - 1 - k) / K; the last is 0, which gives a step without noise."""
    value, count = check_number("linear", "value", value), check_count("linear", "steps", steps)
    return [value * (count - 1 - k) / count for k in range(count)]


def harmonic(value: float, steps: int) -> list[float]:
    """K values ``value`` / (1 + k)."""
    value, count = check_number("harmonic", "value", value), check_count("harmonic", "steps", steps)
    return [value / (1 + k) for k in range(count)]
