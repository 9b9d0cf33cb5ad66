"""Annealed Langevin dynamics along a noise-conditional score network."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlangevin.arguments import check_count
from fastlangevin.presets.common import Labelled, Samplers, take_seed


def ncsn() -> Callable[..., list[Tensor]]:
    """``anneal_Langevin_dynamics(x_mod, scorenet, sigmas, n_steps_each=200, ...)`` of NCSNv2.

        x <- x + a_c s(x, c) + sqrt(2 a_c) z,    a_c = step_lr (sigma_c / sigma_L)^2

    n_steps_each steps at each level c = 0 .. L - 1, as one chain of L n_steps_each steps; with
    denoise then once x <- x + sigma_L^2 s(x, L - 1). scorenet: the score d log p / d x, called
    scorenet(x, labels [n] int64). sigmas: L numbers or a tensor [L], the last the least. Returns a
    function of the original's arguments with ``seed``, ``generator`` and ``noise``
    [L n_steps_each, n, ...] besides. It returns a list of tensors on the CPU: the states after
    every step and the denoised one, or with final_only the last alone.

    Differs: step sizes are computed in float64. ``verbose=True``, which prints, raises ValueError.
    Source: ermongroup/ncsnv2, models/__init__.py; Song and Ermon, NeurIPS 2020.
    """
    walkers, denoisers = Samplers(), Samplers()

    def anneal_Langevin_dynamics(
        x_mod: Tensor,
        scorenet: Callable[..., Tensor],
        sigmas: Tensor | Sequence[float],
        n_steps_each: int = 200,
        step_lr: float = 0.000008,
        final_only: bool = False,
        verbose: bool = False,
        denoise: bool = True,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
    ) -> list[Tensor]:
        if verbose:
            raise ValueError("ncsn: verbose is not offered; LangevinSampler.diagnose measures")
        levels = [float(sigma) for sigma in sigmas]
        each = check_count("ncsn", "n_steps_each", n_steps_each)
        if noise is not None and len(noise) != len(levels) * each:
            raise ValueError(
                f"ncsn: noise must have one of [n, ...] for each of {len(levels) * each} steps, "
                f"got {len(noise)}"
            )
        seed, x, images = take_seed(seed, generator), x_mod, []
        labels = [
            torch.full((x_mod.shape[0],), c, dtype=torch.int64, device=x_mod.device)
            for c in range(len(levels))
        ]
        along: dict[str, Any] = {"wrap": (Labelled,), "maximize": True, "gradient": "network"}
        # One chain, a level at a time: so much of it is on the device.
        for c, sigma in enumerate(levels):
            size, first = step_lr * (sigma / levels[-1]) ** 2, c * each
            sampler = walkers(
                scorenet, steps=each, step_size=size, noise_std=math.sqrt(2 * size), **along
            )
            options: dict[str, Any] = {
                "seed": seed,
                "first_chain": first_chain,
                "first_step": first,
                "noise": None if noise is None else noise[first : first + each],
                "label": labels[c],
            }
            if final_only:
                x = sampler(x, **options)
            else:
                states = sampler.trajectory(x, **options)
                images += [state.to("cpu", copy=True) for state in states[1:]]
                x = states[-1].clone()
        if denoise:
            last = denoisers(scorenet, steps=1, step_size=levels[-1] ** 2, noise_std=0.0, **along)
            x = last(x, seed=seed, label=labels[-1])
            images.append(x.cpu())
        return [x.cpu()] if final_only else images

    return anneal_Langevin_dynamics
