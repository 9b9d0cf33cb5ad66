"""Take a sampler's steps from another loop's states, and bound what rounding may change in each."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.arguments import at_step
from fastlangevin.chain.chain import Chain
from fastlangevin.gradients.modules import network_dtype
from fastlangevin.kernels.reference import over_chains
from fastlangevin.step import fold_norm_clip, langevin_step_
from fastlangevin.testing.loop import BufferCopies, distance, replay, state


class Judgement(NamedTuple):
    """Entry 0 is about the first state, entry k about step k."""

    states: list[Tensor]  # where the sampler's step from the loop's state ends
    differences: list[float]  # between this and the loop's next state
    tolerances: list[float]  # what rounding may make of this difference
    apart: list[float]  # difference of a whole run of the sampler from the loop


class StepByStep:
    """The chains of a sampler's call, step by step, from one gradient's state to the next one's.

    runs: (x, initial state, chain) of every chain that the call ran.
    """

    def __init__(self, runs: list[tuple[Tensor, Tensor, Chain]], x0: Tensor, steps: int) -> None:
        runs = [run for run in runs if run[1].shape == x0.shape and run[1].dtype == x0.dtype]
        every_step = [(run, k) for run in runs for k in range(run[2].settings.steps)]
        self.chain_steps, self.steps = every_step[:steps], steps
        self.buffers: Sequence[BufferCopies] = ()  # the loop's, once :meth:`judge` knows them

    def ends_in(self, ours: Tensor) -> bool:
        """Whether the call returned the last step's state unchanged."""
        end = self.chain_steps[-1][0][0]
        return torch.equal(end.to(ours), ours)

    def judge(
        self, theirs: list[Tensor], ours: Tensor, buffers: Sequence[BufferCopies]
    ) -> Judgement:
        """Compare the sampler's steps, and its result, with the loop's K + 1 states.

        The steps start with ``buffers``, those of the modules before each gradient of the loop.
        """
        self.buffers = buffers
        eps = torch.finfo(ours.dtype).eps
        begin = self._begin()
        bound = 4 * eps * torch.maximum(_largest(begin), _largest(theirs[0]))
        difference, tolerance = _worst(begin, theirs[0], bound)
        apart = distance(theirs[0], begin)
        judgement = Judgement([begin], [difference], [tolerance], [apart])
        free = begin
        for j, (before, after) in enumerate(itertools.pairwise(theirs)):
            end, bound = self._step(j, before)
            difference, tolerance = _worst(end, after, bound)
            if not difference <= tolerance:
                difference, tolerance = _worst(
                    end, after, bound + self._rounding_growth(j, before, end)
                )
            free = self._step(j, free)[0] if j + 1 < self.steps else ours
            judgement.states.append(end)
            judgement.differences.append(difference)
            judgement.tolerances.append(tolerance)
            judgement.apart.append(distance(after, free))
        return judgement

    def _begin(self) -> Tensor:
        (_, start, chain), _ = self.chain_steps[0]
        return _noise_before(start.clone(), chain, 0)

    def _step(self, j: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """From a state at gradient j: (state at gradient j + 1, bound on each chain's rounding)."""
        (run, k) = self.chain_steps[j]
        chain, settings = run[2], run[2].settings
        a, b = (at_step(value, k) for value in (settings.step_size, settings.noise_std))
        one_step = settings._replace(steps=1, step_size=a, noise_std=b)
        if settings.noise_order == "before":  # x already has the step's noise
            one_step = one_step._replace(noise_order="after", noise_std=0.0)
        one_step_chain = chain._replace(
            settings=one_step,
            first_step=chain.first_step + k,
            noise=None if chain.noise is None else chain.noise[k : k + 1],
            step_kwargs={name: value[k : k + 1] for name, value in chain.step_kwargs.items()},
        )
        end, grad = x.clone(), None
        replay(self.buffers[j])
        for step in one_step_chain.steps(end):
            grad = step.grad
        eps = torch.finfo(x.dtype).eps
        bound = 4 * eps * torch.maximum(_largest(x), _largest(end))
        if grad is None:
            bound = bound + 32 * eps * _largest(end - x)
        else:
            a, _ = fold_norm_clip(grad, a, settings.grad_clip)
            a = a.to(grad.device) if isinstance(a, Tensor) else a
            bound = bound + 32 * _network_eps(chain, x) * a * _largest(grad.to(x.dtype))
        if j + 1 < len(self.chain_steps):
            (_, _, chain), k = self.chain_steps[j + 1]
            end = _noise_before(end, chain, k)
        return end, bound

    def _rounding_growth(self, j: int, x: Tensor, end: Tensor) -> Tensor:
        """Bound [n] on how a step amplifies rounding of x.

        Four times the most by which a step from an x 4 eps away ends further away than that.
        """
        size = 4 * _network_eps(self.chain_steps[j][0][2], x) * _largest(x)
        growth = [
            _largest(self._step(j, x + over_chains(size, x) * _random_signs(x, trial))[0] - end)
            - size
            for trial in range(4)
        ]
        return 4 * torch.stack(growth).amax(0).clamp(min=0)


def _noise_before(x: Tensor, chain: Chain, k: int) -> Tensor:
    """Add, in place, the noise that noise_order "before" adds ahead of the gradient."""
    settings = chain.settings
    if settings.noise_order != "before":
        return x
    return langevin_step_(
        x, None, step_size=0.0, noise_std=at_step(settings.noise_std, k), seed=chain.seed,
        step=chain.first_step + k, first_chain=chain.first_chain, clamp=settings.clamp,
        noise=None if chain.noise is None else chain.noise[k],
    )  # fmt: skip


def _network_eps(chain: Chain, x: Tensor) -> float:
    """The largest eps of the state's, the network's and the precision's dtypes."""
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(chain.settings.precision or "")
    dtypes = [x.dtype, network_dtype(chain.energy, x.dtype)] + [half] * (half is not None)
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype is not None)


def final_rounding(run: Callable[[Tensor], Any], x0: Tensor, ours: Tensor, steps: int) -> float:
    """Bound on the final states' rounding: that of every step, and the growth of that of x0."""
    eps = torch.finfo(x0.dtype).eps
    size = 4 * eps * _largest(x0)
    growth = [
        distance(state(run(x0 + over_chains(size, x0) * _random_signs(x0, trial)), x0.shape), ours)
        for trial in range(2)
    ]
    scale = max(float(_largest(x).nan_to_num().max()) for x in (x0, ours))
    return 4 * (steps * eps * scale + max(growth))


def _worst(a: Tensor, b: Tensor, bound: Tensor) -> tuple[float, float]:
    """(difference, bound) of the chain whose difference is the largest multiple of its bound."""
    elements = (a.to(b.device, torch.float64) - b.to(torch.float64)).abs()
    differences = _largest(elements.nan_to_num(nan=torch.inf))
    bound = bound.to(differences).expand_as(differences)
    i = int((differences / bound.clamp(min=1e-300)).argmax())
    return float(differences[i]), float(bound[i])


def _largest(x: Tensor) -> Tensor:
    """The largest absolute value of each chain [n]."""
    return x.detach().abs().reshape(len(x), -1).amax(1)


def _random_signs(x: Tensor, trial: int) -> Tensor:
    u = _noise.uniform(x.shape, seed=trial, step=0, device=x.device, dtype=x.dtype)
    return 2 * (u < 0.5) - 1
