"""Reads off one run of an energy what it computes.

The recorder sees the operators themselves, so that any way of writing a network is as good as
another (modules, functions, operators), and nothing is guessed from the names of modules.

A recording holds for batches of its own size. There each operator is known to treat the first
dimension, of n chains, row by row: elementwise, over other dimensions, or as a view that keeps the
elements' order and a first dimension of n. It then does so whatever other dimensions may equal n.
"""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlangevin.gradients.autograd import entering_dtype
from fastlangevin.gradients.graph.aten_ops import OPERATORS
from fastlangevin.gradients.graph.ir import HOOKS, Constant, Graph, Node, fingerprint, global_hooks
from fastlangevin.gradients.graph.snapshot import Snapshot
from fastlangevin.gradients.graph.watch import Values, Watch


class Recording(NamedTuple):
    """A graph, and autograd's own of the same run, from which :mod:`proof` takes gradients."""

    graph: Graph
    start: Tensor  # the states, a leaf
    out: Tensor  # the energy's output


def recognise(
    energy: Callable[..., Tensor], x: Tensor, model_kwargs: dict[str, Any] | None = None
) -> Graph | str:
    """The graph of an energy on the states x [n, ...], or why there is none."""
    found = record(energy, x, model_kwargs)
    return found if isinstance(found, str) else found.graph


def record(
    energy: Callable[..., Tensor], x: Tensor, model_kwargs: dict[str, Any] | None = None
) -> Recording | str:
    """Run the energy once, on a copy of x [n, ...], and take down what it computes.

    Returns why not, where that is not all there is to it. State of modules, objects and globals
    that the run changes is put back. For an empty x one chain of zeros is run.
    """
    owner = getattr(energy, "__self__", None)
    if isinstance(owner, nn.Module) and getattr(energy, "__func__", None) is type(owner).forward:
        energy = owner
    if not isinstance(energy, nn.Module):
        kind = type(energy).__name__
        return f"the energy is a {kind}, which cannot be looked into; give the nn.Module itself"
    reason = _why_not(energy)
    if reason is not None:
        return reason
    return _record(energy, x if x.shape[0] else x.new_zeros((1, *x.shape[1:])), model_kwargs or {})


def _why_not(energy: nn.Module) -> str | None:
    """What can be said against an energy without running it."""
    if global_hooks():
        return "global module hooks are set"
    for name, module in energy.named_modules():
        called = f"{type(module).__name__} {name!r}" if name else type(module).__name__
        if any(getattr(module, hooks) for hooks in HOOKS):
            return f"{called} has hooks"
        if isinstance(module, torch.jit.ScriptModule) or "_orig_mod" in module._modules:
            return f"{called} is compiled"
        if module.training and isinstance(module, _DROPOUT):
            return f"{called} is in train mode"
        if isinstance(module, _BATCH_NORM):
            mode = "in train mode" if module.training else "not supported"
            return f"{called} is {mode}"
    for tensor in (*energy.parameters(), *energy.buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"a parameter is a {type(tensor).__name__}"
    return None


_DROPOUT = (nn.modules.dropout._DropoutNd,)
_BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)


class _Unrecognised(Exception):
    pass


