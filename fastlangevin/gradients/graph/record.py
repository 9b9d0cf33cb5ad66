"""Records what an energy computes, from one run of its code and of its backward pass.

A recording sees the operators themselves, so it does not matter how a network is written (modules,
functions or operators), and nothing is inferred from the names of modules. It gives two forms. The
:class:`~fastlangevin.gradients.trace.instructions.Trace` holds all operators, forward and back, and
can be replayed. The :class:`Graph` exists for networks of known layers; engines compute its
gradient by rules of their own.

A recording holds for batches of its own size n. For that size, each operator of a graph is known to
treat the first dimension, of n chains, row by row: it is elementwise, works over other dimensions,
or is a view that keeps the order of the elements and a first dimension of n. This is true even if
another dimension equals n.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.graph.recorder import OperatorRecorder, Unsupported
from fastlangevin.gradients.graph.recording_guard import HOOKS, Guard, global_hooks, may_be_kept
from fastlangevin.gradients.graph.snapshot import Snapshot
from fastlangevin.gradients.graph.watch import Values, Watch
from fastlangevin.gradients.modules import Network, module_of, network_dtype
from fastlangevin.gradients.precision import HALVES
from fastlangevin.gradients.trace.constants import ComputedConstants, Constants, ReadNumbers
from fastlangevin.gradients.trace.instructions import Trace
from fastlangevin.gradients.trace.tracer import Tracer
from fastlangevin.gradients.untouched import left_as_found


class Recording(NamedTuple):
    """The two forms of a recorded run; each may be the reason why it does not exist.

    ``guard`` tells whether the recording holds for another call; if it is None, it holds for none.
    ``ran`` is whether the energy was run, and ``keeps_values`` whether each run replaces attributes
    of modules by tensors that it computes from the states.
    """

    graph: Graph | str
    trace: Trace | str
    guard: Guard | None
    ran: bool = True
    keeps_values: bool = False


class RunResults(NamedTuple):
    """What autograd computed in a recorded run."""

    x: Tensor  # the states, in the dtype in which they enter the network
    energies: Tensor
    grad: Tensor | None


def recognise(
    energy: Callable[..., Tensor], x: Tensor, model_kwargs: dict[str, Any] | None = None
) -> Graph | str:
    """Return the graph of an energy on states x [n, ...], or the reason why there is none."""
    return record(energy, x, model_kwargs)[0].graph


def record(
    energy: Callable[..., Tensor],
    x: Tensor,
    model_kwargs: dict[str, Any] | None = None,
    precision: str | None = None,
) -> tuple[Recording, RunResults | None]:
    """Run the energy and its gradient once on x [n, ...] and record what they compute.

    The run cannot change x: every operator is refused before it writes to the states. With a half
    ``precision`` the run is under autocast, and there is no graph. The results are None if the run
    cannot be repeated from a recording. State of modules, objects and globals that the run changes
    is restored. If x is empty, one chain of zeros is run.
    """
    owner = getattr(energy, "__self__", None)
    if isinstance(owner, nn.Module) and getattr(energy, "__func__", None) is type(owner).forward:
        energy = owner
    module = module_of(energy)
    reason = _refusal(() if module is None else module.named_modules())
    if reason is not None:
        return Recording(reason, reason, None, ran=False), None
    if not x.shape[0]:
        x = x.new_zeros((1, *x.shape[1:]))
    return _record(energy, x, model_kwargs or {}, precision)


def no_hooks() -> contextlib.AbstractContextManager[None]:
    """Return a context that hides the caller's saved-tensor hooks.

    A checkpoint around a chain counts the tensors that its hooks see. That number must not depend
    on whether the energy is recorded in this call or was recorded before.
    """
    autograd: Any = torch._C._autograd
    if not autograd._saved_tensors_hooks_is_enabled():
        return contextlib.nullcontext()
    top = getattr(autograd, "_top_saved_tensors_default_hooks", None)  # not in every torch
    if top is not None and top(True) is None:
        # Hooks would keep alive what the backward pass does not read, such as the values of an
        # encoder: a saved output then refers to its node, and that to the output.
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def _refusal(modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """Return why an energy cannot be recorded, if its modules show it before it is run."""
    if global_hooks():
        return "global module hooks are set"
    for name, module in modules:
        called = f"{type(module).__name__} {name!r}" if name else type(module).__name__
        for hooks in HOOKS:
            for hook in getattr(module, hooks).values():
                if type(hook) not in _WEIGHT_HOOKS:
                    return f"{called} has hooks"
                if module.training and isinstance(hook, SpectralNorm):
                    return f"{called} has hooks of spectral_norm in train mode"
        if isinstance(module, torch.jit.ScriptModule) or "_orig_mod" in module._modules:
            return f"{called} is compiled"
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd):
            return f"{called} is in train mode"
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{called} is in train mode"
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and type(tensor) not in (Tensor, nn.Parameter):
                return f"a parameter is a {type(tensor).__name__}"
    return None


# Hooks of torch that compute a weight before each forward pass and set it as an attribute.
_WEIGHT_HOOKS = (SpectralNorm, WeightNorm)


class _Refused(Exception):
    """Ends a run that cannot be recorded."""


class _Refusals:
    """Keeps the first reason why a run cannot be recorded; the energy may catch the error."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __call__(self, reason: str) -> Exception:
        self.reason = self.reason or reason
        return _Refused(reason)


