"""What an energy computes, as a graph of the operations that lean scores know."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from fastlangevin.kernels.memory import in_memory

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)


@dataclass(frozen=True)
class Constant:
    """A parameter or buffer of the energy, or a plain view of one, read where it lies."""

    base: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self, detach: bool = True) -> Tensor:
        base = self.base.detach() if detach else self.base
        if base.shape == self.size and base.stride() == self.stride:
            return base
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)

    @property
    def key(self) -> tuple[Any, ...]:
        return id(self.base), self.size, self.stride, self.offset


@dataclass(frozen=True)
class Node:
    """One operation on whole batches that treats every chain alike and by itself.

    kind: conv (stride, padding, dilation, groups), linear, add (factor of the second), view, mean
    and sum (dims, keepdim), avg_pool (kernel, stride, padding, ceil, count padding, divisor), scale
    (factor), or an activation by name. conv and linear have their weight [out, in, ...] and bias.
    """

    kind: str
    inputs: tuple[int, ...]  # 0 is the state, k + 1 the output of node k
    shape: tuple[int, ...]  # of its output, of one chain
    settings: tuple[Any, ...] = ()
    constants: tuple[Constant | None, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        constants = tuple(None if c is None else c.key for c in self.constants)
        return self.kind, self.inputs, self.shape, self.settings, constants


@dataclass(frozen=True)
class Graph:
    """An energy as nodes in topological order; the last one's output is the energy, one number."""

    chains: int  # n, for which it holds: an energy may compute another thing for another n
    shape: tuple[int, ...]  # of one chain's state
    dtype: torch.dtype  # the state enters the network in
    device: torch.device
    nodes: tuple[Node, ...]
    fingerprint: tuple[Any, ...] | None = None
    held: tuple[Any, ...] = field(default=(), repr=False)  # whose ids are in the fingerprint

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal keys: the same operations on the same parameters."""
        place = self.chains, self.shape, self.dtype, self.device
        return *place, tuple(node.key for node in self.nodes)

    @property
    def bases(self) -> list[Tensor]:
        """The parameters and buffers that are read, each once."""
        found = {id(c.base): c.base for node in self.nodes for c in node.constants if c is not None}
        return list(found.values())

    def input_shape(self, node: Node, which: int = 0) -> tuple[int, ...]:
        value = node.inputs[which]
        return self.nodes[value - 1].shape if value else self.shape

    def is_current(self, energy: Callable[..., Tensor], x: Tensor) -> bool:
        """Whether a recording of this energy on such an x would be the same."""
        return (
            self.fingerprint is not None
            and isinstance(energy, nn.Module)
            and self.fingerprint == fingerprint(energy, x)
        )


def global_hooks() -> bool:
    return any(getattr(_module, name) for name in _GLOBAL_HOOKS)


def fingerprint(energy: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
    """All that a recording depends on, cheap to compare; None where that cannot be known.

    Parameters count by identity and place: their values are read at every run.
    """
    found: list[Any] = [x.shape, x.dtype, x.device]
    if global_hooks():
        return None
    for module in energy.modules():
        kind = type(module)
        # Code of others may read anything: class attributes, globals. It is recorded at every call.
        if not kind.__module__.startswith(("torch.nn.", "fastlangevin.")):
            return None
        found += (kind, id(module), kind.forward)
        for name, value in module.__dict__.items():
            kind = type(value)
            if kind in _SIMPLE:
                found += (name, value)
            elif name == "_parameters" or name == "_buffers":
                for tensor in value.values():
                    if tensor is not None:
                        # functional_call's: of one call alone.
                        if tensor.grad_fn is not None or not in_memory(tensor):
                            return None
                        place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
                        found += (id(tensor), *place)
            elif name == "_modules":
                found += [(key, id(child)) for key, child in value.items()]
            elif kind is tuple or kind is list:
                if any(type(item) not in _SIMPLE for item in value):
                    return None
                found += (name, tuple(value))
            elif name in HOOKS:
                if value:
                    return None
            elif name not in _OWN:
                return None
    return tuple(found)


_SIMPLE = frozenset((int, float, bool, str, type(None), torch.dtype))
_OWN = frozenset(nn.Module().__dict__)  # every module's own tables, which hold no settings
