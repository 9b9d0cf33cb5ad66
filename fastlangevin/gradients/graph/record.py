"""Records what an energy computes as a graph of operators, from one run of its code.

A recording sees the operators themselves, so it does not matter how a network is written (modules,
functions or operators), and nothing is inferred from the names of modules.

A recording holds for batches of its own size n. For that size, each supported operator is known to
treat the first dimension, of n chains, row by row: it is elementwise, works over other dimensions,
or is a view that keeps the order of the elements and a first dimension of n. This is true even if
another dimension equals n.
"""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlangevin.gradients.graph.ir import HOOKS, Graph, fingerprint, global_hooks
from fastlangevin.gradients.graph.recorder import OperatorRecorder
from fastlangevin.gradients.graph.snapshot import Snapshot
from fastlangevin.gradients.graph.watch import Values, Watch
from fastlangevin.gradients.network import Network, network_dtype
from fastlangevin.gradients.untouched import left_as_found


class RecordedRun(NamedTuple):
    """A graph, and the leaf and the output through which autograd differentiates the same run."""

    graph: Graph
    x: Tensor  # a copy of the states, which requires grad
    out: Tensor  # the energy's output


def recognise(
    energy: Callable[..., Tensor], x: Tensor, model_kwargs: dict[str, Any] | None = None
) -> Graph | str:
    """Return the graph of an energy on states x [n, ...], or the reason why there is none."""
    run = record(energy, x, model_kwargs)
    return run if isinstance(run, str) else run.graph


def record(
    energy: Callable[..., Tensor], x: Tensor, model_kwargs: dict[str, Any] | None = None
) -> RecordedRun | str:
    """Run the energy once on a copy of x [n, ...] and record what it computes.

    Returns a reason instead if a graph cannot hold everything that the run does. State of modules,
    objects and globals that the run changes is restored. If x is empty, one chain of zeros is run.
    """
    owner = getattr(energy, "__self__", None)
    if isinstance(owner, nn.Module) and getattr(energy, "__func__", None) is type(owner).forward:
        energy = owner
    if not isinstance(energy, nn.Module):
        kind = type(energy).__name__
        return f"the energy is a {kind}, which cannot be recorded; pass the nn.Module itself"
    reason = _refusal(energy)
    if reason is not None:
        return reason
    return _record(energy, x if x.shape[0] else x.new_zeros((1, *x.shape[1:])), model_kwargs or {})


def no_hooks() -> contextlib.AbstractContextManager[None]:
    """Return a context that hides the caller's saved-tensor hooks.

    A checkpoint around a chain counts the tensors that its hooks see. That number must not depend
    on whether the energy is recorded in this call or was recorded before.
    """
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def _refusal(energy: nn.Module) -> str | None:
    """Return why an energy cannot be recorded, if its modules show it before it is run."""
    if global_hooks():
        return "global module hooks are set"
    for name, module in energy.named_modules():
        called = f"{type(module).__name__} {name!r}" if name else type(module).__name__
        if any(getattr(module, hooks) for hooks in HOOKS):
            return f"{called} has hooks"
        if isinstance(module, torch.jit.ScriptModule) or "_orig_mod" in module._modules:
            return f"{called} is compiled"
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd):
            return f"{called} is in train mode"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            mode = "in train mode" if module.training else "not supported"
            return f"{called} is {mode}"
    for tensor in (*energy.parameters(), *energy.buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"a parameter is a {type(tensor).__name__}"
    return None


def _record(energy: nn.Module, x: Tensor, model_kwargs: dict[str, Any]) -> RecordedRun | str:
    try:
        dtype = _entering_dtype(energy, x, model_kwargs)
    except Exception as error:
        return f"it raises {type(error).__name__}: {error}"
    leaf = x.detach().to(dtype, copy=True).requires_grad_()
    recorder = OperatorRecorder(leaf, (*energy.parameters(), *energy.buffers()))
    snapshot = Snapshot()
    snapshot.add(energy, type(energy).__name__)
    if snapshot.unknown is not None:
        return snapshot.unknown
    watch = recorder.watch = Watch(snapshot, recorder.refuse)
    # The first operator under a dispatch mode imports this module; watching the import is slow.
    importlib.import_module("torch._dynamo")
    try:
        with (
            torch.autocast(x.device.type, enabled=False),
            torch.enable_grad(),  # autograd's graph shows what the operators do not
            no_hooks(),
            recorder,
            Values(recorder.refuse, recorder.reads_state),
            watch,
        ):
            out = energy(leaf, **model_kwargs)
        changed = watch.changed()
        if changed is not None:
            raise recorder.refuse(changed)
        key = None if model_kwargs else fingerprint(energy, x)
        graph = recorder.graph(out, key, tuple(energy.modules()))
        return RecordedRun(graph, leaf, out)
    except Exception as error:
        if recorder.reason is not None:
            return recorder.reason
        return f"it raises {type(error).__name__}: {error}"
    finally:
        watch.restore()
        recorder.watch, recorder.tensors = None, []  # no cycle keeps the run's tensors alive


def _entering_dtype(
    energy: Callable[..., Any], x: Tensor, model_kwargs: dict[str, Any]
) -> torch.dtype:
    """Return the dtype in which x enters the energy, which is run if it may not be x's own."""
    if network_dtype(energy, x.dtype) == x.dtype:
        return x.dtype
    network = Network(energy)
    with left_as_found(energy, x.device), torch.no_grad():
        network(x, **model_kwargs)
    return network.dtype or x.dtype
