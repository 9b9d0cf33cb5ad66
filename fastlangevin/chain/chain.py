"""One call's chain: its values, and the loop over its steps."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin import noise as _noise
from fastlangevin.arguments import Coefficient, at_step
from fastlangevin.chain.settings import Settings
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.engine import Engine
from fastlangevin.gradients.engine_cache import EngineCache
from fastlangevin.gradients.fused_gpu import FusedGradient
from fastlangevin.gradients.score_network import network_score
from fastlangevin.gradients.select import (
    EngineChoice,
    choose_engine,
)
from fastlangevin.gradients.train_mode import warn_of_train_mode
from fastlangevin.gradients.untouched import Isolation
from fastlangevin.kernels import reference
from fastlangevin.kernels.memory import in_memory
from fastlangevin.step import apply_step_, bind_step, resolve_backend

if TYPE_CHECKING:
    from typing_extensions import Self


# Where someone watches (fl.testing.compare): of each call here the state that it walks on, as it
# was at its start, and the chain.
_watched: ContextVar[list[tuple[Tensor, Tensor, "Chain"]] | None] = ContextVar(
    "watched", default=None
)


@contextlib.contextmanager
def watching() -> Iterator[list[tuple[Tensor, Tensor, "Chain"]]]:
    """Yield a list to which every sampler's call in here adds (x, x at the start, its chain)."""
    runs: list[tuple[Tensor, Tensor, Chain]] = []
    token = _watched.set(runs)
    try:
        yield runs
    finally:
        _watched.reset(token)


def note(x: Tensor, chain: "Chain") -> None:
    runs = _watched.get()
    if runs is not None:
        runs.append((x, x.clone(), chain))


Evaluated = tuple[Tensor | None, Tensor]  # energies [n] if known, and the gradient


class Step(NamedTuple):
    """One step's results: its index, the state after it, energies [n] and gradient before it.

    Energies are None if not requested and not computed anyway, and along a score network; the
    gradient is None where it never reached memory.
    """

    k: int
    x: Tensor
    energies: Tensor | None
    grad: Tensor | None
    accepted: Tensor | None = None  # bool [n], of chains that may reject a step


