"""Chooses the engine of a call: the fastest one that computes what the energy's own code would."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlangevin.gradients import explicit, fused_cpu, fused_gpu, onednn
from fastlangevin.gradients.engine import Engine
from fastlangevin.gradients.engine_cache import NOT_IN_MEMORY, EnergyCall, EngineCache
from fastlangevin.gradients.explicit import ExplicitGradient
from fastlangevin.gradients.graph.conv_stack import conv_stack
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.graph.record import Recording, RunResults
from fastlangevin.gradients.own_last_step import OwnLastStep
from fastlangevin.gradients.precision import HALVES, convolutions_use_tf32, half_name
from fastlangevin.gradients.trace.instructions import Trace
from fastlangevin.kernels import extension
from fastlangevin.kernels.memory import in_memory
from fastlangevin.names import check_name

_KEEPS_VALUES = "a run of it keeps tensors that are computed from the states"
GRADIENTS = ("auto", "autograd", "explicit", "fused", "network")


class Rejected(NamedTuple):
    """An engine that does not run, and why."""

    engine: str
    reason: str


class EngineChoice(NamedTuple):
    """The chosen engine, by name and as an object, and why each faster one was rejected.

    ``engine`` is None for autograd and for score networks.
    """

    name: str
    engine: Engine | None
    why_not: tuple[Rejected, ...] = ()
    graph: Graph | None = None


def check_gradient(gradient: str) -> None:
    """Raise ValueError unless ``gradient`` is the name of an engine or "auto"."""
    check_name("gradient", gradient, GRADIENTS)


def choose_engine(
    gradient: str, call: EnergyCall, cache: EngineCache, step_kwargs: Iterable[str] = ()
) -> EngineChoice:
    """Return the engine for chains from the call's states.

    An energy whose code is not torch's or this package's is run once on them; see
    :mod:`fastlangevin.gradients.graph.record`. ``step_kwargs`` names the arguments that the energy
    gets in addition to the call's and that differ from step to step. Raises RuntimeError if
    ``gradient`` names an engine that cannot run.
    """
    if gradient in ("autograd", "network"):
        return EngineChoice(gradient, None)
    choice = _refusal(call, step_kwargs) or _choose_from_recording(gradient, call, cache)
    if isinstance(choice, EngineChoice):
        return choice
    if gradient != "auto":
        raise RuntimeError(f'LangevinSampler: gradient "{gradient}" cannot run: {choice}')
    return EngineChoice("autograd", None, (Rejected("fused", choice), Rejected("explicit", choice)))


def proved_graph(
    call: EnergyCall, cache: EngineCache, step_kwargs: Iterable[str] = ()
) -> Graph | str:
    """Return a graph for the explicit engine that has been proved, or why autograd must be used."""
    reason = _refusal(call, step_kwargs)
    if reason is not None:
        return reason
    recording, results = cache.recording(call)
    graph = recording.graph
    if recording.keeps_values:
        return _KEEPS_VALUES
    if isinstance(graph, str):
        return graph
    reason = explicit.refusal(graph)
    if reason is not None:
        return reason
    cache = _cache_for(graph, cache)

    def make() -> Engine:
        return ExplicitGradient(graph, call.x, call.precision)

    return cache.disproof("explicit", make, graph, results, call) or graph


def _choose_from_recording(
    gradient: str, call: EnergyCall, cache: EngineCache
) -> EngineChoice | str:
    """Return the fastest engine that may run instead of the energy's code, or why none may."""
    half = call.precision if call.precision in HALVES else None
    try_again = gradient != "auto"
    recording, results = cache.recording(call, try_again=try_again)
    device_type = call.x.device.type
    if recording.keeps_values and device_type != "cpu":
        return _KEEPS_VALUES  # a CUDA graph cannot contain the last step
    choice = _choose_proved_layers(gradient, recording.graph, results, call, cache)
    if isinstance(choice, EngineChoice):
        return _with_own_last_step(choice, recording, call)
    if gradient == "fused":
        return choice
    if device_type not in ("cpu", "cuda"):
        return choice  # replaying has not been tried on other devices
    # On a CPU without hardware for the half precision, float32 is faster and more precise.
    if half and (device_type == "cuda" or onednn.runs(HALVES[half])):
        recording, results = cache.recording(call, half, try_again)
    elif half:
        call = call._replace(precision="fp32")
    trace = recording.trace
    if not isinstance(trace, Trace):
        return trace
    is_kept = recording.guard is not None
    if not is_kept:
        cache = EngineCache()  # the recording is for this call, and must not outlive it
    engine = cache.replay(trace, call, is_kept)
    try:
        reason = cache.disproof("replay", lambda: engine, trace, results, call)
    except Exception as error:
        reason = f"a replay raises {type(error).__name__}: {error}"
    why_not = () if gradient == "explicit" else (Rejected("fused", choice),)
    return reason or _with_own_last_step(EngineChoice("explicit", engine, why_not), recording, call)


def _with_own_last_step(
    choice: EngineChoice, recording: Recording, call: EnergyCall
) -> EngineChoice:
    """Return a choice whose last step runs the energy, if a run keeps values of the states."""
    if not recording.keeps_values or choice.engine is None:
        return choice
    engine = OwnLastStep(choice.engine, call.energy, call.x.device, call.model_kwargs)
    return choice._replace(engine=engine)


