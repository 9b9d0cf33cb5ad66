"""Annealed Langevin dynamics along a noise-conditional score network."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlangevin.arguments import check_count, check_not_text
from fastlangevin.presets.common import Labelled, Randomness, Samplers, random_keywords


def ncsn() -> Callable[..., list[Tensor]]:
    """``anneal_Langevin_dynamics(x_mod, scorenet, sigmas, n_steps_each=200, ...)`` of NCSNv2.

        x <- x + a_c s(x, c) + sqrt(2 a_c) z,    a_c = step_lr (sigma_c / sigma_L)^2

    It takes n_steps_each steps at each level c = 0 .. L - 1, as one chain of L n_steps_each steps.
    With denoise a final x <- x + sigma_L^2 s(x, L - 1) follows. scorenet: the score d log p / d x,
    called scorenet(x, labels [n] int64). sigmas: L numbers or a tensor [L]; the last is the
    smallest. Returns a function of the original's arguments with the presets' keywords (``noise``
    is [L n_steps_each, n, ...]). It returns a list of tensors on the CPU: the states after every
    step and the denoised states, or with final_only the last of these alone.

    Differs: step sizes are computed in float64. ``verbose=True``, which prints, raises ValueError.
    Source: ermongroup/ncsnv2, models/__init__.py; Song and Ermon, NeurIPS 2020.
    """
    walkers, denoisers = Samplers(), Samplers()

    @random_keywords
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
        random: Randomness,
    ) -> list[Tensor]:
        if verbose:
            raise ValueError("ncsn: verbose is not supported; use LangevinSampler.diagnose")
        seed, noise, first_chain = random
        check_not_text("ncsn", "sigmas", sigmas, "a sequence of numbers or a tensor [L]")
        levels = [float(sigma) for sigma in sigmas]
        steps_per_level = check_count("ncsn", "n_steps_each", n_steps_each)
        if noise is not None and len(noise) != len(levels) * steps_per_level:
            raise ValueError(
                f"ncsn: noise must have length {len(levels) * steps_per_level}, one for each step, "
                f"got {len(noise)}"
            )
        x, images = x_mod, []
        every_level = torch.arange(len(levels), dtype=torch.int64, device=x_mod.device)
        labels = every_level[:, None].repeat(1, len(x_mod))
        ascent: dict[str, Any] = {"wrap": (Labelled,), "maximize": True, "gradient": "network"}
        # The chain runs level by level, so that the device holds the states of one level.
        for c, sigma in enumerate(levels):
            size, first = step_lr * (sigma / levels[-1]) ** 2, c * steps_per_level
            schedule: dict[str, Any] = {"step_size": size, "noise_std": math.sqrt(2 * size)}
            sampler = walkers(scorenet, steps=steps_per_level, **schedule, **ascent)
            options: dict[str, Any] = {
                "seed": seed,
                "first_chain": first_chain,
                "first_step": first,
                "noise": None if noise is None else noise[first : first + steps_per_level],
                "label": labels[c],
            }
            if final_only:
                x = sampler(x, **options)
            else:
                states = sampler.trajectory(x, **options)
                images += [state.to("cpu", copy=True) for state in states[1:]]
                x = states[-1].clone()
        if denoise:
            ascent |= {"step_size": levels[-1] ** 2, "noise_std": 0.0}
            x = denoisers(scorenet, steps=1, **ascent)(x, seed=seed, label=labels[-1])
            images.append(x.cpu())
        return [x.cpu()] if final_only else images

    return anneal_Langevin_dynamics
