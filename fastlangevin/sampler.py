"""LangevinSampler: the K-step loop."""

import copy
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from fastlangevin import noise as _noise
from fastlangevin.adjoint.unroll import unroll
from fastlangevin.arguments import (
    GradClip,
    Schedule,
    check_chains,
    check_clamp,
    check_count,
    check_grad_clip,
    check_schedule,
    check_step_kwargs,
)
from fastlangevin.chain.chain import Chain, norms, note, rows
from fastlangevin.chain.cuda_graphs import Graphs
from fastlangevin.chain.metropolis import AdjustedChain
from fastlangevin.chain.settings import Settings, check_metropolis
from fastlangevin.explain import explain
from fastlangevin.gradients.engine_cache import EngineCache
from fastlangevin.gradients.network import device_of
from fastlangevin.gradients.packing import PackedEnergy, packing_of
from fastlangevin.gradients.precision import check_precision
from fastlangevin.gradients.select import (
    EngineChoice,
    check_gradient,
)
from fastlangevin.inputs import check_energy, check_noise, check_tensors, copy_state
from fastlangevin.step import check_backend, choose_backend

NOISE_ORDERS = ("after", "before", "last")
_OP = "LangevinSampler"
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Diagnostics(NamedTuple):
    """What a chain did, per step and chain [K, n], and where it ended."""

    x: Any  # [n, ...] the last state, as the sampler itself returns it
    energy: Tensor  # the energy's output where the gradient was taken; NaN of a score network
    grad_norm: Tensor  # |d energy / d x|, L2 over a chain's elements, before any clip
    displacement: Tensor  # |x after the step - x before it|
    saturation: Tensor  # fraction of elements at or beyond clamp, or (-1, 1) without one
    accepted: Tensor  # 1 where the step was taken, 0 where metropolis rejected it


