"""sample_langevin_v2 of normalized autoencoders, in both of that repository's versions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin import noise as _noise
from fastlangevin.arguments import check_clamp, check_count
from fastlangevin.chain.chain import rows
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.untouched import Isolation
from fastlangevin.inputs import check_energy, check_noise, copy_state
from fastlangevin.presets.common import Summed, check_finite, sum_to_chains, take_seed
from fastlangevin.presets.nae import clip_rows, step_and_noise


def nae_v2() -> Callable[..., dict[str, Any]]:
    """``sample_langevin_v2(x, model, stepsize, n_steps, ...)`` of models/langevin.py.

        y <- sphere(clamp(x - stepsize clip(dE/dx) / temperature + s_k z)),    x <- y or x

    It is what NAE and FFEBM of the original's models/nae.py call, in the space of images and, with
    spherical states, in that of codes. s_k = noise_scale, by default sqrt(2 stepsize); stepsize
    None is noise_scale^2 / 2. With noise_anneal (whatever its value) s_k = noise_scale / k from
    k = 1 on. clip_x: (lo, hi) or None; with ``reject_boundary`` a chain that would leave it stays
    where it is instead. clip_grad bounds the L2 norm over the last dimension. ``spherical``: states
    are divided by their L2 norm over dimension 1. ``mh``: each chain moves with probability

        min(1, exp((E(x) - E(y) - (|stepsize (g(x) + g(y)) - s_k z|^2 - |s_k z|^2) / (4 stepsize))
                   / temperature))

    which is Metropolis' rule at temperature 1, without clips, spheres and s_k of one's own; it is
    the original's at any setting. ``metropolis=True`` of a :class:`LangevinSampler` is exact at
    every temperature. model: the energy as a module, a bound method or any function, [n] or [n, 1],
    and of any other output shape without ``mh``: its sum is what is differentiated.

    Returns a function of the original's arguments with ``seed``, ``generator`` and ``noise``
    [n_steps, n, ...] besides. It returns a dict: ``sample`` x [n, ...], detached; lists of the
    n_steps + 1 states ``l_samples``, of the moves ``l_dynamics``, of -stepsize times the gradient
    where each led ``l_drift``, and of the noise ``l_diffusion``, on the CPU; and with ``mh``
    ``l_accept`` of who moved, bool [n].

    Differs: the gradient is autograd's, as the records need it; the caller's x keeps its
    requires_grad; with ``mh`` energies [n] decide each for its own chain, where the original's
    broadcasting takes the first chain's energy for all. ``intermediate_samples`` is not read, as
    there. Raises FloatingPointError for chains that are not finite at the end.
    Source: swyoon/normalized-autoencoders, models/langevin.py; Yoon, Noh and Park, ICML 2021.
    """

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
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
    ) -> dict[str, Any]:
        stepsize, noise_scale = step_and_noise("nae_v2", stepsize, noise_scale)
        clamp = check_clamp("nae_v2", clip_x)
        steps = range(check_count("nae_v2", "n_steps", n_steps))
        found = _walk(
            "nae_v2",
            x,
            model,
            [stepsize] * len(steps),
            [noise_scale / (1 if noise_anneal is None else max(k, 1)) for k in steps],
            clip=lambda grad: grad if clip_grad is None else clip_rows(grad, clip_grad),
            bound=lambda x, y: _on_sphere(_in_box(x, y, clamp, reject_boundary), spherical),
            temperature=temperature,
            mh=mh,
            seed=take_seed(seed, generator),
            noise=noise,
            first_chain=first_chain,
        )
        return {
            "sample": found.x,
            "l_samples": found.states,
            "l_dynamics": found.moves,
            "l_drift": [-stepsize * grad for grad in found.grads],
            "l_diffusion": found.noises,
            "l_accept": found.accepted,
        }

    return sample_langevin_v2


def nae_mcmc() -> Callable[..., dict[str, Any]]:
    """``sample_langevin_v2(x, model, stepsize, n_step, ...)`` of models/mcmc.py.

    It is what that repository's later ``LangevinSampler`` calls, the sampler of its FFEBMV2 and
    NAE_L2 models. As :func:`nae_v2`, but for these: ``bound`` is (lo, hi), "spherical" or None;
    clip_grad bounds each element; with noise_anneal_v2 (whatever its value) s_k = noise_scale / k
    and stepsize / k^2 from k = 1 on. The dict's states are one tensor ``l_sample``
    [n_step + 1, n, ...] and ``l_E`` [n_step + 1, n] or [n_step + 1, n, 1], of the shape that the
    model returns, has their energies; both are on the CPU.

    Source: swyoon/normalized-autoencoders, models/mcmc.py.
    """

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
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
    ) -> dict[str, Any]:
        stepsize, noise_scale = step_and_noise("nae_mcmc", stepsize, noise_scale)
        if isinstance(bound, str) and bound != "spherical":
            raise ValueError(
                f'nae_mcmc: bound must be (lo, hi), "spherical" or None, got {bound!r}'
            )
        spherical = isinstance(bound, str)
        clamp = None if isinstance(bound, str) else check_clamp("nae_mcmc", bound)
        steps = range(check_count("nae_mcmc", "n_step", n_step))
        both = noise_anneal_v2 is not None
        anneals = both or noise_anneal is not None
        found = _walk(
            "nae_mcmc",
            x,
            model,
            [stepsize / (max(k, 1) ** 2 if both else 1) for k in steps],
            [noise_scale / (max(k, 1) if anneals else 1) for k in steps],
            clip=lambda grad: grad if clip_grad is None else grad.clamp(-clip_grad, clip_grad),
            bound=lambda x, y: _on_sphere(_in_box(x, y, clamp, reject_boundary), spherical),
            temperature=temperature,
            mh=mh,
            seed=take_seed(seed, generator),
            noise=noise,
            first_chain=first_chain,
        )
        return {
            "sample": found.x,
            "l_sample": torch.stack(found.states),
            "l_dynamics": found.moves,
            "l_drift": [-stepsize * grad for grad in found.grads],
            "l_diffusion": found.noises,
            "l_accept": found.accepted,
            "l_E": torch.stack(found.energies),
        }

    return sample_langevin_v2


class _Records(NamedTuple):
    """A chain's end on its device, and what it did on the CPU."""

    x: Tensor
    states: list[Tensor]  # K + 1
    energies: list[Tensor]  # K + 1, as the model returned them
    grads: list[Tensor]  # clipped, of the state after each step
    moves: list[Tensor]  # before bounds and rejections
    noises: list[Tensor]
    accepted: list[Tensor]  # with mh: bool [n], on the device