def _choose_proved_layers(
    gradient: str,
    graph: Graph | str,
    results: RunResults | None,
    call: EnergyCall,
    cache: EngineCache,
) -> EngineChoice | str:
    """Return the fused or explicit engine of a graph, or why neither has autograd's gradient."""
    if isinstance(graph, str):
        return graph
    cache = _cache_for(graph, cache)
    choice = _choose_layers(gradient, graph, call, cache)
    if isinstance(choice, str):
        return choice
    engine = choice.engine
    assert engine is not None
    reason = cache.disproof(choice.name, lambda: engine, graph, results, call)
    if reason is not None and gradient == "auto" and choice.name == "fused" and call.x.is_cuda:
        # The graph may be right and the GPU's kernels wrong.
        other = _choose_proved_layers("explicit", graph, results, call, cache)
        if isinstance(other, EngineChoice):
            return other._replace(why_not=(Rejected("fused", reason),))
    return reason or choice


def _choose_layers(
    gradient: str, graph: Graph, call: EnergyCall, cache: EngineCache
) -> EngineChoice | str:
    """Return the fused or explicit engine of a graph, or why the one that was named cannot run."""
    x, precision = call.x, call.precision
    reason = explicit.refusal(graph)

    def layers(precision: str | None) -> Engine:
        return cache.engine(
            lambda: ExplicitGradient(graph, x, precision),
            graph, "explicit", precision, torch.backends.mkldnn.enabled,
        )  # fmt: skip

    if gradient == "explicit":
        return reason or EngineChoice("explicit", layers(precision), (), graph)
    if reason is not None and (precision in HALVES or x.is_cuda):
        return f"in half precision and on CUDA it is proved by the engine explicit, and {reason}"
    why_float32 = None
    if gradient == "auto" and precision in HALVES and x.device.type == "cpu":
        why_float32 = fused_cpu.why_float32()
    fused = _fused(graph, x, "fp32" if why_float32 else precision, cache, gradient == "fused")
    if isinstance(fused, str) and (gradient == "fused" or reason is not None):
        return fused
    if isinstance(fused, str):
        if x.device.type == "cpu" and precision in HALVES and not onednn.runs(HALVES[precision]):
            precision = "fp32"  # faster there, and more precise
        return EngineChoice("explicit", layers(precision), (Rejected("fused", fused),), graph)
    if isinstance(fused, fused_cpu.ConvNetGradient):
        fused = fused.of_call(call.model_kwargs)
    why_not = (Rejected(f"fused in {precision}", why_float32),) if why_float32 else ()
    return EngineChoice("fused", fused, why_not, graph)


def _cache_for(graph: Graph, cache: EngineCache) -> EngineCache:
    """Return the cache for a graph's engines.

    Weights passed by functional_call belong to the call's autograd graph. Their engines go into a
    new cache, so that the graph can be freed.
    """
    return EngineCache() if any(base.grad_fn is not None for base in graph.bases) else cache


def _refusal(call: EnergyCall, step_kwargs: Iterable[str]) -> str | None:
    """Return why a call is not recorded, whatever its energy computes."""
    names = ", ".join(step_kwargs)
    if names:
        return f"the energy is given {names}, which may differ from step to step"
    if not in_memory(call.x):
        return f"the state is {NOT_IN_MEMORY}"
    device_type = call.x.device.type
    if call.precision is None and torch.is_autocast_enabled(device_type):
        name = half_name(torch.get_autocast_dtype(device_type))
        return "autocast is on" + (f'; precision="{name}" needs no autocast' if name else "")
    return None


def _fused(
    graph: Graph, x: Tensor, precision: str | None, cache: EngineCache, by_name: bool
) -> Engine | str:
    """Return the fused engine for the state's device, or the reason why there is none."""
    device = x.device
    if device.type != "cpu" and graph.computed is not None:
        return "weights are computed from other weights"
    if not all(math.prod(shape) for shape in (graph.shape, *(node.shape for node in graph.nodes))):
        return "a state or a layer has no elements"
    if device.type == "cpu":
        reason = fused_cpu.refusal(graph, x, precision)
        if reason is not None:
            return reason
        return cache.engine(
            lambda: fused_cpu.ConvNetGradient(graph, x.shape[0], precision),
            graph, "native", precision, torch.get_num_threads(),
            extension.library.instruction_set(),
        )  # fmt: skip
    return _fused_on_gpu(graph, x, precision, cache, by_name)


def _fused_on_gpu(
    graph: Graph, x: Tensor, precision: str | None, cache: EngineCache, by_name: bool
) -> Engine | str:
    """Return the fused engine for a GPU, or the reason why there is none."""
    chains, device = x.shape[0], x.device
    stack = conv_stack(graph)
    if isinstance(stack, str):
        return stack
    if precision is None and graph.dtype == torch.float32:
        precision = "tf32" if convolutions_use_tf32() else "fp32"
    precision = precision or half_name(graph.dtype)
    reason = fused_gpu.refusal(stack, device, precision)
    if reason is None and not by_name:
        if torch.version.hip is not None:
            reason = 'it has not been tried on ROCm; gradient="fused" runs it'
        elif precision == "fp32":
            reason = 'strict float32 has no matrix instructions; gradient="fused" runs it'
    if reason is not None:
        return reason
    assert precision is not None
    engine = cache.engine(
        lambda: fused_gpu.FusedGradient(stack, chains, device, precision),
        graph, "triton", precision,
    )  # fmt: skip
    assert isinstance(engine, fused_gpu.FusedGradient)
    engine.stack = stack  # the weights may have moved
    return engine
