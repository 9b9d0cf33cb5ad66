"""The chain of one call: its values, and the loop over its steps."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.arguments import Coefficient, at_step
from fastlangevin.chain.settings import Settings
from fastlangevin.gradients.autograd import EnergyGradient
from fastlangevin.gradients.engine import Engine
from fastlangevin.gradients.engine_cache import EnergyCall, EngineCache
from fastlangevin.gradients.fused_cpu import ConvNetGradient
from fastlangevin.gradients.fused_gpu import FusedGradient
from fastlangevin.gradients.score_network import network_score
from fastlangevin.gradients.select import EngineChoice, choose_engine
from fastlangevin.gradients.train_mode import warn_of_train_mode
from fastlangevin.gradients.untouched import Isolation
from fastlangevin.kernels import native, reference
from fastlangevin.kernels.memory import all_in_memory, in_memory
from fastlangevin.kernels.native import Update
from fastlangevin.step import apply_step_, bind_step, resolve_backend

if TYPE_CHECKING:
    from typing_extensions import Self


# While watching() is active, each call appends (x, a copy of x at its start, the chain) to this
# list, for fl.testing.compare.
_watched: ContextVar[list[tuple[Tensor, Tensor, "Chain"]] | None] = ContextVar(
    "watched", default=None
)


@contextlib.contextmanager
def watching() -> Iterator[list[tuple[Tensor, Tensor, "Chain"]]]:
    """Yields a list to which each sampler call in the context adds (x, a copy of x0, its chain)."""
    runs: list[tuple[Tensor, Tensor, Chain]] = []
    token = _watched.set(runs)
    try:
        yield runs
    finally:
        _watched.reset(token)


def note_call(x: Tensor, chain: "Chain") -> None:
    """Adds a call that begins to the list of :func:`watching`, if there is one."""
    runs = _watched.get()
    if runs is not None:
        runs.append((x, x.clone(), chain))


Evaluated = tuple[Tensor | None, Tensor]  # energies [n] if known, and the gradient


class Step(NamedTuple):
    """The results of one step: its index, the state after it, energies [n] and gradient before it.

    Energies are None for a score network, and if they were neither requested nor needed. The
    gradient is None if a kernel used it without storing it.
    """

    k: int
    x: Tensor
    energies: Tensor | None
    grad: Tensor | None
    accepted: Tensor | None = None  # bool [n], for chains that can reject a step


class Chain(NamedTuple):
    """The checked values of one call: the sampler's settings and the call's arguments."""

    energy: Callable[..., Any]
    settings: Settings
    cache: EngineCache  # of the energy, from earlier calls
    model_kwargs: dict[str, Any]
    seed: int = 0
    first_chain: int = 0
    first_step: int = 0
    noise: Tensor | None = None
    step_kwargs: Mapping[str, Any] = {}  # by name, values with one entry per step
    # int64 [2] on the device: a seed to use instead, and a number to add to every step's number.
    rng_state: Tensor | None = None
    # These guard and differentiate the energy's own code; all steps of a call share them.
    isolation: Isolation | None = None
    energy_gradient: EnergyGradient | None = None  # None also for a score network

    def steps(
        self,
        x: Tensor,
        want_energies: bool = False,
        choice: EngineChoice | None = None,
        every: int = 1,
    ) -> Iterator[Step]:
        """Runs the chain in place on x and yields after every step; an empty batch has no steps.

        The last step comes with energies, and every step does with ``want_energies``. ``choice`` is
        the result of :meth:`choose` for this x, if it is known. If ``every`` is more than 1, the
        caller needs only each step k for which ``every`` divides k + 1, and the last one, without
        their gradients; an engine that takes many steps at once then yields only these.
        """
        if x.shape[0] == 0:
            return
        settings = self.settings
        engine = (choice or self.choose(x)).engine
        overflow = Overflow(settings.steps) if settings.precision == "fp16" else None
        if engine is not None:
            engine.begin()
        yield from self.steps_with(engine, x, overflow, want_energies, every)
        check_overflow(engine, overflow)

    def steps_with(
        self,
        engine: Engine | None,
        x: Tensor,
        overflow: "Overflow | None",
        want_energies: bool = False,
        every: int = 1,
    ) -> Iterator[Step]:
        """The steps of :meth:`steps` with an engine that has begun.

        They only launch work and never wait for its results.
        """
        settings = self.settings
        run = resolve_backend(settings.backend, x.device)
        last_step = settings.steps - 1
        # Whether a kernel may compute the gradient and then step.
        fuses = settings.noise_order != "before" and settings.backend in ("auto", "triton")
        if engine is None:
            chain = self.isolated(x.device)
            steps = self._single_steps(
                run,
                x,
                lambda k: chain.evaluate(x, k, want_energies=want_energies or k == last_step),
            )
        elif isinstance(engine, FusedGradient) and not want_energies and fuses:
            steps, overflow = self._fused_steps(engine, x), None
        elif every > 1 and isinstance(engine, ConvNetGradient) and self._can_block(engine, run, x):
            steps = self._block_steps(engine, x, every)
        else:
            steps = self._single_steps(run, x, lambda k: engine(x, want_energies or k == last_step))
        for step in steps:
            if overflow is not None:
                overflow.look_at(step)
            yield step

    def _single_steps(
        self, run: Callable[..., Tensor], x: Tensor, evaluate: Callable[[int], Evaluated]
    ) -> Iterator[Step]:
        """Steps along the gradient at x that ``evaluate`` returns for a step's index."""
        update, no_grad = self._bound(run, x), torch.no_grad()
        for k in range(self.settings.steps):
            with no_grad:
                for along_gradient, step_size, noise_std, step in self._updates(k):
                    energies, grad = evaluate(k) if along_gradient else (None, None)
                    update(grad, step_size, noise_std, step)
            yield Step(k, x, energies, grad)

    def _updates(self, k: int) -> list[Update]:
        """The updates of the states that are step k; the last one is along the gradient."""
        settings, step = self.settings, self.first_step + k
        step_size, noise_std = at_step(settings.step_size, k), at_step(settings.noise_std, k)
        if settings.noise_order == "before":
            return [Update(False, 0.0, noise_std, step), Update(True, step_size, 0.0, step)]
        return [Update(True, step_size, noise_std, step)]

    def _can_block(self, engine: ConvNetGradient, run: Callable[..., Tensor], x: Tensor) -> bool:
        """Whether :meth:`_block_steps` takes the steps that ``run`` would take."""
        settings = self.settings
        return (
            run is native.step_
            and native.reads(x)
            and engine.takes_steps(x)
            and self.noise is None
            and not isinstance(settings.grad_clip, tuple)  # a norm needs the gradient of all chains
            and all_in_memory(settings.step_size, settings.noise_std)
        )

    def _block_steps(self, engine: ConvNetGradient, x: Tensor, every: int) -> Iterator[Step]:
        """Each ``every``-th step and the last; the engine takes the steps between them at once."""
        steps, options, done = self.settings.steps, self._update_options(), 0
        while done < steps:
            end = min(done + engine.block_steps(), steps, done + every - done % every)
            with torch.no_grad():
                updates = [update for k in range(done, end) for update in self._updates(k)]
                energies = engine.advance_(x, updates, end == steps, **options)
            done = end
            if done == steps or done % every == 0:
                yield Step(done - 1, x, energies, None)

    def _bound(
        self, run: Callable[..., Tensor], x: Tensor
    ) -> Callable[[Tensor | None, Coefficient, Coefficient, int], Tensor]:
        """The in-place update of x as a function of (grad, step_size, noise_std, step)."""
        options = self._update_options()
        if self.noise is None and self.rng_state is None:
            return bind_step(run, x, **options)
        return lambda grad, a, b, step: apply_step_(
            run, x, grad, self._noise_at(step - self.first_step), step_size=a, noise_std=b,
            step=step, **options,
        )  # fmt: skip

    def _noise_at(self, k: int) -> Tensor | None:
        """The given normals of step k, or None for those of the seed."""
        return None if self.noise is None else self.noise[k]

    def _fused_steps(self, engine: FusedGradient, x: Tensor) -> Iterator[Step]:
        """Steps of kernels that use the gradient without storing it."""
        settings, options = self.settings, self._update_options()
        for k in range(settings.steps):
            energies = engine.step_(
                x,
                self._noise_at(k),
                step_size=at_step(settings.step_size, k),
                noise_std=at_step(settings.noise_std, k),
                step=self.first_step + k,
                want_energies=k == settings.steps - 1,
                **options,
            )
            yield Step(k, x, energies, None)

    def _update_options(self) -> dict[str, Any]:
        """The options of the update that are the same at every step."""
        settings = self.settings
        rng_state = {} if self.rng_state is None else {"rng_state": self.rng_state}
        return rng_state | {
            "seed": self.seed,
            "first_chain": self.first_chain,
            "clamp": settings.clamp,
            "grad_clip": settings.grad_clip,
            "maximize": settings.maximize,
            "noise_last": settings.noise_order == "last",
        }

    def transition(
        self,
        x: Tensor,
        k: int,
        evaluate: Callable[[Tensor], Evaluated] | None = None,
        create_graph: bool = False,
        z: Tensor | None = None,
    ) -> Step:
        """Step k by the reference, as a function of x.

        ``evaluate`` maps x to (energies or None, gradient); by default it uses autograd. ``z`` are
        normals that replace those of the chain.
        """
        if evaluate is None:
            evaluate = functools.partial(self.evaluate, k=k, create_graph=create_graph)
        z = self._noise_at(k) if z is None else z
        options = self._update_options()
        for along_gradient, step_size, noise_std, step in self._updates(k):
            if z is None and not reference.is_zero(noise_std):
                # The kernels draw the same numbers faster than the reference's own generator.
                z = _noise.normal(
                    x.shape, seed=self.seed, step=step, first_chain=self.first_chain,
                    device=x.device, dtype=x.dtype,
                )  # fmt: skip
            energies, grad = evaluate(x) if along_gradient else (None, None)
            x = apply_step_(
                reference.step, x, grad, z,
                step_size=step_size, noise_std=noise_std, step=step, **options,
            )  # fmt: skip
        return Step(k, x, energies, grad)

    def evaluate(
        self, x: Tensor, k: int, create_graph: bool = False, want_energies: bool = True
    ) -> Evaluated:
        """(energies or None, gradient) at step k, by the code of the energy or score network."""
        isolation, gradient = self.isolation, self.energy_gradient
        if isolation is None:
            return self.isolated(x.device).evaluate(x, k, create_graph, want_energies)
        kwargs = self.model_kwargs
        if self.step_kwargs:
            kwargs = kwargs | {name: entries[k] for name, entries in self.step_kwargs.items()}
        with isolation.step(self.first_step + k):
            if gradient is not None:
                return gradient(x, kwargs, create_graph, want_energies)
            precision = self.settings.precision
            return network_score(isolation.network, x, kwargs, precision, create_graph)

    def isolated(self, device: torch.device, differentiated_twice: bool = False) -> "Self":
        """A copy that owns the guard and the autograd function shared by all steps.

        ``differentiated_twice`` says that the steps are differentiated, and the energy with them a
        second time.
        """
        isolation = Isolation(self.energy, device, self.seed, differentiated_twice)
        gradient = None
        if self.settings.gradient != "network":
            gradient = EnergyGradient(isolation.network, self.settings.precision, device)
        return self._replace(isolation=isolation, energy_gradient=gradient)

    def choose(self, x: Tensor) -> EngineChoice:
        """The engine of this chain from x; the choice may run the energy once.

        Raises RuntimeError if an engine that was named cannot run.
        """
        if not self.cache.warned:
            self.cache.warned = warn_of_train_mode(self.energy)
        call = self.energy_call(x)
        return choose_engine(self.settings.gradient, call, self.cache, self.step_kwargs)

    def energy_call(self, x: Tensor) -> EnergyCall:
        return EnergyCall(self.energy, x, self.settings.precision, self.model_kwargs)


