"""LangevinSampler: K Langevin steps on a batch of chains."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastlangevin.adjoint.unroll import unroll
from fastlangevin.arguments import (
    GradClip,
    Schedule,
    check_clamp,
    check_count,
    check_grad_clip,
    check_schedule,
)
from fastlangevin.calls import Call, chain_type, entry, read_call, run_steps, starts
from fastlangevin.chain.chain import Chain, check_finite, norms, note_call, rows
from fastlangevin.chain.cuda_graphs import Graphs
from fastlangevin.chain.settings import Settings, check_metropolis
from fastlangevin.coarse import check_shapes
from fastlangevin.diagnostics import Diagnostics
from fastlangevin.explain import explain
from fastlangevin.gradients.engine_cache import EngineCache
from fastlangevin.gradients.modules import device_of
from fastlangevin.gradients.precision import check_precision
from fastlangevin.gradients.select import EngineChoice, check_gradient
from fastlangevin.inputs import check_energy
from fastlangevin.names import check_name, keywords_checked
from fastlangevin.reprs import short, short_repr
from fastlangevin.step import check_backend

NOISE_ORDERS = ("after", "before", "last")
_OP = "LangevinSampler"


class LangevinSampler:
    """Runs K Langevin steps on a batch of chains.

        x <- clamp(x + (s a clip(dE/dx) + b z)),      s = -1, or +1 with maximize

    E is the energy, a the step size, b the standard deviation of the noise and z a standard normal.
    Chains at temperature T have b = sqrt(2 a T). The defaults are those of the short-run paper
    (arXiv 1904.09770, app. 7.3), whose f is -E.

    A state is a tensor [n, ...] of n chains, or a list, a tuple or a dict of such tensors on one
    device. In the second case the energy receives the same structure, and calls return it; the
    chain itself treats all parts as the elements, in order, of one flat state [n, D], so that the
    noise, the clamp and a chain's norm span them. The parts must be all float64 or none.

    Args:
        energy: An nn.Module or another callable energy(x, **model_kwargs). It returns one value
            per chain, as [n], [n, 1] or [n, 1, 1, 1], or as [] for n = 1. An attribute ``shape``
            (one chain's shape, or a list or dict of shapes) lets calls start chains from noise. A
            call leaves unchanged the flags, modes and ``.grad`` of a module, of a bound method of
            one or of a partial of them, and the buffers of submodules in train mode. Buffers that a
            submodule changes in eval mode change with every evaluation, as they do in a plain loop.
            Other callables are opaque: their state is neither saved nor restored.
        steps: K >= 1.
        step_size: a >= 0: a number, a sequence of K numbers, a tensor [n] with one value per chain,
            or a tensor [K, n] or [K, 1].
        noise_std: b >= 0, in the same forms. With 0 the chain is gradient descent.
        maximize: Whether chains ascend f = -E instead of descending E.
        clamp: Bounds (lo, hi) of the state, or None.
        grad_clip: A bound on each element of the gradient, ("chain_norm", c) for a bound on the L2
            norm of each chain, ("batch_norm", c) for a bound on that of the batch, or None.
        noise_order: "after" adds the noise together with the gradient step. "before" adds it, and
            clamps the state, before the gradient is taken. "last" adds it after the clamp.
        precision: Precision of the network: None (as torch is set), "fp32" (strict on every
            device), "tf32", "fp16" or "bf16". The state itself is float32, or float64 for a float64
            x0, and the network receives it in that dtype. A network that refuses it, and whose
            floating parameters and buffers all have one other dtype, receives x in that dtype; a
            network with several dtypes must cast x itself. "fp32" and "tf32" set torch's precision
            switches during each evaluation if they differ; other threads share these switches. With
            ``checkpoint="none"`` the backward pass of a differentiable chain runs as torch is set.
            On a CPU that does not multiply bfloat16 numbers faster than float32 numbers, the fused
            engine of ``gradient="auto"`` computes "bf16" in float32.
        backend: Backend of the update: "auto", "native", "triton" or "reference".
        gradient: Engine that computes dE/dx. "autograd" differentiates any energy. "explicit"
            replays its operators, recorded once, without autograd. "fused" runs networks of known
            layers in custom kernels, natively on the CPU, and plain stacks of convolutions in
            Triton on GPUs, where it must be named for strict float32. "auto" takes the fastest
            engine that supports the energy; :meth:`explain` says which.
            Differentiable chains use the explicit engine, with its second-order pass, in place of
            the fused one, and autograd with checkpoint="none" and in half precision. "network"
            takes the callable's output as the gradient; see :meth:`from_score`.
        metropolis: Whether to accept or reject each step (MALA), so that chains sample exp(-E / T)
            exactly, with T = b^2 / (2 a). Within a clamp they sample its restriction to the box:
            proposals outside are rejected, as are those with a NaN energy. Requires a > 0 and
            b > 0 (not checked for CUDA tensors), noise_order "after", no "batch_norm" clip, and an
            energy that is the same function at every step.
        start: A sampler of smaller images, coarse to fine: chains that ``n`` counts start from its
            samples, enlarged to the energy's shape, and not from U(-1, 1). It gets the number of
            the chains and their seed, and no keyword arguments of the energy.

    Raises:
        TypeError, ValueError: A setting does not fit. The message names it.
    """

    @keywords_checked
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
        start: "LangevinSampler | None" = None,
    ) -> None:
        check_energy(_OP, energy)
        check_name(f"{_OP}: noise_order", noise_order, NOISE_ORDERS)
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
        self.start = _check_start(start, energy)
        self._cache = EngineCache()
        self._graphs = Graphs()
        # An energy can move to another device, so only the names are checked before a call.
        check_precision(precision)
        check_backend(backend)
        check_gradient(gradient)
        if self.metropolis:
            check_metropolis(_OP, self._settings())

    @classmethod
    def from_score(
        cls, net: Callable[..., Tensor], steps: int = 100, **settings: Any
    ) -> "LangevinSampler":
        """Makes a sampler that follows a score network instead of an energy.

            x <- clamp(x + (a clip(net(x)) + b z))

        Chains of a score network have no energies: :meth:`diagnose` reports NaN for them, and only
        x is checked to be finite at the end.

        Args:
            net: net(x, **model_kwargs) returns the score d log p / dx in x's shape. It runs under
                torch.no_grad or, with ``differentiable``, in the graph of the chain. For states
                [n] or [n, 1] the outputs of an energy and of a score have the same shape, so that
                a mistake there is not noticed.
            steps: K >= 1.
            **settings: The other arguments of :class:`LangevinSampler`, except ``maximize`` and
                ``gradient``, which are True and "network".

        Raises:
            TypeError: ``maximize`` or ``gradient`` is given.
            ValueError: A setting does not fit or, at a call, the net returns energies.
        """
        for name in ("maximize", "gradient"):
            if name in settings:
                raise TypeError(f"{_OP}.from_score: takes no {name}; chains follow the score")
        return cls(net, steps, maximize=True, gradient="network", **settings)

    @entry
    def __call__(
        self,
        x0: Any = None,
        *,
        n: int | None = None,
        shape: Any = None,
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
        callback: Callable[[int, Any], Any] | None = None,
        callback_every: int = 1,
        progress: bool = False,
        **model_kwargs: Any,
    ) -> Tensor:
        """Runs the chains and returns the state after K steps.

        The noise is a pure function of (seed, chain, step, element), where row i is chain
        first_chain + i and the call's k-th step is step first_step + k. A chain can therefore be
        split over calls, batches and devices without a change of its noise.

        Args:
            x0: The starting state [n, ...], which is copied, or None to give ``n``.
            n: How many chains to start from U(-1, 1), or from samples of the setting ``start``.
            shape: The shape of one chain that ``n`` starts, or a list or dict of shapes for a state
                of several tensors. By default it is the energy's attribute ``shape``.
            seed: Seed of the noise, in [0, 2**64). By default one is drawn from ``generator``.
            generator: Source of the seed; torch's default generator if None.
            first_chain, first_step: Numbers of the first chain and step, in [0, 2**32).
            noise: Standard normals [K, n, ...] to use instead of those of the seed.
            differentiable: Whether the result carries gradients: to x0, the energy's parameters,
                step_size, noise_std and every other tensor that a step reads. The update is then
                the reference's, whichever backend is set.
            checkpoint: What the forward pass stores for the backward pass, which recomputes the
                rest. The memory is this and the graph of one step.

                - "none": the graph of every step, as in a plain unrolled loop;
                - "step": every state, so that each step is evaluated once more;
                - an integer s >= 1: s states at a time, including x0, with the fewest evaluations
                  that are possible;
                - bytes such as "2GiB": every graph if they fit, else as many states as fit along
                  with the graph of one step;
                - "auto": every state, or as many as fit into a quarter of the free memory.
            grad_steps: How many of the last steps gradients pass through; all K if None.
            grad_through: "exact", or "straight" to take each gradient dE/dx as if at a constant x.
                Then d x_K / d x_0 is the identity except where a clamp held, and parameters get
                only the mixed derivative of each step. "straight" is exact, except at kinks, for an
                energy that is piecewise linear in x.
            offload: Whether to store the states in host memory. No effect on a CPU.
            step_kwargs: Keyword arguments of the energy that change from step to step, as
                {name: tensor [K, ...] or sequence of K}; the k-th step receives entry k.
            callback: Called as callback(step, x) after every ``callback_every`` steps and after the
                last one. step counts from 1. x is the chain's own state, which the next step
                changes: copy it to keep it, and do not change it.
            callback_every: The number of steps between two calls of ``callback``.
            progress: Whether to show a bar on standard error, if that is a terminal. On a GPU it
                shows the steps that have been launched. Neither the bar nor a callback changes the
                chain. They are not supported with ``differentiable``, and with them the steps on a
                GPU are not replayed as one CUDA graph.
            **model_kwargs: Further keyword arguments of the energy.

        Returns:
            The state [n, ...] in x0's memory format, in float32, or float64 for a float64 x0. It is
            detached unless ``differentiable``.

        Raises:
            TypeError, ValueError: An argument or the energy does not fit, or the chain is
                differentiable and nothing in it requires grad.
            FloatingPointError: At the end a chain is not finite, or its energy is NaN.
            RuntimeError: A backend or engine cannot run. With ``differentiable`` also, possibly
                during the backward pass: the energy cannot be differentiated twice, returns other
                values when a step is recomputed, or has been changed in place in the meantime.
        """
        call = self._read(
            x0, n=n, shape=shape, seed=seed, generator=generator, first_chain=first_chain,
            first_step=first_step, noise=noise, step_kwargs=step_kwargs, **model_kwargs,
        )  # fmt: skip
        if callback is not None and not callable(callback):
            raise TypeError(f"{_OP}: callback must be a function of (step, x), got {callback!r}")
        every = check_count(_OP, "callback_every", callback_every)
        if differentiable:
            if callback is not None or progress:
                raise ValueError(
                    f"{_OP}: callback and progress are not supported with differentiable=True"
                )
            if self.metropolis:
                raise ValueError(
                    f"{_OP}: differentiable=True is not supported with metropolis=True: accepting "
                    "or rejecting a step is not differentiable"
                )
            note_call(call.x, call.chain)
            start = call.x if x0 is None else x0.to(call.x.dtype)
            return unroll(call.chain, start, checkpoint, grad_steps, grad_through, offload)
        options = {"checkpoint": checkpoint, "grad_steps": grad_steps,
                   "grad_through": grad_through, "offload": offload}  # fmt: skip
        given = [f"{k}={v!r}" for k, v in options.items() if v != _CALL[k].default]
        if given:
            raise ValueError(f"{_OP}: differentiable=True is needed for {', '.join(given)}")
        x, choice = call.begin()
        energies = None
        if choice is not None and callback is None and not progress:
            energies = self._graphs.run(call.chain, x, choice)
        if energies is None:
            due = self.steps if callback is None else every
            energies = run_steps(call.chain, x, choice, callback, due, progress)
        check_finite(x, energies, self.steps)
        return x

    @entry
    def trajectory(self, x0: Any = None, *, every: int = 1, **options: Any) -> Tensor:
        """Runs the chains and returns x0 and the state after every ``every``-th step.

        Args:
            x0: The starting state [n, ...], or None to give ``n``.
            every: The number of steps between two states.
            **options: Those of a call, except those of differentiable chains.

        Returns:
            The states [1 + K // every, n, ...].

        Raises:
            The errors of a call.
        """
        every = check_count(_OP, "every", every)
        call = self._read(x0, **options)
        x, choice = call.begin()
        states = x.new_empty((1 + self.steps // every, *x.shape))
        states[0] = x
        energies: Tensor | None = None
        for step in call.chain.steps(x, choice=choice, every=every):
            energies = step.energies
            if (step.k + 1) % every == 0:
                states[(step.k + 1) // every] = x
        check_finite(x, energies, self.steps)
        return states

    @entry
    def diagnose(self, x0: Any = None, **options: Any) -> Diagnostics:
        """Runs the chains and measures every step.

        Args:
            x0: The starting state [n, ...], or None to give ``n``.
            **options: Those of a call, except those of differentiable chains.

        Returns:
            The :class:`Diagnostics`.

        Raises:
            The errors of a call, except that chains that are not finite do not raise: the
            diagnostics show at which step they became so.
        """
        call = self._read(x0, **options)
        x, choice = call.begin()
        names = Diagnostics._fields[1:]
        records = {name: x.new_full((self.steps, x.shape[0]), math.nan) for name in names}
        lo, hi = self.clamp or (-1.0, 1.0)
        before = x.clone()
        for step in call.chain.steps(x, want_energies=True, choice=choice):
            outside = ((x <= lo) | (x >= hi)).to(x.dtype).masked_fill(~x.isfinite(), math.nan)
            assert step.grad is not None
            if step.energies is not None:
                records["energy"][step.k] = step.energies
            records["grad_norm"][step.k] = norms(step.grad)
            records["displacement"][step.k] = norms(x - before)
            records["saturation"][step.k] = rows(outside).mean(1)
            records["accepted"][step.k] = 1.0 if step.accepted is None else step.accepted
            before.copy_(x)
        return Diagnostics(x, **records)

    def choose_engine(
        self, x: Tensor, model_kwargs: dict[str, Any], step_kwargs: Mapping[str, Any] | None = None
    ) -> EngineChoice:
        """The engine of a chain from x; RuntimeError if one that was named cannot run."""
        return self._chain(model_kwargs, step_kwargs=step_kwargs or {}).choose(x)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments except the energy, as a dict."""
        return self._settings()._asdict() | {"start": self.start}

    def starts(self, n: int, *, seed: int, shape: Any = None, first_chain: int = 0) -> Tensor:
        """The states from which a call with these arguments starts its chains.

        Args:
            n, shape, seed, first_chain: As in a call, for states of one tensor.

        Returns:
            States [n, ...] from U(-1, 1), or enlarged samples of ``start``, in float32.

        Raises:
            The errors of a call.
        """
        return starts(self.energy, self.start, n, shape, seed, first_chain)

    def _settings(self) -> Settings:
        return Settings(*(getattr(self, name) for name in Settings._fields))

    def _chain(self, model_kwargs: dict[str, Any] | None = None, **values: Any) -> Chain:
        settings, kwargs = self._settings(), model_kwargs or {}
        return chain_type(settings)(self.energy, settings, self._cache, kwargs, **values)

    def _read(self, x0: Any, **options: Any) -> Call:
        for name in _CALL_ONLY & options.keys():
            raise TypeError(
                f"{_OP}: {name} is an option of a call to the sampler, not of this method"
            )
        return read_call(
            self.energy, self._settings(), self._cache, _RESERVED, self.start, x0, **options
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_graphs": Graphs()}  # every copy, even a shallow one, has its own

    def __repr__(self) -> str:
        """The energy, the settings of the chain, and the other settings that are no defaults."""
        defaults = inspect.signature(LangevinSampler).parameters
        shown = {
            name: value
            for name, value in self.settings().items()
            if name in ("steps", "step_size", "noise_std") or value != defaults[name].default
        }
        energy = getattr(self.energy, "__name__", type(self.energy).__name__)
        return short_repr(_OP, shown).replace("(", f"({energy}, ", 1)

    @entry
    def explain(self, x0: Any = None, **model_kwargs: Any) -> str:
        """Describes what a call will run, on which device, and why each faster engine was rejected.

        Args:
            x0: A starting state. With it the text also lists what gradients through the chain cost
                for each ``checkpoint``, in bytes and in evaluations of the energy and its gradient.
                For this, one step is run and differentiated.
            **model_kwargs: Keyword arguments of the energy, as in a call; they need x0.

        Returns:
            Text of several lines.

        Raises:
            The errors of a call with this x0, and TypeError for model_kwargs without one.
        """
        if x0 is not None:
            call = self._read(x0, seed=0, **model_kwargs)
            return explain(call.chain, call.own_state(), True, self._graphs)
        if model_kwargs:
            names = ", ".join(model_kwargs)
            raise TypeError(f"{_OP}: explain: {names} can be given only together with x0")
        shape, device = getattr(self.energy, "shape", None), device_of(self.energy)
        zeros = None
        if shape is not None:
            zeros = torch.zeros((1, *shape), dtype=torch.float32, device=device or "cpu")
        text = explain(self._chain(), zeros, False, self._graphs)
        if self.start is not None:
            of_start = self.start.explain().replace("\n", "\n           ")
            text += f"\nstart      enlarged samples of this chain:\n           {of_start}"
        return text


def _check_start(start: Any, energy: Callable[..., Tensor]) -> LangevinSampler | None:
    """The argument ``start``; TypeError or ValueError if it is no sampler of smaller images."""
    if start is None:
        return None
    if not isinstance(start, LangevinSampler):
        raise TypeError(f"{_OP}: start must be a LangevinSampler or None, got {short(start)}")
    small = getattr(start.energy, "shape", None)
    if small is None:
        raise ValueError(f"{_OP}: start must have an energy with the attribute shape")
    for name in ("step_size", "noise_std"):
        value = getattr(start, name)
        if isinstance(value, Tensor) and value.shape[-1:] not in ((), (1,)):
            raise ValueError(f"{_OP}: start must have one {name} for all chains, not one for each")
    check_shapes(_OP, small, getattr(energy, "shape", None))
    return start


# The parameters of a call, the names of those that other methods lack, and of all of any method.
_CALL = dict(inspect.signature(LangevinSampler.__call__).parameters)
del _CALL["self"], _CALL["model_kwargs"]
_CALL_ONLY = _CALL.keys() - inspect.signature(read_call).parameters
_RESERVED = {*_CALL, "every"}
