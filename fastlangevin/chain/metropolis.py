"""Metropolis adjustment (MALA): every Langevin step is a proposal that is accepted or rejected.

From x, let G(x) = s a clip(g(x)) be the move of a step. Then

    y = x + G(x) + b z
    accept with probability min(1, exp(-(E(y) - E(x)) / T) q(x | y) / q(y | x)),   T = b^2 / (2 a)

where q(. | x) is a normal density about x + G(x) with standard deviation b. The law of the chain is
then exactly exp(-E / T), restricted to the box of the clamp; proposals outside it are rejected.
With d = y - x,

    log q(x | y) / q(y | x) = -(G(x) + G(y)) . (2 d - G(x) + G(y)) / (2 b^2)

which, unlike a difference of two squares, loses no digits for a small b. E(y) - E(x) has only the
digits of the network's output: bfloat16 rounds energies near 256 to whole numbers. The uniforms are
those of the stream noise.ACCEPT at (seed, chain, step).

Source: Roberts & Tweedie 1996, "Exponential convergence of Langevin distributions and their
discrete approximations".
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.arguments import Coefficient, at_step
from fastlangevin.chain.chain import Chain, Overflow, Step, rows
from fastlangevin.gradients.engine import Engine
from fastlangevin.kernels.memory import in_memory
from fastlangevin.kernels.reference import over_chains, per_chain
from fastlangevin.step import apply_step_, fold_norm_clip, resolve_backend


class AdjustedChain(Chain):
    """A chain whose steps are accepted or rejected; it evaluates K + 1 gradients, one at x0."""

    def steps_with(
        self,
        engine: Engine | None,
        x: Tensor,
        overflow: Overflow | None,
        want_energies: bool = False,
        every: int = 1,
    ) -> Iterator[Step]:
        settings = self.settings
        if in_memory(x) and not bool(inside(x, settings.clamp).all()):
            raise ValueError(
                "LangevinSampler: with metropolis=True x0 must lie within clamp="
                f"{settings.clamp}, since proposals outside are rejected"
            )
        run = resolve_backend(settings.backend, x.device)
        chain = self if engine is not None else self.isolated(x.device)
        energies, grad = chain._evaluate(engine, x, 0)
        for k in range(settings.steps):
            step = Step(k, x, energies, grad)
            with torch.no_grad():
                y = self._propose(run, x, grad, k)
                at_y = chain._evaluate(engine, y, k)
                accepted = self._accept(x, y, (energies, grad), at_y, k)
                x.copy_(torch.where(over_chains(accepted, x), y, x))
                energies = torch.where(accepted, at_y[0], energies)
                grad = torch.where(over_chains(accepted, x), at_y[1], grad)
            if overflow is not None:
                overflow.look_at(step)
            yield step._replace(accepted=accepted)

    def _evaluate(self, engine: Engine | None, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(energies [n], gradient) at x."""
        with torch.no_grad():
            energies, grad = self.evaluate(x, k) if engine is None else engine(x, True)
        assert energies is not None
        return energies, grad

    def _propose(self, run: Callable[..., Tensor], x: Tensor, grad: Tensor, k: int) -> Tensor:
        settings = self.settings
        return apply_step_(
            run, x.clone(), grad, self._noise_at(k),
            step_size=at_step(settings.step_size, k), noise_std=at_step(settings.noise_std, k),
            step=self.first_step + k, **self._update_options() | {"clamp": None},
        )  # fmt: skip

    def _accept(
        self, x: Tensor, y: Tensor, at_x: tuple[Tensor, Tensor], at_y: tuple[Tensor, Tensor], k: int
    ) -> Tensor:
        """Whether each chain moves to y, bool [n], from (energies, gradient) at x and y.

        A proposal with a NaN energy is rejected.
        """
        settings = self.settings
        a, b = at_step(settings.step_size, k), at_step(settings.noise_std, k)
        sign = 1 if settings.maximize else -1
        forth, back = (sign * self._move(grad.to(x.dtype), a) for grad in (at_x[1], at_y[1]))
        gain = sign * (at_y[0].double() - at_x[0].double())
        product = rows((forth + back) * (2 * (y - x) - forth + back)).sum(1, dtype=torch.float64)
        a, b = (per_chain(value, gain, torch.float64) for value in (a, b))
        ratio = (2 * a * gain - product / 2) / b**2
        u = _noise.uniform(
            (len(x),), seed=self.seed, step=self.first_step + k, stream=_noise.ACCEPT,
            first_chain=self.first_chain, device=x.device,
        )  # fmt: skip
        return (u.double().log() < ratio) & inside(y, settings.clamp)

    def _move(self, grad: Tensor, a: Coefficient) -> Tensor:
        """The move a clip(g)."""
        a, bound = fold_norm_clip(grad, a, self.settings.grad_clip)
        clipped = grad if bound is None else grad.clamp(-bound, bound)
        return per_chain(a, grad, grad.dtype) * clipped


def inside(x: Tensor, clamp: tuple[float, float] | None) -> Tensor:
    """Whether each chain is within the bounds, bool [n]."""
    if clamp is None:
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    return rows((x >= clamp[0]) & (x <= clamp[1])).all(1)
