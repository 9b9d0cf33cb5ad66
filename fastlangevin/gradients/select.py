"""Which engine a call runs with: the fastest that computes what the energy's own code would."""

import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlangevin.gradients import fused_cpu, fused_gpu
from fastlangevin.gradients.autograd import modules_of, network_precision
from fastlangevin.gradients.engine import Engine
from fastlangevin.gradients.explicit import ExplicitGradient
from fastlangevin.gradients.graph.conv_stack import conv_stack
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.graph.record import Recording, record
from fastlangevin.gradients.packing import PackedEnergy
from fastlangevin.gradients.precision import convolutions_use_tf32
from fastlangevin.gradients.proof import prove
from fastlangevin.kernels import extension
from fastlangevin.kernels.memory import all_in_memory, in_memory
from fastlangevin.locks import new_lock

GRADIENTS = ("auto", "autograd", "explicit", "fused", "network")
HALVES = ("fp16", "bf16")
# Batches of this many shapes are planned for at a time; each holds a copy of the weights.
_PLANS = 4
_PARTS = "the state has several parts"
_NOT_HERE = "not in memory (fake, meta, or of a torch.func transform)"


class Choice(NamedTuple):
    """The chosen engine (``run`` is None for autograd and score networks); why no faster one is."""

    name: str
    run: Engine | None
    why_not: dict[str, str]
    graph: Graph | None = None


class Recognised:
    """What a sampler remembers of its energy between calls: graphs, plans made from them, and
    which of these have been proved."""

    def __init__(self) -> None:
        # Per shape of a batch. Graphs and plans are held, as their keys are made of ids.
        self._graphs: dict[tuple[Any, ...], Graph] = {}
        self._plans: dict[tuple[Any, ...], tuple[Graph | None, Engine]] = {}
        self._proved: dict[tuple[Any, ...], Graph] = {}
        self._lock = new_lock()
        self.warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Recognised, ()  # a copy of a sampler starts anew

    def graph(
        self, energy: Callable[..., Tensor], x: Tensor, model_kwargs: dict[str, Any]
    ) -> "Found | str":
        """The graph of these states; from a run of the energy unless its code is known."""
        graph = None if model_kwargs else self._graphs.get(tuple(x.shape))
        if graph is not None and graph.is_current(energy, x):
            return Found(graph, None)
        found = record(energy, x, model_kwargs)
        if isinstance(found, str):
            return found
        if not all_in_memory(*found.graph.bases):
            return f"a parameter or buffer is {_NOT_HERE}"
        before = self._graphs.get(tuple(x.shape))
        if before is not None and before.key != found.graph.key:
            with self._lock:
                self._plans = {k: v for k, v in self._plans.items() if k[-1] != before.key}
        self._keep(self._graphs, tuple(x.shape), found.graph)
        return Found(found.graph, found)

    def plan(self, make: Callable[[], Engine], graph: Graph | None, *key: Any) -> Engine:
        """The plan of a graph and key, made where there is none."""
        key = (*key, None if graph is None else graph.key)
        with self._lock:
            known = self._plans.get(key)
        _, plan = known or (graph, make())
        self._keep(self._plans, key, known or (graph, plan))
        return plan

    def disproof(
        self,
        name: str,
        make: Callable[[], Engine],
        found: "Found",
        energy: Callable[..., Tensor],
        x: Tensor,
        precision: str | None,
        model_kwargs: dict[str, Any],
    ) -> str | None:
        """Why an engine is not to be used. One that has agreed with autograd is not asked again.

        Half precision is proved of the graph, by the explicit engine in the network's own dtype.
        """
        key = name, precision, found.graph.key
        if key in self._proved or not x.shape[0]:
            return None
        run = ExplicitGradient(found.graph, x, "fp32") if precision in HALVES else make()
        recording = found.recording or record(energy, x, model_kwargs)
        if isinstance(recording, str):
            return recording
        verdict = prove(recording, run, x)
        if verdict.reason is None and verdict.shown:
            self._keep(self._proved, key, found.graph)
        return verdict.reason

    def _keep(self, kept: dict[Any, Any], key: Any, value: Any) -> None:
        """Keep the most recent ones; the graphs in them keep alive what their keys name."""
        with self._lock:
            kept.pop(key, None)
            kept[key] = value
            if len(kept) > _PLANS:
                kept.pop(next(iter(kept)))


class Found(NamedTuple):
    """A graph, and the run that it was read off if there was one in this call."""

    graph: Graph
    recording: Recording | None


def check_gradient(gradient: str) -> None:
    """ValueError unless the name is an engine's, or "auto"."""
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")


def choose_engine(
    gradient: str,
    energy: Callable[..., Tensor],
    x: Tensor,
    precision: str | None,
    model_kwargs: dict[str, Any],
    known: Recognised,
    step_kwargs: Iterable[str] = (),
) -> Choice:
    """The engine for chains from x [n, ...]. One asked for by name that cannot run: RuntimeError.

    An energy that may be one of other people's code is run once on x; see :mod:`recorder`.
    step_kwargs: names of what the energy is given besides model_kwargs, different at every step.
    """
    if gradient in ("autograd", "network"):
        return Choice(gradient, None, {})
    with network_precision("fp32" if precision in HALVES else precision, x.device):
        choice = _explicit(gradient, energy, x, precision, model_kwargs, known, step_kwargs)
    if isinstance(choice, Choice):
        return choice
    if gradient != "auto":
        raise RuntimeError(f'LangevinSampler: gradient "{gradient}" cannot run: {choice}')
    return Choice("autograd", None, {"fused, explicit": choice})


