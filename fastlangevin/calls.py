"""The calls of a sampler: the checks of their arguments, and the loop that calls back."""

import copy
import functools
import math
from collections.abc import Callable, Mapping, Set
from contextlib import nullcontext
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.arguments import check_chains, check_count, check_sizes, check_step_kwargs
from fastlangevin.chain.chain import Chain, note_call
from fastlangevin.chain.metropolis import AdjustedChain
from fastlangevin.chain.settings import Settings
from fastlangevin.coarse import enlarged_samples
from fastlangevin.diagnostics import Diagnostics
from fastlangevin.gradients.engine_cache import EngineCache
from fastlangevin.gradients.modules import device_of
from fastlangevin.gradients.packing import PackedEnergy, packing_of
from fastlangevin.gradients.precision import check_precision
from fastlangevin.gradients.select import EngineChoice
from fastlangevin.inputs import (
    check_model_kwargs,
    check_noise,
    check_tensors,
    choose_seed,
    read_state,
)
from fastlangevin.progress import step_bar
from fastlangevin.step import choose_backend

_OP = "LangevinSampler"
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Call(NamedTuple):
    """A call whose arguments have been checked."""

    x: Tensor  # the starting state
    is_copy: bool  # whether x is a copy of x0 and not x0 itself
    chain: Chain

    def begin(self) -> tuple[Tensor, EngineChoice | None]:
        """Chooses the engine, then copies x0 (in this order to save memory). Returns both."""
        choice = self.chain.choose(self.x) if len(self.x) else None
        x = self.own_state()
        note_call(x, self.chain)
        return x, choice

    def own_state(self) -> Tensor:
        """The starting state in memory that the caller does not see."""
        return self.x if self.is_copy else self.x.clone()


def read_call(
    energy: Callable[..., Any],
    settings: Settings,
    cache: EngineCache,
    reserved: Set[str],
    start: Callable[..., Tensor] | None,
    x0: Tensor | None,
    /,
    *,
    n: int | None = None,
    shape: Any = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    first_chain: int = 0,
    first_step: int = 0,
    noise: Tensor | None = None,
    step_kwargs: Mapping[str, Any] | None = None,
    **model_kwargs: Any,
) -> Call:
    """Checks the arguments of a call before any work.

    ``reserved`` are the names of the arguments of calls, which no argument of the energy should
    have, and ``start`` is the sampler whose samples chains start from.
    """
    by_step = check_step_kwargs(_OP, step_kwargs, settings.steps, model_kwargs)
    if by_step and settings.metropolis:
        raise ValueError(
            f"{_OP}: step_kwargs are not supported with metropolis=True, which compares the "
            "energies of two steps and needs one function for both"
        )
    check_model_kwargs(_OP, energy, model_kwargs | by_step, reserved, Settings._fields)
    for kwargs in (model_kwargs, by_step):
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.is_inference():
                kwargs[name] = value.clone()  # autograd cannot save inference tensors
    if (x0 is None) == (n is None):
        raise ValueError(f"{_OP}: give either x0 or n")
    if x0 is not None and shape is not None:
        raise ValueError(f"{_OP}: shape belongs to chains that n starts; x0 has its own")
    seed = choose_seed(_OP, seed, generator)
    if x0 is None:
        x, is_copy = starts(energy, start, n, shape, seed, first_chain), True
    else:
        x, is_copy = read_state(_OP, x0, energy)
    check_chains(_OP, "step_size", settings.step_size, x.shape[0])
    check_chains(_OP, "noise_std", settings.noise_std, x.shape[0])
    check_noise(_OP, noise, (settings.steps, *x.shape), x.device)
    check_precision(settings.precision, x.device)
    choose_backend(settings.backend, x.device)
    first_chain, first_step = _noise.check_address(
        first_chain, x.shape[0], first_step, settings.steps
    )
    chain = chain_type(settings)(
        energy, settings, cache, model_kwargs, seed, first_chain, first_step, noise, by_step
    )
    return Call(x, is_copy, chain)


def chain_type(settings: Settings) -> type[Chain]:
    return AdjustedChain if settings.metropolis else Chain


def starts(
    energy: Callable[..., Any],
    start: Callable[..., Tensor] | None,
    n: Any,
    shape: Any,
    seed: int,
    first_chain: int,
) -> Tensor:
    """n states from U(-1, 1), drawn from the seed's stream of initial states, or from ``start``."""
    shape = getattr(energy, "shape", None) if shape is None else check_sizes(_OP, "shape", shape)
    if shape is None:
        raise ValueError(
            f"{_OP}: n needs shape, one chain's, such as shape=(3, 32, 32): the energy has no "
            "attribute of that name; or give x0"
        )
    n = 0 if n == 0 else check_count(_OP, "n", n)
    device = device_of(energy)
    if device is not None:
        check_tensors(_OP, energy, device)
    if start is not None:
        return enlarged_samples(_OP, start, shape, n, seed, first_chain, device)
    return _noise.initial((n, *shape), seed=seed, first_chain=first_chain, device=device)


def run_steps(
    chain: Chain,
    x: Tensor,
    choice: EngineChoice | None,
    callback: Callable[[int, Tensor], Any] | None,
    every: int,
    progress: bool,
) -> Tensor | None:
    """Runs the chain in place on x, with a callback and a bar, and returns the last energies."""
    energies, steps = None, chain.settings.steps
    stride = every
    if progress:  # a bar does not need more than a hundred updates
        stride = max(1, steps // 100)
        stride = stride if callback is None else math.gcd(every, stride)
    with step_bar(steps) if progress else nullcontext(None) as show:
        for step in chain.steps(x, choice=choice, every=stride):
            energies, done = step.energies, step.k + 1
            if show is not None:
                show(done)
            if callback is not None and (done % every == 0 or done == steps):
                callback(done, x)
    return energies


def entry(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes a method of a sampler work in torch.inference_mode and on states of several tensors.

    Inference mode has no gradients, so that it is left during the call.
    """

    @functools.wraps(method)
    def enter(sampler: Any, x0: Any = None, **options: Any) -> Any:
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            return _packed(method, sampler, x0, options)

    return cast("Callable[_P, _R]", enter)


def _packed(method: Callable[..., Any], sampler: Any, x0: Any, options: dict[str, Any]) -> Any:
    """Calls the method with a state of several tensors packed into one."""
    shape = options.get("shape")
    packing = packing_of(x0, getattr(sampler.energy, "shape", None) if shape is None else shape)
    if packing is None:
        return method(sampler, x0, **options)
    flat = copy.copy(sampler)
    flat.energy = PackedEnergy(sampler.energy, packing, is_score=sampler.gradient == "network")
    n: Any = options.get("n")
    if x0 is None:
        options.pop("shape", None)  # the packed energy has it
    if x0 is not None:
        n = len(x0[packing.keys[0]])
        x0 = packing.pack("x0", x0, (n,))
    if options.get("noise") is not None:
        options["noise"] = packing.pack("noise", options["noise"], (sampler.steps, n))
    callback = options.get("callback")
    if callable(callback):
        options["callback"] = lambda step, x: callback(step, packing.unpack(x))
    result = method(flat, x0, **options)
    if isinstance(result, Diagnostics):
        return result._replace(x=packing.unpack(result.x))
    return packing.unpack(result) if isinstance(result, Tensor) else result
