"""sample_langevin of normalized autoencoders."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlangevin.presets.common import Samplers, run, take_seed


def nae() -> Callable[..., Tensor]:
    """``sample_langevin(x, model, stepsize, n_steps, ...)`` of normalized autoencoders.

        x <- clamp(x + (-stepsize clip(dE/dx) + s_k z))

    s_k = noise_scale, by default sqrt(2 stepsize); stepsize None is noise_scale^2 / 2. With
    noise_anneal (whatever its value) s_k = noise_scale / k from k = 1 on. clip_x: (lo, hi) or None.
    clip_grad: bounds the L2 norm of the gradient of each chain [n, d]. Returns a function of the
    original's arguments with ``seed``, ``generator`` and ``noise`` [n_steps, n, ...] besides,
    which returns x [n, ...], detached.

    Differs: the caller's x keeps its requires_grad; nothing is copied to the CPU on the way; the
    clip is without the 1e-6 that the original adds to its factor, which moves a chain by that part
    of its gradient. Not offered, with a ValueError: clip_grad for states of more than two
    dimensions (it clips every row of pixels), ``intermediate_samples`` (see
    :meth:`LangevinSampler.trajectory`), ``reject_boundary`` and ``spherical``; and ``mh``, which
    the original takes and does not read.
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
    ) -> Tensor:
        refused = {
            "intermediate_samples": intermediate_samples,
            # Without clip_x there is no boundary, and the original does not look at this.
            "reject_boundary": reject_boundary and clip_x is not None,
            "spherical": spherical,
            "mh": mh,
            "clip_grad for states of more than two dimensions": clip_grad is not None
            and x.ndim != 2,
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
        sampler = samplers(
            model,
            steps=n_steps,
            step_size=stepsize,
            noise_std=std,
            clamp=clip_x,
            grad_clip=None if clip_grad is None else ("chain_norm", clip_grad),
        )
        return run(sampler, x, seed=take_seed(seed, generator), noise=noise)

    return sample_langevin