def check_finite(x: Tensor, energies: Tensor | None, steps: int) -> None:
    """FloatingPointError if a chain is not finite at its end, or its last energy is NaN."""
    if not in_memory(x):
        return  # Python cannot branch on tensors without values, or on those of transforms
    # A sum is finite only if all its terms are, and it takes one pass over memory.
    if all(math.isfinite(v.detach().sum()) for v in (x, energies) if v is not None):
        return
    finite = torch.isfinite(rows(x)).all(1)
    if energies is not None and energies.numel():
        finite &= ~torch.isnan(energies)
    if not bool(finite.all()):
        raise FloatingPointError(
            f"LangevinSampler: {int((~finite).sum())} of {x.shape[0]} chains are not finite after "
            f"{steps} steps, or their energy is NaN; a smaller step_size, clamp or grad_clip may "
            "help, and the sampler's diagnose() shows at which step this began"
        )


_OVERFLOW = (
    'the gradient is not finite; the largest float16 value is 65504, and precision="bf16" or '
    '"tf32" has the range of float32'
)


class Overflow:
    """Finds the first step whose gradient is not finite; a clamp can hide this in the last state.

    The largest magnitude of every step's gradient, which is NaN if an element is, stays on the
    device until :meth:`check`. It takes one launch a step, and a network's step has about 25.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.peaks: Tensor | None = None  # [steps], of the gradient's dtype

    def look_at(self, step: Step) -> None:
        assert step.grad is not None
        if not step.grad.numel():
            return
        if self.peaks is None:
            self.peaks = step.grad.new_zeros(self.steps)
        torch.linalg.vector_norm(step.grad, math.inf, out=self.peaks[step.k])

    def check(self) -> None:
        peaks = [] if self.peaks is None else self.peaks.tolist()
        first_step = next((k for k, peak in enumerate(peaks) if not math.isfinite(peak)), None)
        if first_step is not None:
            raise FloatingPointError(
                f'LangevinSampler: with precision="fp16" at step {first_step} {_OVERFLOW}'
            )


def check_overflow(engine: Engine | None, overflow: Overflow | None) -> None:
    """FloatingPointError if a gradient left the range of float16 in a chain that has ended."""
    if overflow is not None:
        overflow.check()
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
