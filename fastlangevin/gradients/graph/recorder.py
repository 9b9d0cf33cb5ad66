"""The dispatch mode that records the operators of a run."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlangevin.gradients.graph.aten_ops import OPERATORS
from fastlangevin.gradients.graph.ir import Constant, Graph, Node
from fastlangevin.gradients.graph.watch import Watch


class _Refused(Exception):
    """Ends a run that cannot be recorded."""


class OperatorRecorder(TorchDispatchMode):
    """Records every operator that reads the state, and refuses the operators that it lacks.

    ``leaf``: the states [n, ...] of the run. ``constants``: the energy's parameters and buffers.
    """

    def __init__(self, leaf: Tensor, constants: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.chains = leaf.shape[0]
        self.leaf = leaf
        self.nodes: list[Node] = []
        self.values = {id(leaf): 0}
        self.constants = {
            id(tensor): Constant(tensor, tuple(tensor.shape), tensor.stride(), 0)
            for tensor in constants
            if tensor.layout is torch.strided
        }
        self.spoilt: dict[int, str] = {}  # tensors that must not be read again, with the reason
        self.tensors = [leaf]  # kept alive, since tensors are told apart by their ids
        self.reason: str | None = None
        self.watch: Watch | None = None

    def refuse(self, reason: str) -> Exception:
        """Note the first reason why the run cannot be recorded, and return the error to raise."""
        self.reason = self.reason or reason
        return _Refused(reason)

    def reads_state(self, tensor: Tensor) -> bool:
        """Return whether a tensor is computed from the states."""
        return id(tensor) in self.values or id(tensor) in self.spoilt

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.watch is None:
            return self._run(func, args, kwargs or {})
        with self.watch.paused():  # otherwise it would follow the code of this class
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator and record it if it reads the state."""
        name = func._schema.name.removeprefix("aten::")
        tensors = [a for a in _flat((*args, *kwargs.values())) if isinstance(a, Tensor)]
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self.refuse(f"{name} draws random numbers")
        if name in ("_local_scalar_dense", "equal"):
            raise self.refuse(f"{name} reads a tensor's value into Python")
        if not any(map(self.reads_state, tensors)):
            return self._run_on_constants(func, name, args, kwargs)
        for tensor in tensors:
            if id(tensor) in self.spoilt:
                raise self.refuse(self.spoilt[id(tensor)])
        if not torch.is_grad_enabled():
            raise self.refuse(f"{name} runs under torch.no_grad, or in a torch.autograd.Function")
        if name == "detach":
            # Autograd makes detached copies itself, which nothing reads.
            out = func(*args, **kwargs)
            self.spoilt[id(out)] = "part of it is detached"
            self.tensors.append(out)
            return out
        describe = OPERATORS.get(name)
        if describe is None:
            raise self.refuse(f"{name} is not supported")
        out = func(*args, **kwargs)
        # The energy of a single chain may have no dimension at all.
        if not isinstance(out, Tensor) or (out.shape[0] if out.ndim else 1) != self.chains:
            raise self.refuse(f"{name} mixes chains")
        node = describe(self, name, _named(func, args, kwargs), out)
        if out is args[0]:
            self._spoil_aliases(out, name)
        self.tensors.append(out)
        if node is None:
            self.values[id(out)] = self.values[id(args[0])]
            return out
        self.nodes.append(node)
        self.values[id(out)] = len(self.nodes)
        return out

    def _run_on_constants(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run an operator that does not read the state; views of constants are constants."""
        if func._schema.is_mutable:
            raise self.refuse(f"{name} changes a tensor in place")
        out = func(*args, **kwargs)
        self.tensors += [tensor for tensor in _flat((out,)) if isinstance(tensor, Tensor)]
        if isinstance(out, Tensor):
            viewed = self.constants.get(id(args[0])) if args else None
            alias = func._schema.returns[0].alias_info
            if viewed is not None and alias is not None and out.dtype == viewed.base.dtype:
                offset = int(out.storage_offset() - viewed.base.storage_offset())
                self.constants[id(out)] = Constant(
                    viewed.base, tuple(out.shape), out.stride(), offset
                )
        return out

    def _spoil_aliases(self, changed: Tensor, name: str) -> None:
        storage = changed.untyped_storage().data_ptr()
        for tensor in self.tensors:
            if tensor is not changed and tensor.untyped_storage().data_ptr() == storage:
                self.spoilt[id(tensor)] = f"{name} changes a view of a tensor that is read again"

    def value(self, tensor: Any, name: str) -> int:
        """Return the number of a value that is computed from the states; refuse other tensors."""
        if not isinstance(tensor, Tensor) or id(tensor) not in self.values:
            raise self.refuse(f"{name} is supported only between results of the state")
        return self.values[id(tensor)]

    def constant(self, tensor: Any, name: str) -> Constant | None:
        """Return the constant of a parameter, a buffer or a view of one, and None for None."""
        if tensor is None:
            return None
        if id(tensor) in self.constants:
            if tensor.dtype == self.leaf.dtype and tensor.device == self.leaf.device:
                return self.constants[id(tensor)]
            raise self.refuse(f"{name} reads a parameter of another dtype or device")
        computed = any(tensor is other for other in self.tensors)
        raise self.refuse(
            f"{name} reads a weight that is computed (a parametrisation?)"
            if computed
            else f"{name} reads a tensor that is neither a parameter nor a buffer"
        )

    def graph(
        self, out: Any, fingerprint: tuple[Any, ...] | None, modules: tuple[Any, ...]
    ) -> Graph:
        """Return the graph whose output is ``out``, the energies."""
        if self.reason is not None:  # it was raised, and the energy caught it
            raise self.refuse(self.reason)
        if not isinstance(out, Tensor) or id(out) in self.spoilt:
            raise self.refuse("its output is not a tensor computed from the state")
        value = self.value(out, "its output")
        if out.numel() != self.chains:
            raise self.refuse(f"its output has shape {list(out.shape)} for {self.chains} chains")
        if any(tensor._backward_hooks for tensor in self.tensors):
            raise self.refuse("a tensor has hooks")
        if _has_custom_function(out):
            raise self.refuse("a torch.autograd.Function has a gradient of its own")
        nodes = _live(self.nodes, value)
        if not nodes:
            raise self.refuse("its output is the state itself")
        bases = tuple(c.base for node in nodes for c in node.constants if c is not None)
        leaf, shape = self.leaf, tuple(self.leaf.shape[1:])
        return Graph(
            self.chains, shape, leaf.dtype, leaf.device, nodes, fingerprint, (*modules, *bases)
        )


def _live(nodes: list[Node], output: int) -> tuple[Node, ...]:
    """Return the nodes that the output depends on, renumbered."""
    needed = {output}
    for k in range(output, 0, -1):
        if k in needed:
            needed.update(nodes[k - 1].inputs)
    live = [k for k in range(1, output + 1) if k in needed]
    number = {0: 0} | {k: i + 1 for i, k in enumerate(live)}
    return tuple(
        Node(n.kind, tuple(number[i] for i in n.inputs), n.shape, n.settings, n.constants)
        for n in (nodes[k - 1] for k in live)
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
    flat: list[Any] = []
    for argument in arguments:
        flat += argument if isinstance(argument, (list, tuple)) else [argument]
    return flat


def _named(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return an operator's arguments by name, with its defaults."""
    schema = func._schema.arguments
    named = {a.name: a.default_value for a in schema if a.has_default_value()}
    return named | dict(zip((a.name for a in schema), args, strict=False)) | kwargs