def _record(energy: nn.Module, x: Tensor, model_kwargs: dict[str, Any]) -> Recording | str:
    try:
        dtype = entering_dtype(energy, x, model_kwargs)
    except Exception as error:
        return f"it raises {type(error).__name__}: {error}"
    start = x.detach().to(dtype, copy=True).requires_grad_()
    recorder = Recorder(start, (*energy.parameters(), *energy.buffers()))
    state = Snapshot()
    state.add(energy, type(energy).__name__)
    if state.unknown is not None:
        return state.unknown
    # The first operator under a dispatch mode imports this, which takes longer when it is watched.
    importlib.import_module("torch._dynamo")
    try:
        with (
            torch.autocast(x.device.type, enabled=False),
            torch.enable_grad(),  # the graph that autograd makes shows what operators do not
            no_hooks(),
            recorder,
            Values(recorder.refuse, recorder.reads_state),
            Watch(state, recorder.refuse) as recorder.watch,
        ):
            out = energy(start, **model_kwargs)
        changed = state.changed()
        if changed is not None:
            raise recorder.refuse(f"a run of it changes {changed}")
        known = None if model_kwargs else fingerprint(energy, x)
        graph = recorder.graph(out, x, known, tuple(energy.modules()))
        return Recording(graph, start, out)
    except Exception as error:
        if recorder.reason is not None:
            return recorder.reason
        return f"it raises {type(error).__name__}: {error}"
    finally:
        state.restore()
        recorder.watch, recorder.held = None, []  # no cycle keeps a run's tensors alive


def no_hooks() -> contextlib.AbstractContextManager[None]:
    """No saved-tensor hooks of the caller's: a checkpoint around a chain counts what they see, and
    a graph that is known is not recorded again."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


class Recorder(TorchDispatchMode):
    """Takes down every operator that reads the state, and refuses before what it does not know."""

    def __init__(self, start: Tensor, tensors: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.rows = start.shape[0]
        self.start = start
        self.nodes: list[Node] = []
        self.values = {id(start): 0}
        self.constants = {
            id(t): Constant(t, tuple(t.shape), t.stride(), 0) for t in tensors if t.layout is _DENSE
        }
        self.spoilt: dict[int, str] = {}  # tensors that must not be read again, and why
        self.held = [start]  # tensors are told apart by their ids
        self.reason: str | None = None
        self.watch: Watch | None = None

    def refuse(self, reason: str) -> _Unrecognised:
        self.reason = self.reason or reason
        return _Unrecognised(reason)

    def reads_state(self, tensor: Tensor) -> bool:
        return id(tensor) in self.values or id(tensor) in self.spoilt

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.watch is None:
            return self.describe(func, args, kwargs or {})
        with self.watch.paused():  # it would follow this class's code too
            return self.describe(func, args, kwargs or {})

    def describe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        tensors = [a for a in _flat((*args, *kwargs.values())) if isinstance(a, Tensor)]
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self.refuse(f"{name} draws random numbers")
        if name in ("_local_scalar_dense", "equal"):
            raise self.refuse(f"{name} reads a tensor's value into Python")
        if not any(map(self.reads_state, tensors)):
            return self.aside(func, name, args, kwargs)
        for tensor in tensors:
            if id(tensor) in self.spoilt:
                raise self.refuse(self.spoilt[id(tensor)])
        if not torch.is_grad_enabled():
            raise self.refuse(f"{name} runs under torch.no_grad, or in a torch.autograd.Function")
        if name == "detach":
            # Autograd itself makes such copies, which nothing reads.
            out = func(*args, **kwargs)
            self.spoilt[id(out)] = "part of it is detached"
            self.held.append(out)
            return out
        describe = OPERATORS.get(name)
        if describe is None:
            raise self.refuse(f"{name} is not supported")
        out = func(*args, **kwargs)
        # The energy of a single chain may be of no dimension at all.
        if not isinstance(out, Tensor) or (out.shape[0] if out.ndim else 1) != self.rows:
            raise self.refuse(f"{name} mixes chains")
        described = describe(self, name, _named(func, args, kwargs), out)
        if out is args[0]:
            self.spoil_aliases(out, name)
        self.held.append(out)
        if described is None:
            self.values[id(out)] = self.values[id(args[0])]
            return out
        self.nodes.append(described)
        self.values[id(out)] = len(self.nodes)
        return out

    def aside(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator that does not read the state."""
        if func._schema.is_mutable:
            raise self.refuse(f"{name} changes a tensor in place")
        out = func(*args, **kwargs)
        self.held += [tensor for tensor in _flat((out,)) if isinstance(tensor, Tensor)]
        if isinstance(out, Tensor):
            base = self.constants.get(id(args[0])) if args else None
            returned = func._schema.returns[0].alias_info
            if base is not None and returned is not None and out.dtype == base.base.dtype:
                offset = int(out.storage_offset() - base.base.storage_offset())
                self.constants[id(out)] = Constant(
                    base.base, tuple(out.shape), out.stride(), offset
                )
        return out

    def spoil_aliases(self, changed: Tensor, name: str) -> None:
        storage = changed.untyped_storage().data_ptr()
        for tensor in self.held:
            if tensor is not changed and tensor.untyped_storage().data_ptr() == storage:
                self.spoilt[id(tensor)] = f"{name} changes a view of a tensor that is read again"

    def value(self, tensor: Any, name: str) -> int:
        if not isinstance(tensor, Tensor) or id(tensor) not in self.values:
            raise self.refuse(f"{name} is supported between results of the state alone")
        return self.values[id(tensor)]

    def constant(self, tensor: Any, name: str) -> Constant | None:
        if tensor is None:
            return None
        if id(tensor) in self.constants:
            found = self.constants[id(tensor)]
            if tensor.dtype == self.start.dtype and tensor.device == self.start.device:
                return found
            raise self.refuse(f"{name} reads a parameter of another dtype or device")
        computed = any(tensor is held for held in self.held)
        raise self.refuse(
            f"{name} reads a weight that is computed (a parametrisation?)"
            if computed
            else f"{name} reads a tensor that is neither a parameter nor a buffer"
        )

    def graph(self, out: Any, x: Tensor, known: Any, held: tuple[Any, ...]) -> Graph:
        if self.reason is not None:  # raised, and caught by the energy
            raise self.refuse(self.reason)
        if not isinstance(out, Tensor) or id(out) in self.spoilt:
            raise self.refuse("its output is not a tensor computed from the state")
        value = self.value(out, "its output")
        if out.numel() != self.rows:
            raise self.refuse(f"its output has shape {list(out.shape)} for {self.rows} chains")
        if any(tensor._backward_hooks for tensor in self.held):
            raise self.refuse("a tensor has hooks")
        if _has_custom_function(out):
            raise self.refuse("a torch.autograd.Function has a gradient of its own")
        nodes = _live(self.nodes, value)
        if not nodes:
            raise self.refuse("its output is the state itself")
        bases = tuple(c.base for node in nodes for c in node.constants if c is not None)
        dtype = self.start.dtype
        shape = tuple(x.shape[1:])
        return Graph(self.rows, shape, dtype, x.device, nodes, known, (*held, *bases))


