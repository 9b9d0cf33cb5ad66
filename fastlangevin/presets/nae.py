"""The samplers of normalized autoencoders: sample_langevin and both of sample_langevin_v2."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlangevin.arguments import check_clamp, check_count, check_number
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.presets.common import Randomness, Samplers, Summed, Wrapper, random_keywords
from fastlangevin.presets.nae_records import Records, bounded, recorded_chain


def nae() -> Callable[..., Tensor]:
    """``sample_langevin(x, model, stepsize, n_steps, ...)`` of normalized autoencoders.

        x <- clamp(x + (-stepsize clip(dE/dx) + s_k z))

    s_k = noise_scale, by default sqrt(2 stepsize); stepsize None means noise_scale^2 / 2. If
    noise_anneal is not None (its value is not read), s_k = noise_scale / k from k = 1 on. clip_x:
    (lo, hi) or None. clip_grad bounds the L2 norm over the last dimension, as in the original: of
    each chain [n, d], or of each row of pixels [n, c, h, w]; the gradient is then autograd's.
    Returns a function of the original's arguments with the presets' keywords (``noise`` is
    [n_steps, n, ...]). It returns x [n, ...], detached.

    Differs: the caller's x keeps its requires_grad; no state is copied to the CPU during the chain.
    Raises ValueError for the options ``intermediate_samples`` (use
    :meth:`LangevinSampler.trajectory`), ``reject_boundary`` and ``spherical``, which act on a chain
    between its steps, and ``mh``, which the original accepts and does not read (MALA is
    ``LangevinSampler(metropolis=True)``). The repository's models now call :func:`nae_v2`.
    Source: swyoon/normalized-autoencoders, models/langevin.py; Yoon, Noh and Park, ICML 2021.
    """
    samplers = Samplers()

    @random_keywords
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
        random: Randomness,
    ) -> Tensor:
        unsupported = {
            "intermediate_samples": intermediate_samples,
            # Without clip_x there is no boundary, and the original ignores the option.
            "reject_boundary": reject_boundary and clip_x is not None,
            "spherical": spherical,
            "mh": mh,
        }
        for name, value in unsupported.items():
            if value:
                raise ValueError(f"nae: {name} is not supported")
        stepsize, std = step_and_noise("nae", stepsize, noise_scale)
        stds: Any = std
        if noise_anneal is not None:
            stds = [std / max(k, 1) for k in range(n_steps)]
        settings = {"steps": n_steps, "step_size": stepsize, "noise_std": stds, "clamp": clip_x}
        if clip_grad is None:
            sampler = samplers(model, **settings)
        else:
            ascent = {"maximize": True, "gradient": "network"}
            sampler = samplers(model, (_Clipped, clip_grad), **settings, **ascent)
        return sampler(x, **random._asdict())

    return sample_langevin


def nae_v2() -> Callable[..., dict[str, Any]]:
    """``sample_langevin_v2(x, model, stepsize, n_steps, ...)`` of models/langevin.py.

        y <- sphere(clamp(x - stepsize clip(dE/dx) / temperature + s_k z)),    x <- y or x

    The original's NAE and FFEBM (models/nae.py) call it in the space of images and, with spherical
    states, in that of codes. s_k = noise_scale, by default sqrt(2 stepsize); stepsize None means
    noise_scale^2 / 2. If noise_anneal is not None (its value is not read), s_k = noise_scale / k
    from k = 1 on. clip_x: (lo, hi) or None. With ``reject_boundary`` a chain that would leave these
    bounds stays where it is instead. clip_grad bounds the L2 norm over the last dimension. With
    ``spherical`` states are divided by their L2 norm over dimension 1. With ``mh`` each chain moves
    with probability

        min(1, exp((E(x) - E(y) - (|stepsize (g(x) + g(y)) - s_k z|^2 - |s_k z|^2) / (4 stepsize))
                   / temperature))

    as the original does at any setting. This is Metropolis' rule only at temperature 1, with the
    default s_k and without clips or spheres; ``metropolis=True`` of a :class:`LangevinSampler` is
    exact at every temperature. model: the energy as a module, a bound method or any function, [n]
    or [n, 1]; without ``mh`` it may have any output shape, and its sum is differentiated.

    Returns a function of the original's arguments with the presets' keywords (``noise`` is
    [n_steps, n, ...]). It returns a dict: ``sample`` x [n, ...], detached, and lists on the CPU:
    the n_steps + 1 states ``l_samples``, the moves ``l_dynamics``, -stepsize times the gradient at
    each new state ``l_drift``, and the noise ``l_diffusion``. ``l_accept`` lists, with ``mh``,
    which chains moved at each step, bool [n].

    Differs: the gradient is autograd's, because the records need it; the caller's x keeps its
    requires_grad; with ``mh`` energies [n] each decide for their own chain, while the original's
    broadcasting uses the first chain's energy for all. ``intermediate_samples`` is not read, as in
    the original. Raises FloatingPointError if the chains are not finite at the end.
    Source: swyoon/normalized-autoencoders, models/langevin.py; Yoon, Noh and Park, ICML 2021.
    """

    @random_keywords
    def sample_langevin_v2(
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
        temperature: Any = None,
        *,
        random: Randomness,
    ) -> dict[str, Any]:
        stepsize, noise_scale = step_and_noise("nae_v2", stepsize, noise_scale)
        clamp = check_clamp("nae_v2", clip_x)
        steps = range(check_count("nae_v2", "n_steps", n_steps))
        records = recorded_chain(
            "nae_v2",
            x,
            model,
            [stepsize] * len(steps),
            [noise_scale / (1 if noise_anneal is None else max(k, 1)) for k in steps],
            clip=lambda grad: grad if clip_grad is None else clip_rows(grad, clip_grad),
            bound=lambda x, y: bounded(x, y, clamp, reject_boundary, spherical),
            temperature=temperature,
            mh=mh,
            random=random,
        )
        return _as_dict(records, stepsize, l_samples=records.states)

    return sample_langevin_v2


def nae_mcmc() -> Callable[..., dict[str, Any]]:
    """``sample_langevin_v2(x, model, stepsize, n_step, ...)`` of models/mcmc.py.

    The repository's later ``LangevinSampler``, the sampler of its FFEBMV2 and NAE_L2 models, calls
    it. It differs from :func:`nae_v2` in these: ``bound`` is (lo, hi), "spherical" or None;
    clip_grad bounds each element; if noise_anneal_v2 is not None (its value is not read), the noise
    is noise_scale / k and the step size stepsize / k^2 from k = 1 on. In the dict, ``l_sample``
    [n_step + 1, n, ...] holds the states in one tensor, and ``l_E``, [n_step + 1, n] or
    [n_step + 1, n, 1] as the model returns them, their energies. Both are on the CPU.

    Source: swyoon/normalized-autoencoders, models/mcmc.py.
    """

    @random_keywords
    def sample_langevin_v2(
        x: Tensor,
        model: Callable[..., Tensor],
        stepsize: float | None,
        n_step: int,
        noise_scale: float | None = None,
        bound: tuple[float, float] | str | None = None,
        clip_grad: float | None = None,
        reject_boundary: bool = False,
        noise_anneal: Any = None,
        noise_anneal_v2: Any = None,
        mh: bool = False,
        temperature: Any = None,
        *,
        random: Randomness,
    ) -> dict[str, Any]:
        stepsize, noise_scale = step_and_noise("nae_mcmc", stepsize, noise_scale)
        if isinstance(bound, str) and bound != "spherical":
            raise ValueError(
                f'nae_mcmc: bound must be (lo, hi), "spherical" or None, got {bound!r}'
            )
        spherical = isinstance(bound, str)
        clamp = None if isinstance(bound, str) else check_clamp("nae_mcmc", bound)
        steps = range(check_count("nae_mcmc", "n_step", n_step))
        anneals_both = noise_anneal_v2 is not None
        anneals = anneals_both or noise_anneal is not None
        records = recorded_chain(
            "nae_mcmc",
            x,
            model,
            [stepsize / (max(k, 1) ** 2 if anneals_both else 1) for k in steps],
            [noise_scale / (max(k, 1) if anneals else 1) for k in steps],
            clip=lambda grad: grad if clip_grad is None else grad.clamp(-clip_grad, clip_grad),
            bound=lambda x, y: bounded(x, y, clamp, reject_boundary, spherical),
            temperature=temperature,
            mh=mh,
            random=random,
        )
        out = _as_dict(records, stepsize, l_sample=torch.stack(records.states))
        return out | {"l_E": torch.stack(records.energies)}

    return sample_langevin_v2


def _as_dict(records: Records, stepsize: float, **states: Any) -> dict[str, Any]:
    """The records as both versions of sample_langevin_v2 return them."""
    return {
        "sample": records.x,
        **states,
        "l_dynamics": records.moves,
        "l_drift": [-stepsize * grad for grad in records.grads],
        "l_diffusion": records.noises,
        "l_accept": records.accepted,
    }


def step_and_noise(
    op: str, stepsize: float | None, noise_scale: float | None
) -> tuple[float, float]:
    """Compute the one that is None from the other: noise_scale^2 = 2 stepsize."""
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
    """Bound the norms over the last dimension, by the original's factor."""
    norm = grad.norm(dim=-1, keepdim=True)
    return grad * (torch.where(norm < bound, 1.0, bound / norm) + 1e-6)


class _Clipped(Wrapper):
    """The score -clip(dE/dx) of an energy."""

    def __init__(self, model: Callable[..., Tensor], bound: float) -> None:
        super().__init__(Summed(model))
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        _, grad = energy_and_grad(self.model, x, {})
        return -clip_rows(grad, self.bound)