class _Seen(Summed):
    """An energy whose output is at hand in the shape in which it came."""

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        out = self.model(x, **given)
        self.out = out.detach() if isinstance(out, Tensor) else out
        return sum_to_chains(out, len(x))


def _walk(
    op: str,
    x: Any,
    model: Callable[..., Tensor],
    sizes: Sequence[Any],
    stds: Sequence[Any],
    *,
    clip: Callable[[Tensor], Tensor],
    bound: Callable[[Tensor, Tensor], Tensor],
    temperature: Any,
    mh: bool,
    seed: int,
    noise: Tensor | None,
    first_chain: int,
) -> _Records:
    """A step for each of ``sizes`` and ``stds``, recorded."""
    check_energy(op, model)
    temperature = 1.0 if temperature is None else temperature
    energy = _Seen(model)
    with torch.inference_mode(False), torch.no_grad():
        x = copy_state(op, x, energy)
        check_noise(op, noise, (len(sizes), *x.shape), x.device)
        states, energies, grads, moves, noises, accepts = ([] for _ in range(6))
        isolation = Isolation(energy, x.device, seed)

        def evaluate(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
            """(energies [n], the model's output, the clipped gradient)."""
            with isolation.step(k):
                values, grad = energy_and_grad(isolation.network, x, {})
            if mh and energy.out.numel() != len(x):
                raise ValueError(
                    f"{op}: with mh=True the model must return [n] or [n, 1], "
                    f"got {list(energy.out.shape)} for {len(x)} chains"
                )
            return values.to(x.dtype), energy.out, clip(grad)

        here = evaluate(x, 0)
        states.append(x.cpu())
        energies.append(here[1].cpu())
        for k, (a, b) in enumerate(zip(sizes, stds, strict=True)):
            z = noise[k].to(x.dtype) if noise is not None else _normal(x, seed, k, first_chain)
            z = b * z
            move = -a * here[2] / temperature + z
            y = bound(x, x + move)
            there = evaluate(y, k + 1)
            if mh:
                back = a * (here[2] + there[2]) - z
                change = rows(back).square().sum(1) - rows(z).square().sum(1)
                log_odds = (here[0] - there[0] - change / (4 * a)) / temperature
                u = _noise.uniform(
                    (len(x),), seed=seed, step=k, stream=_noise.ACCEPT,
                    first_chain=first_chain, device=x.device,
                )  # fmt: skip
                accepts.append(~(u > log_odds.exp()))
                x, here = _choose(accepts[-1], (y, there), (x, here))
            else:
                x, here = y, there
            states.append(x.cpu())
            energies.append(here[1].cpu())
            grads.append(here[2].cpu())
            moves.append(move.cpu())
            noises.append(z.cpu())
    check_finite(x, len(sizes))
    return _Records(x, states, energies, grads, moves, noises, accepts)


def _normal(x: Tensor, seed: int, k: int, first_chain: int) -> Tensor:
    return _noise.normal(
        x.shape, seed=seed, step=k, first_chain=first_chain, device=x.device, dtype=x.dtype
    )


def _choose(accepted: Tensor, new: Any, old: Any) -> Any:
    """Of every tensor the rows of ``new`` where accepted, else those of ``old``."""
    if isinstance(new, tuple):
        return tuple(_choose(accepted, a, b) for a, b in zip(new, old, strict=True))
    if new.ndim == 0:  # the one chain's energy
        return new if bool(accepted) else old
    return torch.where(accepted.view(-1, *[1] * (new.ndim - 1)), new, old)


def _in_box(x: Tensor, y: Tensor, clamp: tuple[float, float] | None, rejects: bool) -> Tensor:
    """y clamped, or where a chain's left the box x."""
    if clamp is None:
        return y
    if not rejects:
        return y.clamp(*clamp)
    inside = rows((y >= clamp[0]) & (y <= clamp[1])).all(1)
    chosen: Tensor = _choose(inside, y, x)
    return chosen


def _on_sphere(y: Tensor, asked: bool) -> Tensor:
    return y / y.norm(dim=1, keepdim=True) if asked else y
