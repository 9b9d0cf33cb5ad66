"""One call's chain: the settings of a sampler, bound to a seed and stepped through."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin.arguments import Coefficient, at_step
from fastlangevin.gradients.autograd import Isolation, energy_and_grad
from fastlangevin.gradients.fused_gpu import FusedScore
from fastlangevin.gradients.score_network import network_score
from fastlangevin.gradients.select import Choice, Score
from fastlangevin.kernels.memory import in_memory
from fastlangevin.step import apply_step_, bind_step, resolve_backend

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastlangevin.sampler import LangevinSampler


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

    Energies are None where nobody asked for them and the score does not pass by them, and along a
    score network; the gradient where it never reached memory.
    """

    k: int
    x: Tensor
    energies: Tensor | None
    grad: Tensor | None
    accepted: Tensor | None = None  # bool [n], of chains that may reject a step


class Chain(NamedTuple):
    """The checked arguments of one call, beside the sampler that they were given to."""

    sampler: "LangevinSampler"
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
        self, x: Tensor, want_energies: bool = False, choice: Choice | None = None
    ) -> Iterator[Step]:
        """The chain, in place on x: yields after every step. An empty batch takes none.

        Energies come with the last step, and with all others where they are wanted.
        choice: the result of :meth:`choose` for this x, if it is known.
        """
        if x.shape[0] == 0:
            return
        sampler = self.sampler
        score = (choice or self.choose(x)).run
        half = Overflow(x.device) if sampler.precision == "fp16" else None
        if score is not None:
            score.begin()
        yield from self.stride(score, x, half, want_energies)
        check_overflow(score, half)

    def stride(
        self, score: Score | None, x: Tensor, half: "Overflow | None", want_energies: bool = False
    ) -> Iterator[Step]:
        """The steps of :meth:`walk` alone, along a score that has begun: launches, and no reading
        of what they find."""
        run = resolve_backend(self.sampler.backend, x.device)
        if score is None:
            chain = self.isolated(x.device)
            strides = self._strides(run, x, lambda k: chain.evaluate(x, k))
        elif isinstance(score, FusedScore) and not want_energies and self._fuses():
            strides, half = self._fused_strides(score, x), None
        else:
            last = self.sampler.steps - 1
            strides = self._strides(run, x, lambda k: score(x, want_energies or k == last))
        for step in strides:
            if half is not None:
                half.look_at(step)
            yield step

    def _strides(
        self, run: Callable[..., Tensor], x: Tensor, evaluate: Callable[[int], Evaluated]
    ) -> Iterator[Step]:
        """Steps along what ``evaluate`` finds at x, as a function of the step's index."""
        sampler, update = self.sampler, self._bound(run, x)
        for k in range(sampler.steps):
            with torch.no_grad():
                step_size, noise_std = at_step(sampler.step_size, k), at_step(sampler.noise_std, k)
                if sampler.noise_order == "before":
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
        return self.sampler.noise_order != "before" and self.sampler.backend in ("auto", "triton")

    def _fused_strides(self, score: FusedScore, x: Tensor) -> Iterator[Step]:
        """Steps whose gradient never reaches memory."""
        sampler, options = self.sampler, self._options()
        for k in range(sampler.steps):
            energies = score.step_(
                x,
                None if self.noise is None else self.noise[k],
                step_size=at_step(sampler.step_size, k),
                noise_std=at_step(sampler.noise_std, k),
                step=self.first_step + k,
                want_energies=k == sampler.steps - 1,
                **options,
            )
            yield Step(k, x, energies, None)

    def _options(self) -> dict[str, Any]:
        """What is the same at every step."""
        sampler = self.sampler
        in_memory = {} if self.rng_state is None else {"rng_state": self.rng_state}
        return in_memory | {
            "seed": self.seed,
            "first_chain": self.first_chain,
            "clamp": sampler.clamp,
            "grad_clip": sampler.grad_clip,
            "maximize": sampler.maximize,
            "noise_last": sampler.noise_order == "last",
        }

    def transition(
        self,
        run: Callable[..., Tensor],
        x: Tensor,
        k: int,
        score: Callable[[Tensor], Evaluated] | None = None,
        create_graph: bool = False,
    ) -> Step:
        """Step k by ``run``: in place on x for a backend, pure for ``reference.step``.

        score: x -> (energies or None, gradient); by default the general one.
        """
        sampler = self.sampler
        z = None if self.noise is None else self.noise[k]
        step_size, noise_std = at_step(sampler.step_size, k), at_step(sampler.noise_std, k)
        options = {"step": self.first_step + k} | self._options()
        if sampler.noise_order == "before":
            x = apply_step_(run, x, None, z, step_size=0.0, noise_std=noise_std, **options)
            noise_std = 0.0
        if score is None:
            score = functools.partial(self.evaluate, k=k, create_graph=create_graph)
        energies, grad = score(x)
        x = apply_step_(run, x, grad, z, step_size=step_size, noise_std=noise_std, **options)
        return Step(k, x, energies, grad)

    def evaluate(self, x: Tensor, k: int, create_graph: bool = False) -> Evaluated:
        """(energies or None, gradient) at step k by the energy's, or score network's, own code."""
        sampler = self.sampler
        run = network_score if sampler.score == "network" else energy_and_grad
        kwargs = self.model_kwargs
        if self.step_kwargs:
            kwargs = kwargs | {name: entries[k] for name, entries in self.step_kwargs.items()}
        isolation = self.isolation or Isolation(sampler.energy, x.device, self.seed)
        with isolation.step(self.first_step + k):
            return run(isolation.network, x, kwargs, sampler.precision, create_graph)

    def isolated(self, device: torch.device, twice: bool = False) -> "Self":
        """The chain with what its evaluations have in common made once; ``twice``: for steps that
        are differentiated twice."""
        isolation = Isolation(self.sampler.energy, device, self.seed, twice)
        return self._replace(isolation=isolation)

    def choose(self, x: Tensor) -> Choice:
        """The score of this chain from x, which may run the energy once."""
        return self.sampler.choose_score(x, self.model_kwargs, self.step_kwargs)

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
                f"{self.sampler.steps} steps, or their energy is NaN; diagnose() shows at which "
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


def check_overflow(score: Score | None, half: Overflow | None) -> None:
    """FloatingPointError if float16 has been left in a chain that has ended."""
    if half is not None:
        half.check()
    if isinstance(score, FusedScore) and score.overflow is not None and bool(score.overflow):
        raise FloatingPointError(
            f'LangevinSampler: with precision="fp16" {_OVERFLOW}; diagnose() shows where'
        )


def rows(x: Tensor) -> Tensor:
    """States [n, ...] as [n, elements]."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def norms(x: Tensor) -> Tensor:
    """The L2 norm of every state: [n, ...] -> [n]."""
    return torch.linalg.vector_norm(rows(x), dim=1)
