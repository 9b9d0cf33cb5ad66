"""sample_langevin of normalized autoencoders."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlangevin.presets.common import Samplers, take_seed
from fastlangevin.scores.general import energy_and_grad


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
    the original takes and does not read: MALA is ``LangevinSampler(metropolis=True)``.
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
        if stepsize is None and noise_scale is None:
            raise ValueError("nae: give stepsize or noise_scale")
        if noise_scale is None:
            assert stepsize is not None
            noise_scale = math.sqrt(2 * stepsize)
        if stepsize is None:
            stepsize = noise_scale**2 / 2
        std: Any = float(noise_scale)
        if noise_anneal is not None:
            std = [std / max(k, 1) for k in range(n_steps)]
        settings = {"steps": n_steps, "step_size": stepsize, "noise_std": std, "clamp": clip_x}
        if clip_grad is None:
            sampler = samplers(model, **settings)
        else:
            along = {"maximize": True, "score": "network"}
            sampler = samplers(model, (_Clipped, clip_grad), **settings, **along)
        return sampler(x, seed=take_seed(seed, generator), noise=noise, first_chain=first_chain)

    return sample_langevin


class _Clipped(nn.Module):
    """The score -clip(dE/dx): norms over the last dimension, the factor as in the original."""

    def __init__(self, model: Callable[..., Tensor], bound: float) -> None:
        super().__init__()
        self.model, self.bound = model, bound

    def forward(self, x: Tensor) -> Tensor:
        _, grad = energy_and_grad(self.model, x, {})
        norm = grad.norm(dim=-1, keepdim=True)
        return -grad * (torch.where(norm < self.bound, 1.0, self.bound / norm) + 1e-6)
