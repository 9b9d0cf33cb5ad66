"""The recorded chain behind both versions of sample_langevin_v2."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.chain.chain import check_finite, rows
from fastlangevin.chain.metropolis import inside
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.untouched import Isolation
from fastlangevin.inputs import check_energy, check_noise, read_state
from fastlangevin.kernels.reference import over_chains
from fastlangevin.presets.common import Randomness, Summed, sum_to_chains


class Records(NamedTuple):
    """The last state on its device, and lists on the CPU of what happened at every step."""

    x: Tensor
    states: list[Tensor]  # K + 1
    energies: list[Tensor]  # K + 1, as the model returned them
    grads: list[Tensor]  # clipped, at the state after each step
    moves: list[Tensor]  # before bounds and rejections
    noises: list[Tensor]
    accepted: list[Tensor]  # bool [n], on the device; empty without mh


class _KeepsOutput(Summed):
    """A summed energy that keeps the model's last output, in its own shape, as ``out``."""

    out: Any = None

    def forward(self, x: Tensor, **model_kwargs: Any) -> Tensor:
        out = self.model(x, **model_kwargs)
        self.out = out.detach() if isinstance(out, Tensor) else out
        return sum_to_chains(out, len(x))


def recorded_chain(
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
    random: Randomness,
) -> Records:
    """Take and record one step for each pair of a step size and a noise deviation.

    y <- bound(x, x - size clip(dE/dx) / temperature + std z),    x <- y, or with mh y or x
    """
    seed, noise, first_chain = random
    check_energy(op, model)
    temperature = 1.0 if temperature is None else temperature
    energy = _KeepsOutput(model)
    with torch.inference_mode(False), torch.no_grad():
        x, is_copy = read_state(op, x, energy)
        x = x if is_copy else x.clone()
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

        at_x = evaluate(x, 0)
        states.append(x.cpu())
        energies.append(at_x[1].cpu())
        for k, (a, b) in enumerate(zip(sizes, stds, strict=True)):
            if noise is not None:
                z = b * noise[k].to(x.dtype)
            else:
                z = b * _noise.normal(
                    x.shape, seed=seed, step=k, first_chain=first_chain, device=x.device,
                    dtype=x.dtype,
                )  # fmt: skip
            move = -a * at_x[2] / temperature + z
            y = bound(x, x + move)
            at_y = evaluate(y, k + 1)
            if mh:
                back = a * (at_x[2] + at_y[2]) - z
                change = rows(back).square().sum(1) - rows(z).square().sum(1)
                log_odds = (at_x[0] - at_y[0] - change / (4 * a)) / temperature
                u = _noise.uniform(
                    (len(x),), seed=seed, step=k, stream=_noise.ACCEPT,
                    first_chain=first_chain, device=x.device,
                )  # fmt: skip
                accepts.append(~(u > log_odds.exp()))
                x, at_x = _choose(accepts[-1], (y, at_y), (x, at_x))
            else:
                x, at_x = y, at_y
            states.append(x.cpu())
            energies.append(at_x[1].cpu())
            grads.append(at_x[2].cpu())
            moves.append(move.cpu())
            noises.append(z.cpu())
    check_finite(x, None, len(sizes))
    return Records(x, states, energies, grads, moves, noises, accepts)


def _choose(accepted: Tensor, new: Any, old: Any) -> Any:
    """Take from every tensor the rows of ``new`` that are accepted, and else those of ``old``."""
    if isinstance(new, tuple):
        return tuple(_choose(accepted, a, b) for a, b in zip(new, old, strict=True))
    if new.ndim == 0:  # the one chain's energy
        return new if bool(accepted) else old
    return torch.where(over_chains(accepted, new), new, old)


def bounded(
    x: Tensor, y: Tensor, clamp: tuple[float, float] | None, rejects: bool, spherical: bool
) -> Tensor:
    """Clamp y, or with ``rejects`` return x for each chain whose y is outside; then normalise."""
    if clamp is not None:
        y = _choose(inside(y, clamp), y, x) if rejects else y.clamp(*clamp)
    return y / y.norm(dim=1, keepdim=True) if spherical else y
