"""Describes the operators of an energy as the nodes of a graph, while they run."""

import math
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlangevin.gradients.autograd import nodes_of
from fastlangevin.gradients.graph.aten_ops import OPERATORS, VIEWS, weight_and_bias
from fastlangevin.gradients.graph.ir import Constant, Graph, Node


class Unsupported(Exception):
    """The reason why a graph cannot hold what the energy computes."""


class Slots(Protocol):
    """The tensors of a run by the numbers of their slots."""

    def slot_of(self, tensor: Tensor) -> int:
        """Return the slot of a tensor."""

    def sharing(self, slot: int) -> list[int]:
        """Return the slots of the tensors that have the memory of a slot's tensor."""


class OperatorRecorder:
    """Makes a node of every operator that reads the state.

    It stops at the first operator that it lacks, and ``unsupported`` says why. ``leaf``: the states
    [n, ...] of the run. ``constants``: the energy's parameters and buffers. ``slots`` tells the
    tensors of the run apart. ``arguments`` are those of the call that are tensors. No tensor is
    kept alive that the run frees. :class:`~fastlangevin.gradients.graph.aten_ops.Operands` says
    what the methods do that describe operators.
    """

    def __init__(
        self,
        leaf: Tensor,
        constants: tuple[Tensor, ...],
        slots: Slots,
        arguments: tuple[Tensor, ...] = (),
    ) -> None:
        self.chains = leaf.shape[0]
        self.leaf = leaf
        self.nodes: list[Node] = []
        self.slots = slots
        self.values = {slots.slot_of(leaf): 0}  # by slot
        self.spoilt: dict[int, str] = {}  # slots that must not be read again, with the reason
        self.unsupported: str | None = None
        self._parameters = {id(t): t for t in constants if t.layout is torch.strided}
        self._constants: dict[int, Constant] = {}  # by slot, views of parameters and computed ones
        self._computed: set[int] = set()  # slots of tensors computed without the states
        self._arguments = {id(t) for t in arguments} - self._parameters.keys()
        self._of_arguments: set[int] = set()  # slots of what is computed from them
        # How torch writes an instance norm: as a batch norm of one image with all chains' channels,
        # whose weights are repeated for each chain. By slot, values in this form and the weights.
        self._joined: dict[int, int] = {}
        self._repeated: dict[int, Constant] = {}
        # How torch writes a linear layer over the last dimension: as a product with the rows of
        # all chains. By slot, values whose chains share the first dimension with others.
        self._rows: dict[int, int] = {}

    def refuse(self, reason: str) -> Exception:
        """Return the error to raise for what a graph cannot hold."""
        return Unsupported(reason)

    def stop(self, reason: str) -> None:
        """Note why there is no graph, and keep nothing."""
        self.unsupported = self.unsupported or reason
        self.nodes, self.values, self.spoilt = [], {}, {}

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Describe an operator that has run."""
        if self.unsupported is not None:
            return
        name = func._schema.name.removeprefix("aten::")
        try:
            self._see(func, name, args, kwargs, out)
        except Unsupported as error:
            self.stop(str(error))

    def _see(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        tensors = [a for a in _flat((*args, *kwargs.values())) if isinstance(a, Tensor)]
        read = [self.slots.slot_of(tensor) for tensor in tensors]
        moving = {*self.values, *self.spoilt, *self._joined, *self._rows}
        if moving.isdisjoint(read):
            self._see_constants(func, name, args, out, tensors)
            return
        if name == "detach":
            # Autograd makes detached copies itself, which nothing reads.
            reason = self.spoilt.get(read[0], "part of it is detached")
            self.spoilt[self.slots.slot_of(out)] = reason
            return
        for slot in read:
            if slot in self.spoilt:
                raise self.refuse(self.spoilt[slot])
        if not torch.is_grad_enabled():
            raise self.refuse(f"{name} runs under torch.no_grad, or in a torch.autograd.Function")
        named = _named(func, args, kwargs)
        if self._see_instance_norm(name, named, out) or self._see_rows(name, named, out):
            return
        describe = OPERATORS.get(name)
        if describe is None:
            raise self.refuse(f"{name} is not supported")
        if func._schema.is_mutable and self.slots.slot_of(args[0]) not in self.values:
            raise self.refuse(f"{name} changes a tensor in place")
        if isinstance(out, tuple):
            # Norms and max pools also return tensors that only their backward passes read.
            out, *others = out
            for other in others:
                slot = self.slots.slot_of(other)
                self.spoilt[slot] = f"{name}'s other results are not supported"
        # The energy of a single chain may have no dimension at all.
        if not isinstance(out, Tensor) or (out.shape[0] if out.ndim else 1) != self.chains:
            raise self.refuse(f"{name} mixes chains")
        node = describe(self, name, named, out)
        written = self.slots.slot_of(out)
        if out is args[0]:
            self._spoil_aliases(written, name)
            self._joined.pop(written, None)
        if node is None:
            self.values[written] = self.value(args[0], name)
            return
        self.nodes.append(node)
        self.values[written] = len(self.nodes)

    def _see_instance_norm(self, name: str, a: dict[str, Any], out: Any) -> bool:
        """See an operator of an instance norm; return whether it is one."""
        tensor = a.get("self", a.get("input"))
        if not isinstance(tensor, Tensor):
            return False
        shape, slot = tuple(tensor.shape), self.slots.slot_of(tensor)
        joins = len(shape) > 2 and slot in self.values and shape[0] == self.chains
        if name == "view" and joins and tuple(out.shape) == (1, shape[0] * shape[1], *shape[2:]):
            self._joined[self.slots.slot_of(out)] = self.values[slot]
            # Of a single chain, this is no other shape.
            return self.chains > 1
        value = self._joined.get(slot)
        if value is None:
            return False
        each = (self.chains, shape[1] // self.chains, *shape[2:])
        if name == "view" and tuple(out.shape) == each:
            self.values[self.slots.slot_of(out)] = value
            return True
        if name != "native_batch_norm" or not a["training"] or a["running_mean"] is not None:
            return False
        weights = [a[key] for key in ("weight", "bias")]
        slots = [None if w is None else self.slots.slot_of(w) for w in weights]
        if any(slot is not None and slot not in self._repeated for slot in slots):
            return False
        constants = tuple(None if slot is None else self._repeated[slot] for slot in slots)
        settings = each[1], float(a["eps"])
        self.nodes.append(Node("group_norm", (value,), each[1:], settings, constants))
        normal, *others = map(self.slots.slot_of, out)
        self._joined[normal] = len(self.nodes)
        self.spoilt |= dict.fromkeys(others, f"{name}'s other results are not supported")
        if self.chains == 1:
            self.values[normal] = len(self.nodes)
        return True

    def _see_rows(self, name: str, a: dict[str, Any], out: Any) -> bool:
        """See an operator of a linear layer over the last dimension; return whether it is one."""
        tensor = a["mat1"] if name == "addmm" else a.get("self")
        if not isinstance(tensor, Tensor):
            return False
        slot = self.slots.slot_of(tensor)
        value = self._rows.get(slot, self.values.get(slot))
        if value is None:
            return False
        is_row = slot in self._rows
        if name == "bmm" or (is_row and name in ("addmm", "mm")):
            number = self._linear(name, a, value)
        elif name in VIEWS and tensor.ndim > 1 and out.ndim > 1:
            keeps_all = out.numel() == tensor.numel() and out.dtype == tensor.dtype
            of_chains = out.shape[0] == self.chains
            if not keeps_all or (of_chains and not is_row):
                return False
            number, shape = value, tuple(out.shape[1:])
            if of_chains and shape != self._shape(value):
                self.nodes.append(Node("view", (value,), shape))
                number = len(self.nodes)
            is_row = not of_chains
        else:
            return False
        (self._rows if is_row else self.values)[self.slots.slot_of(out)] = number
        return True

    def _linear(self, name: str, a: dict[str, Any], value: int) -> int:
        """Add a linear layer over the last dimension of a value, and return its number."""
        constants = weight_and_bias(self, name, a)
        written, read = constants[0].size
        shape = self._shape(value)
        if shape[-1:] != (read,):
            if not read or math.prod(shape) % read:
                raise self.refuse(f"{name} mixes chains")
            shape = math.prod(shape) // read, read
            self.nodes.append(Node("view", (value,), shape))
            value = len(self.nodes)
        self.nodes.append(Node("linear", (value,), (*shape[:-1], written), (), constants))
        return len(self.nodes)

    def _shape(self, value: int) -> tuple[int, ...]:
        return self.nodes[value - 1].shape if value else tuple(self.leaf.shape[1:])

    def _see_constants(
        self, func: Any, name: str, args: tuple[Any, ...], out: Any, read: list[Tensor]
    ) -> None:
        """See an operator that does not read the state; views of constants are constants."""
        new = [tensor for tensor in _flat((out,)) if isinstance(tensor, Tensor)]
        written = [self.slots.slot_of(tensor) for tensor in new]
        if func._schema.is_mutable:
            # Memory of the run's own may change until a node reads it.
            aliases = {alias for slot in written for alias in self.slots.sharing(slot)}
            if not aliases <= self._computed or not aliases.isdisjoint(self._constants):
                raise self.refuse(f"{name} changes a tensor in place")
        self._computed.update(written)
        if any(map(self.is_of_arguments, read)):
            self._of_arguments.update(written)
        if name == "repeat" and list(args[1]) == [self.chains]:
            repeated = self._known(args[0])
            if repeated is not None and out.dtype == self.leaf.dtype:
                self._repeated[self.slots.slot_of(out)] = repeated
        if isinstance(out, Tensor):
            viewed = self._known(args[0]) if args and isinstance(args[0], Tensor) else None
            alias = func._schema.returns[0].alias_info
            # A view of what is computed, or of an argument, has a slot of its own: the next
            # call's tensor may lie otherwise in its memory.
            if (
                viewed is not None
                and viewed.slot is None
                and alias is not None
                and out.dtype == viewed.base.dtype
            ):
                offset = int(out.storage_offset() - viewed.base.storage_offset())
                view = replace(viewed, size=tuple(out.shape), stride=out.stride(), offset=offset)
                self._constants[self.slots.slot_of(out)] = view

    def _spoil_aliases(self, changed: int, name: str) -> None:
        for slot in self.slots.sharing(changed):
            if slot != changed:
                self.spoilt[slot] = f"{name} changes a view of a tensor that is read again"

    def value(self, tensor: Any, name: str) -> int:
        slot = self.slots.slot_of(tensor) if isinstance(tensor, Tensor) else -1
        if slot in self._rows:
            raise self.refuse(f"{name} mixes chains")
        if slot not in self.values:
            raise self.refuse(f"{name} is supported only between results of the state")
        return self.values[slot]

    def is_value(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and self.slots.slot_of(tensor) in self.values

    def is_of_arguments(self, tensor: Tensor) -> bool:
        is_argument = id(tensor) in self._arguments
        return is_argument or self.slots.slot_of(tensor) in self._of_arguments

    def constant(
        self, tensor: Any, name: str, dtype: torch.dtype | None = None, shared: bool = True
    ) -> Constant | None:
        if tensor is None:
            return None
        constant, slot = self._known(tensor), self.slots.slot_of(tensor)
        is_argument = id(tensor) in self._arguments
        if constant is None and slot not in self._computed and not is_argument:
            raise self.refuse(f"{name} reads a tensor that is neither a parameter nor a buffer")
        if tensor.dtype != (dtype or self.leaf.dtype) or tensor.device != self.leaf.device:
            raise self.refuse(f"{name} reads a tensor of another dtype or device")
        if constant is None or (shared and constant.base.is_meta):
            if shared:
                base = tensor.detach().clone(memory_format=torch.contiguous_format)
            else:
                base = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            constant = Constant(base, tuple(base.shape), base.stride(), 0, slot)
            self._constants[slot] = constant
        return constant

    def _known(self, tensor: Tensor) -> Constant | None:
        """Return the constant of a parameter, a buffer, a view of one, or a known computed one."""
        if id(tensor) in self._parameters:
            return Constant(tensor, tuple(tensor.shape), tensor.stride(), 0)
        return self._constants.get(self.slots.slot_of(tensor))

    def graph(self, out: Any) -> Graph:
        """Return the graph whose output is ``out``, the energies."""
        if self.unsupported is not None:
            raise self.refuse(self.unsupported)
        if not isinstance(out, Tensor) or self.slots.slot_of(out) in self.spoilt:
            raise self.refuse("its output is not a tensor computed from the state")
        value = self.value(out, "its output")
        if out.numel() != self.chains:
            raise self.refuse(f"its output has shape {list(out.shape)} for {self.chains} chains")
        custom = torch.autograd.function.BackwardCFunction
        if any(isinstance(node, custom) for node in nodes_of(out)):
            raise self.refuse("a torch.autograd.Function has a gradient of its own")
        nodes = _live(self.nodes, value)
        if not nodes:
            raise self.refuse("its output is the state itself")
        leaf, shape = self.leaf, tuple(self.leaf.shape[1:])
        return Graph(self.chains, shape, leaf.dtype, leaf.device, nodes)


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
