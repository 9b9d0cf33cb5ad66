"""One call's chain: the settings of a sampler, bound to a seed and stepped through."""

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin.arguments import at_step
from fastlangevin.score import energy_and_grad, left_as_found, seed_generators
from fastlangevin.step import apply_step_, resolve_backend

if TYPE_CHECKING:
    from fastlangevin.sampler import LangevinSampler


class Step(NamedTuple):
    """One step's results: its index, the state after it, energies [n] and gradient before it."""

    k: int
    x: Tensor
    energies: Tensor
    grad: Tensor


class Chain(NamedTuple):
    """The checked arguments of one call, beside the sampler that they were given to."""

    sampler: "LangevinSampler"
    seed: int
    first_chain: int
    first_step: int
    noise: Tensor | None
    model_kwargs: dict[str, Any]

    def walk(self, x: Tensor) -> Iterator[Step]:
        """The chain, in place on x: yields after every step. An empty batch takes none."""
        if x.shape[0] == 0:
            return
        run = resolve_backend(self.sampler.backend, x.device)
        with left_as_found(self.sampler.energy, x.device) as buffers:
            for k in range(self.sampler.steps):
                with torch.no_grad():
                    step = self.transition(run, x, k)
                buffers.put_back()
                yield step

    def transition(
        self, run: Callable[..., Tensor], x: Tensor, k: int, create_graph: bool = False
    ) -> Step:
        """Step k by ``run``: in place on x for a backend, pure for ``reference.step``."""
        seed_generators(x.device, self.seed, self.first_step + k)
        sampler = self.sampler
        update = functools.partial(
            apply_step_,
            run,
            z=None if self.noise is None else self.noise[k],
            seed=self.seed,
            step=self.first_step + k,
            first_chain=self.first_chain,
            clamp=sampler.clamp,
            grad_clip=sampler.grad_clip,
            maximize=sampler.maximize,
            noise_last=sampler.noise_order == "last",
        )
        step_size, noise_std = at_step(sampler.step_size, k), at_step(sampler.noise_std, k)
        if sampler.noise_order == "before":
            x = update(x, None, step_size=0.0, noise_std=noise_std)
            noise_std = 0.0
        energies, grad = energy_and_grad(
            sampler.energy, x, self.model_kwargs, sampler.precision, create_graph
        )
        x = update(x, grad, step_size=step_size, noise_std=noise_std)
        return Step(k, x, energies, grad)

    def check_finite(self, x: Tensor, energies: Tensor) -> None:
        """FloatingPointError if a chain is not finite at its end, or its last energy NaN."""
        chains = torch.isfinite(x.flatten(1) if x.ndim > 1 else x[:, None]).all(1)
        if energies.numel():
            chains &= ~torch.isnan(energies)
        if not bool(chains.all()):
            lost = int((~chains).sum())
            raise FloatingPointError(
                f"LangevinSampler: {lost} of {x.shape[0]} chains are not finite after "
                f"{self.sampler.steps} steps, or their energy is NaN; diagnose() shows at which "
                "step it began, and a smaller step_size, clamp or grad_clip may help"
            )
