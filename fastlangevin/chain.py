"""One call's chain: the settings of a sampler, bound to a seed and stepped through."""

import contextlib
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
    """One step's results: its index, the state after it, energies [n] and gradient before it.

    Energies are None where nobody asked for them and the score does not pass by them.
    """

    k: int
    x: Tensor
    energies: Tensor | None
    grad: Tensor


class Chain(NamedTuple):
    """The checked arguments of one call, beside the sampler that they were given to."""

    sampler: "LangevinSampler"
    seed: int
    first_chain: int
    first_step: int
    noise: Tensor | None
    model_kwargs: dict[str, Any]

    def walk(self, x: Tensor, want_energies: bool = False) -> Iterator[Step]:
        """The chain, in place on x: yields after every step. An empty batch takes none.

        Energies come with the last step, and with all others where they are wanted.
        """
        if x.shape[0] == 0:
            return
        sampler, steps = self.sampler, self.sampler.steps
        run = resolve_backend(sampler.backend, x.device)
        score = sampler.choose_score(x, self.model_kwargs).run
        half = _Overflow(x.device) if sampler.precision == "fp16" else None
        with contextlib.ExitStack() as stack:
            buffers = None
            if score is None:
                buffers = stack.enter_context(left_as_found(sampler.energy, x.device))
            else:
                score.begin()
            for k in range(steps):
                with torch.no_grad():
                    wanted = want_energies or k == steps - 1
                    lean = None if score is None else functools.partial(score, want_energies=wanted)
                    step = self.transition(run, x, k, lean)
                if buffers is not None:
                    buffers.put_back()
                if half is not None:
                    half.look_at(step)
                yield step
        if half is not None:
            half.check()

    def transition(
        self,
        run: Callable[..., Tensor],
        x: Tensor,
        k: int,
        score: Callable[[Tensor], tuple[Tensor | None, Tensor]] | None = None,
        create_graph: bool = False,
    ) -> Step:
        """Step k by ``run``: in place on x for a backend, pure for ``reference.step``.

        score: x -> (energies or None, gradient); by default the general one.
        """
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
        if score is None:
            seed_generators(x.device, self.seed, self.first_step + k)
            score = functools.partial(
                energy_and_grad, sampler.energy, model_kwargs=self.model_kwargs,
                precision=sampler.precision, create_graph=create_graph,
            )  # fmt: skip
        energies, grad = score(x)
        x = update(x, grad, step_size=step_size, noise_std=noise_std)
        return Step(k, x, energies, grad)

    def check_finite(self, x: Tensor, energies: Tensor | None) -> None:
        """FloatingPointError if a chain is not finite at its end, or its last energy NaN."""
        chains = torch.isfinite(x.flatten(1) if x.ndim > 1 else x[:, None]).all(1)
        if energies is not None and energies.numel():
            chains &= ~torch.isnan(energies)
        if not bool(chains.all()):
            lost = int((~chains).sum())
            raise FloatingPointError(
                f"LangevinSampler: {lost} of {x.shape[0]} chains are not finite after "
                f"{self.sampler.steps} steps, or their energy is NaN; diagnose() shows at which "
                "step it began, and a smaller step_size, clamp or grad_clip may help"
            )


class _Overflow:
    """The first step whose gradient is not finite: a clamp would hide that from the end state."""

    def __init__(self, device: torch.device) -> None:
        self.first = torch.full((), 2**32, device=device, dtype=torch.int64)

    def look_at(self, step: Step) -> None:
        lost = ~torch.isfinite(step.grad).all()
        self.first = torch.where(lost, self.first.clamp(max=step.k), self.first)

    def check(self) -> None:
        first = int(self.first)
        if first < 2**32:
            raise FloatingPointError(
                f'LangevinSampler: with precision="fp16" the gradient at step {first} is not '
                "finite: float16 ends at 65504. bf16 and tf32 reach as far as float32"
            )