_DENSE = torch.strided


def _live(nodes: list[Node], output: int) -> tuple[Node, ...]:
    """The nodes that the output depends on, numbered anew."""
    wanted = {output}
    for k in range(output, 0, -1):
        if k in wanted:
            wanted.update(nodes[k - 1].inputs)
    kept = [k for k in range(1, output + 1) if k in wanted]
    number = {0: 0} | {k: i + 1 for i, k in enumerate(kept)}
    return tuple(
        Node(n.kind, tuple(number[i] for i in n.inputs), n.shape, n.settings, n.constants)
        for n in (nodes[k - 1] for k in kept)
    )


def _has_custom_function(out: Tensor) -> bool:
    nodes, seen = [out.grad_fn], {out.grad_fn}
    while nodes:
        node = nodes.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        for following, _ in node.next_functions if node is not None else ():
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return False


def _flat(arguments: Any) -> list[Any]:
    found: list[Any] = []
    for argument in arguments:
        found += argument if isinstance(argument, (list, tuple)) else [argument]
    return found


def _named(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """An operator's arguments by name, with its defaults."""
    schema = func._schema.arguments
    named = {a.name: a.default_value for a in schema if a.has_default_value()}
    return named | dict(zip((a.name for a in schema), args, strict=False)) | kwargs