def _explicit(
    gradient: str,
    energy: Callable[..., Tensor],
    x: Tensor,
    precision: str | None,
    model_kwargs: dict[str, Any],
    known: Recognised,
    step_kwargs: Iterable[str],
) -> Choice | str:
    """The fused or explicit engine, if it has proved to give autograd's gradient; else why not."""
    reason = _unrecorded(energy, x, precision, step_kwargs)
    if reason is not None:
        return reason
    found = known.graph(energy, x, model_kwargs)
    if isinstance(found, str):
        return found
    graph = found.graph
    if any(base.grad_fn is not None for base in graph.bases):
        known = Recognised()  # functional_call's weights: nothing of them outlives the call
    name, run = "fused", None
    why_not: dict[str, str] = {}
    if gradient != "explicit":
        fused = _fused(graph, x, precision, known, by_name=gradient == "fused")
        if not isinstance(fused, str):
            run = fused
        elif gradient == "fused":
            return fused
        else:
            why_not["fused"] = fused
    if run is None:
        name, run = "explicit", known.plan(
            lambda: ExplicitGradient(graph, x, precision),
            graph, "explicit", precision, torch.backends.mkldnn.enabled,
        )  # fmt: skip
    chosen: Engine = run
    reason = known.disproof(name, lambda: chosen, found, energy, x, precision, model_kwargs)
    return reason or Choice(name, run, why_not, graph)


def _fused(
    graph: Graph, x: Tensor, precision: str | None, known: Recognised, by_name: bool
) -> Engine | str:
    """The fused engine, or why there is none."""
    stack = conv_stack(graph)
    if isinstance(stack, str):
        return stack
    chains, device = x.shape[0], x.device
    if device.type == "cpu":
        reason = fused_cpu.refusal(stack, x, precision)
        if reason is not None:
            return reason
        return known.plan(
            lambda: fused_cpu.ConvNetGradient(graph, chains, precision),
            graph, "native", precision, torch.get_num_threads(),
            extension.library.instruction_set(),
        )  # fmt: skip
    if precision is None and graph.dtype == torch.float32:
        precision = "tf32" if convolutions_use_tf32() else "fp32"
    precision = precision or {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(graph.dtype)
    reason = fused_gpu.refusal(stack, device, precision)
    if reason is None and not by_name:
        reason = fused_gpu.OFF
    if reason is not None:
        return reason
    assert precision is not None
    engine = known.plan(
        lambda: fused_gpu.FusedGradient(stack, chains, device, precision),
        graph,
        "triton",
        precision,
    )
    assert isinstance(engine, fused_gpu.FusedGradient)
    engine.stack = stack  # the weights may have moved
    return engine


def proved_graph(
    energy: Callable[..., Tensor],
    x: Tensor,
    precision: str | None,
    model_kwargs: dict[str, Any],
    known: Recognised,
    step_kwargs: Iterable[str] = (),
) -> Graph | str:
    """The graph that the explicit engine runs, or why autograd is to differentiate."""
    reason = _unrecorded(energy, x, precision, step_kwargs)
    if reason is not None:
        return reason
    with network_precision(precision, x.device):
        found = known.graph(energy, x, model_kwargs)
        if isinstance(found, str):
            return found
        graph = found.graph
        if any(base.grad_fn is not None for base in graph.bases):
            known = Recognised()

        def lean() -> Engine:
            return ExplicitGradient(graph, x, precision)

        reason = known.disproof("explicit", lean, found, energy, x, precision, model_kwargs)
    return reason or graph


def _unrecorded(
    energy: Callable[..., Tensor],
    x: Tensor,
    precision: str | None,
    step_kwargs: Iterable[str],
) -> str | None:
    """Why a call is not to be recorded, without a look at the energy."""
    names = ", ".join(step_kwargs)
    if names:
        return f"the energy is given {names}, which may differ from step to step"
    if isinstance(energy, PackedEnergy):
        return _PARTS
    if not in_memory(x):
        return f"the state is {_NOT_HERE}"
    if precision is None and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
        return "autocast is on" + (f'; precision="{name}" needs no autocast' if name else "")
    return None


def _levels_to_the_caller() -> int:
    """How far up the stack, from the function that calls this one, the sampler was called."""
    package, frame, levels = __name__.partition(".")[0] + ".", sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(package):
        frame, levels = frame.f_back, levels + 1
    return levels


def warn_of_modes(energy: Callable[..., Tensor]) -> bool:
    """Warn of modules whose train mode makes a chain another one than is meant; True if any."""
    found = []
    for root in modules_of(energy):
        for name, module in root.named_modules():
            called = f"{type(module).__name__} {name!r}" if name else type(module).__name__
            if not getattr(module, "training", False):  # torch.jit.freeze leaves no mode
                continue
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                found.append(f"{called} makes the energy another random function at every step")
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                found.append(f"{called} makes every chain depend on the others of its batch")
    if found:
        warnings.warn(
            f"LangevinSampler: in train mode {found[0]}"
            + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
            + "; energy.eval() samples from the energy itself",
            stacklevel=_levels_to_the_caller(),
        )
    return bool(found)