class Chain(NamedTuple):
    """One call's values: what a sampler was set to and what its call was given, all checked."""

    energy: Callable[..., Any]
    settings: Settings
    recognised: EngineCache  # what is remembered of the energy from earlier calls
    seed: int
    first_chain: int
    first_step: int
    noise: Tensor | None
    model_kwargs: dict[str, Any]
    step_kwargs: Mapping[str, Any] = {}  # by name, what has an entry for every step
    # int64 [2] on the device, read there in place of the seed and added to every step's number.
    rng_state: Tensor | None = None
    # Of the energy's own code, wherever that runs; shared by all steps of a call.
    isolation: Isolation | None = None

    def walk(
        self, x: Tensor, want_energies: bool = False, choice: EngineChoice | None = None
    ) -> Iterator[Step]:
        """The chain, in place on x: yields after every step. An empty batch takes none.

        Energies come with the last step, and with all others where they are wanted.
        choice: the result of :meth:`choose` for this x, if it is known.
        """
        if x.shape[0] == 0:
            return
        settings = self.settings
        engine = (choice or self.choose(x)).engine
        half = Overflow(x.device) if settings.precision == "fp16" else None
        if engine is not None:
            engine.begin()
        yield from self.stride(engine, x, half, want_energies)
        check_overflow(engine, half)

    def stride(
        self, engine: Engine | None, x: Tensor, half: "Overflow | None", want_energies: bool = False
    ) -> Iterator[Step]:
        """The steps of :meth:`walk` alone, along an engine that has begun: launches, and no reading
        of what they find."""
        run = resolve_backend(self.settings.backend, x.device)
        if engine is None:
            chain = self.isolated(x.device)
            strides = self._strides(run, x, lambda k: chain.evaluate(x, k))
        elif isinstance(engine, FusedGradient) and not want_energies and self._fuses():
            strides, half = self._fused_strides(engine, x), None
        else:
            last = self.settings.steps - 1
            strides = self._strides(run, x, lambda k: engine(x, want_energies or k == last))
        for step in strides:
            if half is not None:
                half.look_at(step)
            yield step

    def _strides(
        self, run: Callable[..., Tensor], x: Tensor, evaluate: Callable[[int], Evaluated]
    ) -> Iterator[Step]:
        """Steps along what ``evaluate`` finds at x, as a function of the step's index."""
        settings, update = self.settings, self._bound(run, x)
        for k in range(settings.steps):
            with torch.no_grad():
                step_size, noise_std = (
                    at_step(settings.step_size, k),
                    at_step(settings.noise_std, k),
                )
                if settings.noise_order == "before":
                    update(None, 0.0, noise_std, k)
                    noise_std = 0.0
                energies, grad = evaluate(k)
                update(grad, step_size, noise_std, k)
            yield Step(k, x, energies, grad)

    def _bound(
        self, run: Callable[..., Tensor], x: Tensor
    ) -> Callable[[Tensor | None, Coefficient, Coefficient, int], Tensor]:
        """The update of x, in place, as a function of (grad, step_size, noise_std, k)."""
        options = self._options()
        noise, first = self.noise, self.first_step
        if noise is None and self.rng_state is None:
            bound = bind_step(run, x, **options)
            return lambda grad, a, b, k: bound(grad, a, b, first + k)
        return lambda grad, a, b, k: apply_step_(
            run, x, grad, None if noise is None else noise[k], step_size=a, noise_std=b,
            step=first + k, **options,
        )  # fmt: skip

    def _fuses(self) -> bool:
        """Whether the Triton step may be the update, and comes after the gradient."""
        return self.settings.noise_order != "before" and self.settings.backend in ("auto", "triton")

    def _fused_strides(self, engine: FusedGradient, x: Tensor) -> Iterator[Step]:
        """Steps whose gradient never reaches memory."""
        settings, options = self.settings, self._options()
        for k in range(settings.steps):
            energies = engine.step_(
                x,
                None if self.noise is None else self.noise[k],
                step_size=at_step(settings.step_size, k),
                noise_std=at_step(settings.noise_std, k),
                step=self.first_step + k,
                want_energies=k == settings.steps - 1,
                **options,
            )
            yield Step(k, x, energies, None)

    def _options(self) -> dict[str, Any]:
        """What is the same at every step."""
        settings = self.settings
        in_memory = {} if self.rng_state is None else {"rng_state": self.rng_state}
        return in_memory | {
            "seed": self.seed,
            "first_chain": self.first_chain,
            "clamp": settings.clamp,
            "grad_clip": settings.grad_clip,
            "maximize": settings.maximize,
            "noise_last": settings.noise_order == "last",
        }

    def transition(
        self,
        run: Callable[..., Tensor],
        x: Tensor,
        k: int,
        evaluate: Callable[[Tensor], Evaluated] | None = None,
        create_graph: bool = False,
    ) -> Step:
        """Step k by ``run``: in place on x for a backend, pure for ``reference.step``.

        evaluate: x -> (energies or None, gradient); by default autograd's.
        """
        settings = self.settings
        step_size, noise_std = at_step(settings.step_size, k), at_step(settings.noise_std, k)
        options = {"step": self.first_step + k} | self._options()
        z = None if self.noise is None else self.noise[k]
        if z is None and run is reference.step and not reference.is_zero(noise_std):
            # The kernels' normals, as in a chain without gradients: they are faster to draw.
            z = _noise.normal(
                x.shape, seed=self.seed, step=self.first_step + k, first_chain=self.first_chain,
                device=x.device, dtype=x.dtype,
            )  # fmt: skip
        if settings.noise_order == "before":
            x = apply_step_(run, x, None, z, step_size=0.0, noise_std=noise_std, **options)
            noise_std = 0.0
        if evaluate is None:
            evaluate = functools.partial(self.evaluate, k=k, create_graph=create_graph)
        energies, grad = evaluate(x)
        x = apply_step_(run, x, grad, z, step_size=step_size, noise_std=noise_std, **options)
        return Step(k, x, energies, grad)

    def evaluate(self, x: Tensor, k: int, create_graph: bool = False) -> Evaluated:
        """(energies or None, gradient) at step k by the energy's, or score network's, own code."""
        settings = self.settings
        run = network_score if settings.gradient == "network" else energy_and_grad
        kwargs = self.model_kwargs
        if self.step_kwargs:
            kwargs = kwargs | {name: entries[k] for name, entries in self.step_kwargs.items()}
        isolation = self.isolation or Isolation(self.energy, x.device, self.seed)
        with isolation.step(self.first_step + k):
            return run(isolation.network, x, kwargs, settings.precision, create_graph)

    def isolated(self, device: torch.device, twice: bool = False) -> "Self":
        """The chain with what its evaluations have in common made once; ``twice``: for steps that
        are differentiated twice."""
        isolation = Isolation(self.energy, device, self.seed, twice)
        return self._replace(isolation=isolation)

    def choose(self, x: Tensor) -> EngineChoice:
        """The engine of this chain from x, which may run the energy once.

        Raises RuntimeError where one asked for by name cannot run.
        """
        if not self.recognised.warned:
            self.recognised.warned = warn_of_train_mode(self.energy)
        return choose_engine(
            self.settings.gradient, self.energy, x, self.settings.precision, self.model_kwargs,
            self.recognised, self.step_kwargs,
        )  # fmt: skip

    def all_kwargs(self) -> dict[str, Any]:
        """What the energy is given beside x, that of all steps at once."""
        return {**self.model_kwargs, **self.step_kwargs}

    def check_finite(self, x: Tensor, energies: Tensor | None) -> None:
        """FloatingPointError if a chain is not finite at its end, or its last energy NaN."""
        if not in_memory(x):
            return  # shapes alone, or a transform's tensors, which Python cannot branch on
        chains = torch.isfinite(rows(x)).all(1)
        if energies is not None and energies.numel():
            chains &= ~torch.isnan(energies)
        if not bool(chains.all()):
            lost = int((~chains).sum())
            raise FloatingPointError(
                f"LangevinSampler: {lost} of {x.shape[0]} chains are not finite after "
                f"{self.settings.steps} steps, or their energy is NaN; diagnose() shows at which "
                "step it began, and a smaller step_size, clamp or grad_clip may help"
            )


