"""The step in plain torch, which specifies the result of every other backend."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin.arguments import Coefficient, GradClip
from fastlangevin.kernels import philox


class StepOptions(NamedTuple):
    """The options of a step that are the same at every step of a chain.

    A backend knows elementwise clips only, and so a ``grad_clip`` that is a number.
    """

    seed: int
    first_chain: int
    clamp: tuple[float, float] | None = None
    grad_clip: GradClip | None = None
    maximize: bool = False
    noise_last: bool = False


def langevin_step(
    x: Tensor,
    grad: Tensor | None,
    z: Tensor | None,
    *,
    step_size: Coefficient,
    noise_std: Coefficient,
    clamp: tuple[float, float] | None = None,
    grad_clip: float | None = None,
    maximize: bool = False,
    noise_last: bool = False,
) -> Tensor:
    """One Langevin step as a pure, differentiable function.

        x' = clamp(x + (s a clip(g) + b z)),      s = -1 (descend) or +1 (maximize)

    With ``noise_last`` it is x' = clamp(x + s a clip(g)) + b z. x [n, ...] has any floating dtype;
    grad and z have its shape, or are None for a step without that term. a = step_size and
    b = noise_std are floats, or tensors [n] with one value per chain. ``grad_clip`` bounds each
    element of g. The step is computed in float32, or in float64 for a float64 x, and returned in
    x's dtype. NaN stays NaN.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = x.to(compute)
    move = None
    if grad is not None:
        g = grad.to(compute)
        if grad_clip is not None:
            g = g.clamp(-grad_clip, grad_clip)
        scale = per_chain(step_size, x, compute)
        move = (scale if maximize else -scale) * g
    kick = None if z is None else per_chain(noise_std, x, compute) * z.to(compute)
    if noise_last:
        state = _clamp(state if move is None else state + move, clamp)
        state = state if kick is None else state + kick
    else:
        total = kick if move is None else move if kick is None else move + kick
        state = _clamp(state if total is None else state + total, clamp)
    return state.to(x.dtype)


def step(
    x: Tensor,
    grad: Tensor | None,
    z: Tensor | None,
    *,
    noise_std: Coefficient,
    seed: int,
    step: int,
    first_chain: int,
    **options: Any,
) -> Tensor:
    """:func:`langevin_step`, with z drawn from its address if it is not given."""
    if z is None and not is_zero(noise_std):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        z = philox.normal(
            x.shape, seed=seed, step=step, first_chain=first_chain, device=x.device, dtype=dtype
        )
    return langevin_step(x, grad, z, noise_std=noise_std, **options)


def step_(x: Tensor, grad: Tensor | None, z: Tensor | None, **options: Any) -> Tensor:
    """:func:`step` in place on x, as every backend provides it. Returns x."""
    return x.copy_(step(x, grad, z, **options))


def is_zero(coefficient: Coefficient) -> bool:
    """Whether a coefficient is the number 0. False for tensors: reading them could mean waiting."""
    return not isinstance(coefficient, Tensor) and coefficient == 0


def per_chain(value: Coefficient, x: Tensor, dtype: torch.dtype) -> Coefficient:
    """A coefficient that broadcasts over x: a float unchanged, a tensor [n] as [n, 1, ...]."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(device=x.device, dtype=dtype)
    return value if value.ndim == 0 else over_chains(value, x)


def over_chains(values: Tensor, x: Tensor) -> Tensor:
    """Values of chains [n] as [n, 1, ...], which broadcasts over x [n, ...]."""
    return values.view(-1, *[1] * (x.ndim - 1))


def _clamp(x: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    return x if bounds is None else x.clamp(*bounds)