def _entry(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a method work under torch.inference_mode, which would deny it the gradient, and for
    states of several tensors, as one of one."""

    @functools.wraps(method)
    def entry(sampler: "LangevinSampler", x0: Any = None, **options: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return _packed(method, sampler, x0, options)
        with torch.inference_mode(False):
            return _packed(method, sampler, x0, options)

    return cast("Callable[_P, _R]", entry)


def _packed(
    method: Callable[..., Any], sampler: "LangevinSampler", x0: Any, options: dict[str, Any]
) -> Any:
    packing = packing_of(x0, sampler.energy)
    if packing is None:
        return method(sampler, x0, **options)
    flat = copy.copy(sampler)
    flat.energy = PackedEnergy(sampler.energy, packing, is_score=sampler.gradient == "network")
    n: Any = options.get("n")
    if x0 is not None:
        n = len(x0[packing.keys[0]])
        x0 = packing.pack("x0", x0, (n,))
    if options.get("noise") is not None:
        options["noise"] = packing.pack("noise", options["noise"], (sampler.steps, n))
    found = method(flat, x0, **options)
    if isinstance(found, Diagnostics):
        return found._replace(x=packing.unpack(found.x))
    return packing.unpack(found) if isinstance(found, Tensor) else found


class LangevinSampler:
    """K Langevin steps on a batch of chains, as one call.

        x <- clamp(x + (s a clip(dE/dx) + b z)),      s = -1, or +1 with maximize

    energy: an nn.Module or callable, energy(x [n, ...], **model_kwargs) -> [n], [n, 1],
        [n, 1, 1, 1] or, for n = 1, []. A call leaves the flags, modes and .grads alone of a
        module, its bound method or a partial of them, and the buffers of its parts in train mode;
        buffers that a part changes in eval mode move with every evaluation, as in a plain loop.
        Other callables are not looked into.
    steps: K >= 1.
    step_size: a, multiplies the gradient: a float, a sequence of K floats, a tensor [n] (one value
        per chain), or a tensor [K, n] or [K, 1].
    noise_std: b, the standard deviation of the noise added per step, in the same forms; 0 is legal.
    maximize: False, the chain descends an energy; True, it ascends f = -energy.
    clamp: (lo, hi) on the state, or None.
    grad_clip: a bound on each element, ("chain_norm", c), ("batch_norm", c), or None.
    noise_order: "after", the noise is added together with the gradient step; "before", it is added
        (and the state clamped) before the gradient is taken; "last", it is added after the clamp.
    precision: of the network alone: None (as torch is set), "fp32" (strict on every device),
        "tf32", "fp16" or "bf16". The state stays float32, or float64 for a float64 x0. The network
        is given x in the state's dtype. One that refuses it, and whose floating parameters and
        buffers are all of one other dtype, is given x in that; one with several dtypes has to cast
        x itself. "fp32" and "tf32" set torch's precision switches, which other threads share,
        during each evaluation, where they differ. With checkpoint="none" the backward pass of a
        differentiable chain runs as torch is set.
    backend: of the update: "auto", "native", "triton" or "reference".
    gradient: how d energy / d x is computed: "autograd", by autograd on the energy as it is;
        "explicit", by an explicit forward pass and input gradient, for modules made of 2-D
        convolutions, linear layers, common activations, average pools and sums; "fused", by custom
        kernels, for plain stacks of convolutions (native on the CPU; in Triton on GPUs, by name
        alone until it has been measured there); "auto", by the fastest that serves, which explain()
        tells. Differentiable chains use the explicit engine, with a second-order pass of its own,
        in place of the fused one, and autograd for checkpoint="none" and half precisions.
        "network": the callable's own output is the gradient; see :meth:`from_score`.
    metropolis: accept or reject each step (MALA), so that chains sample exp(-E / T) exactly,
        T = b^2 / (2 a), within clamp if there is one: proposals outside are rejected, as are those
        of NaN energy. Needs a > 0 and b > 0 (not looked at on CUDA tensors), noise_order "after",
        no "batch_norm" clip, and an energy that is the same function at every step.

    A state may be a list, a tuple or a dict of tensors [n, ...], of one device: the energy receives
    such a one, and calls return one. It is one flat state [n, D] to the chain, of which the parts
    are elements in their order: one noise, one clamp, one chain's norm. Such energies may have a
    list or dict of shapes as ``shape``. All parts float64, or none: then the state is float32.

    A chain of temperature T has noise_std = sqrt(2 a T); a tensor [n] gives each chain its own.

    The defaults are the paper's (arXiv 1904.09770, app. 7.3), up to its sign: there f = -energy.
    Raises TypeError or ValueError naming the argument; RuntimeError for a backend that cannot run.
    """

    def __init__(
        self,
        energy: Callable[..., Tensor],
        steps: int = 100,
        step_size: Schedule = 1.0,
        noise_std: Schedule = 0.01,
        maximize: bool = False,
        clamp: tuple[float, float] | None = None,
        grad_clip: GradClip | None = None,
        noise_order: str = "after",
        precision: str | None = None,
        backend: str = "auto",
        gradient: str = "auto",
        metropolis: bool = False,
    ) -> None:
        check_energy(_OP, energy)
        if noise_order not in NOISE_ORDERS:
            raise ValueError(
                f"{_OP}: noise_order must be one of {', '.join(NOISE_ORDERS)}, got {noise_order!r}"
            )
        self.energy = energy
        self.steps = check_count(_OP, "steps", steps)
        self.step_size = check_schedule(_OP, "step_size", step_size, self.steps)
        self.noise_std = check_schedule(_OP, "noise_std", noise_std, self.steps)
        self.maximize = bool(maximize)
        self.clamp = check_clamp(_OP, clamp)
        self.grad_clip = check_grad_clip(_OP, grad_clip)
        self.noise_order = noise_order
        self.precision = precision
        self.backend = backend
        self.gradient = gradient
        self.metropolis = bool(metropolis)
        self._recognised = EngineCache()
        self._graphs = Graphs()
        # Energies move, so only the names are checked here; the device is at each call.
        check_precision(precision)
        check_backend(backend)
        check_gradient(gradient)
        if self.metropolis:
            check_metropolis(_OP, self._settings())

    @classmethod
    def from_score(
        cls, net: Callable[..., Tensor], steps: int = 100, **settings: Any
    ) -> "LangevinSampler":
        """A sampler along a score network: net(x, **model_kwargs) -> d log p / d x, in x's shape.

            x <- clamp(x + (a clip(net(x)) + b z))

        ``settings`` are the constructor's, less maximize and gradient, in which the sampler differs
        from that of an energy: they are True and "network". There is no energy: that of
        :meth:`diagnose` is NaN, and checks are of x alone. The net runs under torch.no_grad, or,
        with ``differentiable``, in the graph of the chain. Raises TypeError for those two settings;
        calls raise ValueError for a net that returns energies. Of states [n] or [n, 1] a score
        has an energy's shape: there neither is noticed in the place of the other.
        """
        for name in ("maximize", "gradient"):
            if name in settings:
                raise TypeError(f"{_OP}.from_score: takes no {name}; chains go along the score")
        return cls(net, steps, maximize=True, gradient="network", **settings)

    @_entry
    def __call__(
        self,
        x0: Any = None,
        *,
        n: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        first_chain: int = 0,
        first_step: int = 0,
        noise: Tensor | None = None,
        differentiable: bool = False,
        checkpoint: str | int = "auto",
        grad_steps: int | None = None,
        grad_through: str = "exact",
        offload: bool = False,
        step_kwargs: Mapping[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The state after K steps, [n, ...].

        x0 [n, ...] is read, never changed; or ``n`` chains start from U(-1, 1) in the energy's
        ``shape``. Noise is a function of (seed, chain = first_chain + row, step = first_step + k);
        without ``seed`` one is drawn from ``generator``, by default torch's. ``noise`` [K, n, ...]
        replaces it with given standard normals. ``model_kwargs`` go to the energy, as do those that
        differ from step to step: ``step_kwargs`` {name: tensor [K, ...] or sequence of K}, of
        which the k-th step of the call gets entry k.

        The result is detached, in float32 (float64 for a float64 x0) and in x0's memory format.
        With ``differentiable`` it carries gradients to x0, the energy's parameters, step_size,
        noise_std and whatever else a step reads, through the last ``grad_steps`` steps or all. The
        update is then the reference's, whatever the backend. Beside one step's graph its memory
        is what ``checkpoint`` keeps for the backward pass, which computes the rest again:

            "none"    every step's graph: a plain unroll
            "step"    every state; each step is evaluated once more
            s >= 1    s states at a time, x0 among them: the fewest evaluations there can be
            "2GiB"    as many as fit in so many bytes, and a step's graph; or every graph
            "auto"    "step", unless the states took over a quarter of free memory: then that many

        ``offload`` keeps the states in host memory (on a CPU that is where they are anyway).
        ``grad_through`` "straight" takes each gradient of the energy as if at a constant x:
        d x_K / d x_0 is the identity where no clamp held, and parameters get each step's mixed
        derivative alone. Exact, but for kinks, where the energy is piecewise linear in x.

        Raises TypeError or ValueError for arguments and energies that do not fit, among them
        differentiable chains in which nothing requires grad, and FloatingPointError if at the end
        a chain is not finite or its energy is NaN. RuntimeError, in the backward pass too, for an
        energy that cannot be differentiated twice, gives other values when computed again, or has
        been changed in place since.
        """
        x, chain = self._prepare(
            x0,
            n=n,
            seed=seed,
            generator=generator,
            first_chain=first_chain,
            first_step=first_step,
            noise=noise,
            step_kwargs=step_kwargs,
            **model_kwargs,
        )
        if differentiable and self.metropolis:
            raise ValueError(
                f"{_OP}: differentiable=True cannot be had with metropolis=True, as accepting has "
                "no derivative"
            )
        if differentiable:
            start = x if x0 is None else x0.to(x.dtype)
            return unroll(chain, start, checkpoint, grad_steps, grad_through, offload)
        if (checkpoint, grad_steps, grad_through, offload) != ("auto", None, "exact", False):
            raise ValueError(
                f"{_OP}: checkpoint and grad_steps need differentiable=True, as do grad_through "
                "and offload"
            )
        choice = chain.choose(x) if len(x) else None
        energies = None if choice is None else self._graphs.run(chain, x, choice)
        if energies is None:
            for step in chain.walk(x, choice=choice):
                energies = step.energies
        chain.check_finite(x, energies)
        return x

    @_entry
    def trajectory(self, x0: Any = None, *, every: int = 1, **options: Any) -> Tensor:
        """The states after steps 0, every, 2 every, ...: [1 + K // every, n, ...], x0 first.

        Options as for a call, less the differentiable ones. Raises as a call does.
        """
        every = check_count(_OP, "every", every)
        x, chain = self._prepare(x0, **options)
        kept = x.new_empty((1 + self.steps // every, *x.shape))
        kept[0] = x
        energies: Tensor | None = None
        for step in chain.walk(x):
            energies = step.energies
            if (step.k + 1) % every == 0:
                kept[(step.k + 1) // every] = x
        chain.check_finite(x, energies)
        return kept

    @_entry
    def diagnose(self, x0: Any = None, **options: Any) -> Diagnostics:
        """Run the chain and measure every step of it: :class:`Diagnostics`.

        Options as for a call, less the differentiable ones. Chains that are not finite raise
        nothing here: the record shows where that began.
        """
        x, chain = self._prepare(x0, **options)
        records = [x.new_full((self.steps, x.shape[0]), math.nan) for _ in range(5)]
        lo, hi = self.clamp or (-1.0, 1.0)
        before = x.clone()
        for step in chain.walk(x, want_energies=True):
            outside = ((x <= lo) | (x >= hi)).to(x.dtype)
            assert step.grad is not None
            values = (
                step.energies,
                norms(step.grad),
                norms(x - before),
                rows(outside).mean(1),
                1.0 if step.accepted is None else step.accepted,
            )
            for record, value in zip(records, values, strict=True):
                if value is not None:
                    record[step.k] = value
            before.copy_(x)
        return Diagnostics(x, *records)

    def choose_engine(
        self, x: Tensor, model_kwargs: dict[str, Any], step_kwargs: Mapping[str, Any] | None = None
    ) -> EngineChoice:
        """The engine of a chain from x; RuntimeError where one asked for by name cannot run."""
        return self._chain(model_kwargs=model_kwargs, step_kwargs=step_kwargs or {}).choose(x)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, less the energy."""
        return self._settings()._asdict()

    def _settings(self) -> Settings:
        return Settings(*(getattr(self, name) for name in Settings._fields))

    def _chain(
        self,
        seed: int = 0,
        first_chain: int = 0,
        first_step: int = 0,
        noise: Tensor | None = None,
        model_kwargs: dict[str, Any] | None = None,
        step_kwargs: Mapping[str, Any] | None = None,
    ) -> Chain:
        kind = AdjustedChain if self.metropolis else Chain
        return kind(
            self.energy, self._settings(), self._recognised, seed, first_chain, first_step, noise,
            model_kwargs or {}, step_kwargs or {},
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_graphs": Graphs()}  # a copy, also a shallow one, has its own

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{_OP}({type(self.energy).__name__}, {shown})"

    @_entry
    def explain(self, x0: Any = None) -> str:
        """What a call will run, and on what, as readable text.

        With x0 also what gradients through the chain take by each ``checkpoint``, in evaluations of
        the energy and its gradient and in bytes, found by differentiating one step from there.
        Raises as a call does for an x0 that does not fit.
        """
        if x0 is not None:
            x, chain = self._prepare(x0, seed=0)
            return explain(chain, x, True, self._graphs)
        shape, device = getattr(self.energy, "shape", None), device_of(self.energy)
        zeros = None
        if shape is not None:
            zeros = torch.zeros((1, *shape), dtype=torch.float32, device=device or "cpu")
        return explain(self._chain(), zeros, False, self._graphs)

    def _prepare(
        self,
        x0: Tensor | None,
        *,
        n: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        first_chain: int = 0,
        first_step: int = 0,
        noise: Tensor | None = None,
        step_kwargs: Mapping[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, Chain]:
        """Check a call before any work; return the state to walk on (a copy) and the rest."""
        for name in ("differentiable", "checkpoint", "grad_steps", "grad_through", "offload"):
            if name in model_kwargs:
                raise TypeError(f"{_OP}: {name} is an option of a call, not of this method")
        by_step = check_step_kwargs(_OP, step_kwargs, self.steps, model_kwargs)
        if by_step and self.metropolis:
            raise ValueError(
                f"{_OP}: metropolis=True compares energies of two steps, which step_kwargs would "
                "make different functions"
            )
        for kwargs in (model_kwargs, by_step):
            for name, value in kwargs.items():
                if isinstance(value, Tensor) and value.is_inference():
                    kwargs[name] = value.clone()  # autograd saves no inference tensors
        if seed is not None and generator is not None:
            raise ValueError(f"{_OP}: give seed or generator, not both")
        if (x0 is None) == (n is None):
            raise ValueError(f"{_OP}: give either x0 or n")
        seed = _noise.draw_seed(generator) if seed is None else _noise.check_seed(seed)
        x = self._initial(n, seed, first_chain) if x0 is None else copy_state(_OP, x0, self.energy)
        for name in ("step_size", "noise_std"):
            check_chains(_OP, name, getattr(self, name), x.shape[0])
        check_noise(_OP, noise, (self.steps, *x.shape), x.device)
        check_precision(self.precision, x.device)
        choose_backend(self.backend, x.device)
        first_chain, first_step = _noise.check_address(
            first_chain, x.shape[0], first_step, self.steps
        )
        chain = self._chain(seed, first_chain, first_step, noise, model_kwargs, by_step)
        note(x, chain)
        return x, chain

    def _initial(self, n: Any, seed: int, first_chain: int) -> Tensor:
        """x0 ~ U(-1, 1) from the seed's own stream."""
        shape = getattr(self.energy, "shape", None)
        if shape is None:
            raise ValueError(
                f"{_OP}: n needs an energy with an attribute shape (of one chain's state); give x0"
            )
        n = 0 if n == 0 else check_count(_OP, "n", n)
        device = device_of(self.energy)
        if device is not None:
            check_tensors(_OP, self.energy, device)
        return _noise.initial((n, *shape), seed=seed, first_chain=first_chain, device=device)
