"""A sampler's steps from the states of another loop, and what rounding may make of each."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin import noise as _noise
from fastlangevin.arguments import at_step
from fastlangevin.chain.chain import Chain
from fastlangevin.gradients.network import network_dtype
from fastlangevin.step import fold_norm_clip, langevin_step_
from fastlangevin.testing.loop import Buffers, distance, replay, state


class Found(NamedTuple):
    states: list[Tensor]  # where the sampler comes from the loop's states
    differences: list[float]
    tolerances: list[float]
    apart: list[float]


class Walk:
    """The chains of a call, step by step, from where a gradient is taken to where the next is."""

    def __init__(self, runs: list[tuple[Tensor, Tensor, Chain]], x0: Tensor, steps: int) -> None:
        runs = [run for run in runs if run[1].shape == x0.shape and run[1].dtype == x0.dtype]
        places = [(run, k) for run in runs for k in range(run[2].settings.steps)]
        self.places, self.steps = places[:steps], steps

    def ends_in(self, ours: Tensor) -> bool:
        """Whether the last step's state is the answer, with nothing done to it after."""
        end = self.places[-1][0][0]
        return torch.equal(end.to(ours), ours)

    def judge(self, theirs: list[Tensor], ours: Tensor, buffers: Sequence[Buffers]) -> Found:
        """theirs: the loop's states at its gradients and its end, K + 1.

        buffers: the modules' before each of its gradients, from which the step begins here too.
        """
        self.buffers = buffers
        eps = torch.finfo(ours.dtype).eps
        begin = self._begin()
        bound = 4 * eps * torch.maximum(_largest(begin), _largest(theirs[0]))
        difference, tolerance = _worst(begin, theirs[0], bound)
        apart = distance(theirs[0], begin)
        found = Found([begin], [difference], [tolerance], [apart])
        free = begin
        for j, (here, there) in enumerate(itertools.pairwise(theirs)):
            end, bound = self._step(j, here)
            difference, tolerance = _worst(end, there, bound)
            if not difference <= tolerance:
                difference, tolerance = _worst(end, there, bound + self._response(j, here, end))
            free = self._step(j, free)[0] if j + 1 < self.steps else ours
            found.states.append(end)
            found.differences.append(difference)
            found.tolerances.append(tolerance)
            found.apart.append(distance(there, free))
        return found

    def _begin(self) -> Tensor:
        (_, start, chain), _ = self.places[0]
        return _noise_before(start.clone(), chain, 0)

    def _step(self, j: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """(the state at gradient j + 1, what rounding may make of each chain) from one at j."""
        (run, k) = self.places[j]
        chain, settings = run[2], run[2].settings
        a, b = (at_step(value, k) for value in (settings.step_size, settings.noise_std))
        one_step = settings._replace(steps=1, step_size=a, noise_std=b)
        if settings.noise_order == "before":  # x has that noise
            one_step = one_step._replace(noise_order="after", noise_std=0.0)
        one = chain._replace(
            settings=one_step,
            first_step=chain.first_step + k,
            noise=None if chain.noise is None else chain.noise[k : k + 1],
            step_kwargs={name: value[k : k + 1] for name, value in chain.step_kwargs.items()},
        )
        end, grad = x.clone(), None
        replay(self.buffers[j])
        for step in one.walk(end):
            grad = step.grad
        eps = torch.finfo(x.dtype).eps
        bound = 4 * eps * torch.maximum(_largest(x), _largest(end))
        if grad is None:
            bound = bound + 32 * eps * _largest(end - x)
        else:
            a, _ = fold_norm_clip(grad, a, settings.grad_clip)
            a = a.to(grad.device) if isinstance(a, Tensor) else a
            bound = bound + 32 * _network_eps(chain, x) * a * _largest(grad.to(x.dtype))
        if j + 1 < len(self.places):
            (_, _, chain), k = self.places[j + 1]
            end = _noise_before(end, chain, k)
        return end, bound

    def _response(self, j: int, x: Tensor, end: Tensor) -> Tensor:
        """Four times what a step makes of an x a few eps away, beyond that distance itself [n]."""
        size = 4 * _network_eps(self.places[j][0][2], x) * _largest(x)
        found = [
            _largest(self._step(j, x + _like(size, x) * _signs(x, trial))[0] - end) - size
            for trial in range(4)
        ]
        return 4 * torch.stack(found).amax(0).clamp(min=0)


def _noise_before(x: Tensor, chain: Chain, k: int) -> Tensor:
    """In place, what noise_order "before" does ahead of the gradient."""
    settings = chain.settings
    if settings.noise_order != "before":
        return x
    return langevin_step_(
        x, None, step_size=0.0, noise_std=at_step(settings.noise_std, k), seed=chain.seed,
        step=chain.first_step + k, first_chain=chain.first_chain, clamp=settings.clamp,
        noise=None if chain.noise is None else chain.noise[k],
    )  # fmt: skip


def _network_eps(chain: Chain, x: Tensor) -> float:
    """The coarsest of the state's dtype and the network's."""
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(chain.settings.precision or "")
    dtypes = [x.dtype, network_dtype(chain.energy, x.dtype)] + [half] * (half is not None)
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype is not None)


def spread(run: Callable[[Tensor], Any], x0: Tensor, ours: Tensor, steps: int) -> float:
    """What rounding may make of the ends: each step's of the state, and what x0's grows to."""
    eps = torch.finfo(x0.dtype).eps
    size = 4 * eps * _largest(x0)
    moved = [
        distance(state(run(x0 + _like(size, x0) * _signs(x0, trial)), x0.shape), ours)
        for trial in range(2)
    ]
    scale = max(float(_largest(x).nan_to_num().max()) for x in (x0, ours))
    return 4 * (steps * eps * scale + max(moved))


def _worst(a: Tensor, b: Tensor, bound: Tensor) -> tuple[float, float]:
    """(difference, bound) of the chain that goes furthest beyond its bound [n]."""
    found = (a.to(b.device, torch.float64) - b.to(torch.float64)).abs()
    found = _largest(found.nan_to_num(nan=torch.inf))
    bound = bound.to(found).expand_as(found)
    i = int((found / bound.clamp(min=1e-300)).argmax())
    return float(found[i]), float(bound[i])


def _largest(x: Tensor) -> Tensor:
    """Of each chain, [n]."""
    return x.detach().abs().reshape(len(x), -1).amax(1)


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))


def _signs(x: Tensor, trial: int) -> Tensor:
    u = _noise.uniform(x.shape, seed=trial, step=0, device=x.device, dtype=x.dtype)
    return 2 * (u < 0.5) - 1
