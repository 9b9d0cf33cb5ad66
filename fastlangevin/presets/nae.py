"""sample_langevin of normalized autoencoders."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlangevin.arguments import check_number
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.presets.common import Samplers, Summed, Wrapper, take_seed


def nae() -> Callable[..., Tensor]:
    """``sample_langevin(x, model, stepsize, n_steps, ...)`` of normalized autoencoders.

        x <- clamp(x + (-stepsize clip(dE/dx) + s_k z))

    s_k = noise_scale, by default sqrt(2 stepsize); stepsize None is noise_scale^2 / 2. With
    noise_anneal (whatever its value) s_k = noise_scale / k from k = 1 on. clip_x: (lo, hi) or None.
    clip_grad bounds the L2 norm over the last dimension, as in the original: of each chain [n, d],
    of each row of pixels [n, c, h, w]; the gradient is then autograd's. Returns a function of the
    original's arguments with ``seed``, ``generator`` and ``noise`` [n_steps, n, ...] besides,
    which returns x [n, ...], detached.

    Differs: the caller's x keeps its requires_grad; nothing is copied to the CPU on the way. Not
    offered, with a ValueError: ``intermediate_samples`` (see :meth:`LangevinSampler.trajectory`),
    ``reject_boundary``, ``spherical``, which act on a chain between its steps; and ``mh``, which
    the original takes and does not read: MALA is ``LangevinSampler(metropolis=True)``. The
    repository's models call :func:`nae_v2` now.
    Source: swyoon/normalized-autoencoders, models/langevin.py; Yoon, Noh and Park, ICML 2021.
    """
    samplers = Samplers()

    def sample_langevin(
        x: Tensor,
        model: Callable[..., Tensor],
        stepsize: float | None,
        n_steps: int,
        noise_scale: float | None = None,
        intermediate_samples: bool = False,
        clip_x: tuple[float, float] | None = None,
        clip_grad: float | None = None,
        reject_boundary: bool = False,
        noise_anneal: Any = None,
        spherical: bool = False,
        mh: bool = False,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
    ) -> Tensor:
        refused = {
            "intermediate_samples": intermediate_samples,
            # Without clip_x there is no boundary, and the original does not look at this.
            "reject_boundary": reject_boundary and clip_x is not None,
            "spherical": spherical,
            "mh": mh,
        }
        for name, asked in refused.items():
            if asked:
                raise ValueError(f"nae: {name} is not offered")
        stepsize, std = step_and_noise("nae", stepsize, noise_scale)
        stds: Any = std
        if noise_anneal is not None:
            stds = [std / max(k, 1) for k in range(n_steps)]
        settings = {"steps": n_steps, "step_size": stepsize, "noise_std": stds, "clamp": clip_x}
        if clip_grad is None:
            sampler = samplers(model, **settings)
        else:
            along = {"maximize": True, "gradient": "network"}
            sampler = samplers(model, (_Clipped, clip_grad), **settings, **along)
        return sampler(x, seed=take_seed(seed, generator), noise=noise, first_chain=first_chain)

    return sample_langevin


def step_and_noise(
    op: str, stepsize: float | None, noise_scale: float | None
) -> tuple[float, float]:
    """Both, one of which may be missing: noise_scale^2 = 2 stepsize."""
    if stepsize is not None:
        stepsize = check_number(op, "stepsize", stepsize)
    if noise_scale is not None:
        noise_scale = check_number(op, "noise_scale", noise_scale)
    if stepsize is None:
        if noise_scale is None:
            raise ValueError(f"{op}: give stepsize or noise_scale")
        return noise_scale**2 / 2, noise_scale
    return stepsize, math.sqrt(2 * stepsize) if noise_scale is None else noise_scale


def clip_rows(grad: Tensor, bound: float) -> Tensor:
    """Norms over the last dimension, bounded; the factor as in the original."""
    norm = grad.norm(dim=-1, keepdim=True)
    return grad * (torch.where(norm < bound, 1.0, bound / norm) + 1e-6)


class _Clipped(Wrapper):
    """The score -clip(dE/dx)."""

    def __init__(self, model: Callable[..., Tensor], bound: float) -> None:
        super().__init__(Summed(model))
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        _, grad = energy_and_grad(self.model, x, {})
        return -clip_rows(grad, self.bound)