_OVERFLOW = (
    "the gradient is not finite: float16 ends at 65504. bf16 and tf32 reach as far as float32"
)


class Overflow:
    """The first step whose gradient is not finite: a clamp would hide that from the end state."""

    def __init__(self, device: torch.device) -> None:
        self.first = torch.full((), 2**32, device=device, dtype=torch.int64)

    def begin(self) -> None:
        self.first.fill_(2**32)

    def look_at(self, step: Step) -> None:
        assert step.grad is not None
        lost = ~torch.isfinite(step.grad).all()
        torch.where(lost, self.first.clamp(max=step.k), self.first, out=self.first)

    def check(self) -> None:
        first = int(self.first)
        if first < 2**32:
            raise FloatingPointError(
                f'LangevinSampler: with precision="fp16" at step {first} {_OVERFLOW}'
            )


def check_overflow(engine: Engine | None, half: Overflow | None) -> None:
    """FloatingPointError if float16 has been left in a chain that has ended."""
    if half is not None:
        half.check()
    if isinstance(engine, FusedGradient) and engine.overflow is not None and bool(engine.overflow):
        raise FloatingPointError(
            f'LangevinSampler: with precision="fp16" {_OVERFLOW}; diagnose() shows where'
        )


def rows(x: Tensor) -> Tensor:
    """States [n, ...] as [n, elements]."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def norms(x: Tensor) -> Tensor:
    """The L2 norm of every state: [n, ...] -> [n]."""
    return torch.linalg.vector_norm(rows(x), dim=1)