def _record(
    energy: Callable[..., Any],
    x: Tensor,
    model_kwargs: dict[str, Any],
    precision: str | None,
    copy: bool = False,
) -> tuple[Recording, RunResults | None]:
    refuse, snapshot = _Refusals(), Snapshot()
    try:
        dtype = _entering_dtype(energy, x, model_kwargs)
    except Exception as error:
        reason = f"it raises {type(error).__name__}: {error}"
        return Recording(reason, reason, None), None
    leaf = x.detach().to(dtype, copy=copy or x.is_inference()).requires_grad_()
    snapshot.add(energy, getattr(energy, "__name__", type(energy).__name__))
    if snapshot.unknown is not None:
        return Recording(snapshot.unknown, snapshot.unknown, None), None
    tracer, watch = Tracer(leaf, refuse), Watch(snapshot, refuse)
    recorder = _recorder(energy, leaf, precision, tracer, model_kwargs)
    values = Values(refuse, tracer.reads_state, lambda: recorder.stop("a tensor has hooks"))

    def replaces(before: Tensor, now: Tensor) -> bool:
        return tracer.replaces(before, now, id(before) in values.passed)

    tracer.prepare()  # it would be slow under the watch
    tracer.watch, tracer.observe = watch, recorder.see
    graph: Graph | str = ""
    trace: Trace | str = ""
    results = None
    try:
        with (
            torch.enable_grad(),  # autograd's graph shows what the operators do not
            no_hooks(),
            tracer,
            values,
            watch,
        ):
            with _autocast(precision, x.device):
                out = energy(leaf, **model_kwargs)
            tracer.observe = None
            n = leaf.shape[0]
            if not isinstance(out, Tensor) or out.numel() != n or (out.ndim and len(out) != n):
                reason = recorder.unsupported or _shape_reason(out, leaf)
                raise refuse(reason)
            if not out.requires_grad:
                raise refuse("its output does not depend on the state through autograd")
            (grad,) = torch.autograd.grad(out.sum(), leaf, allow_unused=True)
        try:
            graph = recorder.graph(out)
        except Unsupported as error:
            graph = str(error)
        trace = "autograd finds no gradient" if grad is None else tracer.trace(out, grad)
        if isinstance(trace, Trace):
            trace = replace(trace.with_arguments(model_kwargs), is_autocast=precision in HALVES)
            graph = _with_computed(graph, trace)
        results = RunResults(leaf.detach(), _alone(out), None if grad is None else _alone(grad))
        # Weights and activations that every run keeps as attributes, without reading the last ones.
        snapshot.put_back_tensors(replaces)
        changed = watch.changed() or _refusal(("", module) for module in snapshot.modules)
        if changed is not None:
            refuse(changed)
    except Exception as error:
        refuse(f"it raises {type(error).__name__}: {error}")
    finally:
        snapshot.put_back_tensors(replaces)
        watch.restore()
        tracer.watch = tracer.observe = None  # no cycle keeps the run's tensors alive
    if tracer.meets_state and not copy:
        # The energy also reads x as a constant, and the two must be told apart.
        return _record(energy, x, model_kwargs, precision, copy=True)
    hidden = values.copied or watch.reads_unsaved
    may_keep = not hidden and may_be_kept(snapshot, model_kwargs, tracer.leaves)
    if tracer.keeps_values and not may_keep:
        # It may read them by a tensor that is not known, such as their ``grad``.
        refuse("it keeps tensors computed from the states, and what it reads cannot be told")
    if refuse.reason is not None:
        graph = trace = refuse.reason
        results = None
    numbers = None
    if tracer.numbers and isinstance(trace, Trace):
        numbers = ReadNumbers(trace, tracer.numbers)
    guard = None
    if may_keep:
        guard = Guard(energy, x, model_kwargs, snapshot, tracer.leaves, numbers)
    return Recording(graph, trace, guard, keeps_values=tracer.keeps_values), results


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor that keeps no other values alive, as those that it is a view of."""
    tensor = tensor.detach()
    return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()


def _recorder(
    energy: Callable[..., Any],
    leaf: Tensor,
    precision: str | None,
    tracer: Tracer,
    model_kwargs: dict[str, Any],
) -> OperatorRecorder:
    module = module_of(energy)
    tensors = () if module is None else (*module.parameters(), *module.buffers())
    arguments = tuple(value for value in model_kwargs.values() if isinstance(value, Tensor))
    recorder = OperatorRecorder(leaf, tensors, tracer, arguments)
    if module is None:
        recorder.stop(f"the energy is a {type(energy).__name__}, not an nn.Module; wrap it in one")
    elif precision in HALVES:
        recorder.stop("the run is under autocast")
    return recorder


def _autocast(precision: str | None, device: torch.device) -> torch.autocast:
    """Return the context of the forward pass; a cache would hide the casts of the weights."""
    half = HALVES.get(precision or "")
    return torch.autocast(device.type, half, enabled=half is not None, cache_enabled=False)


def _with_computed(graph: Graph | str, trace: Trace) -> Graph | str:
    """Return a graph that can compute those of its constants that the energy computes."""
    if isinstance(graph, str):
        return graph
    targets: dict[int, Tensor] = {}
    of_chains: list[int] = []
    for node in graph.nodes:
        for constant in node.constants:
            if constant is not None and constant.slot is not None:
                if node.kind == "constant":
                    of_chains.append(constant.slot)
                else:
                    targets[constant.slot] = constant.base
    if of_chains:
        graph = replace(graph, in_calls=Constants(trace, list(dict.fromkeys(of_chains))))
    if not targets:
        return graph
    computed = ComputedConstants(trace, targets)
    if computed.reads_arguments:
        return "a weight depends on an argument of the call"
    return replace(graph, computed=computed)


def _shape_reason(out: Any, leaf: Tensor) -> str:
    if not isinstance(out, Tensor):
        return f"its output is a {type(out).__name__}, not a tensor"
    return f"its output has shape {list(out.shape)} for {leaf.shape[0]} chains"


def _entering_dtype(
    energy: Callable[..., Any], x: Tensor, model_kwargs: dict[str, Any]
) -> torch.dtype:
    """Return the dtype in which x enters the energy, which is run if it may not be x's own."""
    if network_dtype(energy, x.dtype) == x.dtype:
        return x.dtype
    network = Network(energy)
    with left_as_found(energy, x.device), torch.no_grad():
        network(x.clone(), **model_kwargs)  # no operator is refused here
    return network.dtype or x.dtype
