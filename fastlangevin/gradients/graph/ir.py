"""The graph of operations that an energy computes."""

import functools
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
    """A parameter or buffer of the energy, or a strided view of one, in its own memory."""

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
    """An operation on a batch that treats all chains in the same way and independently.

    ``kind`` (``settings``) is conv (stride, padding, dilation, groups), linear, add (factor of the
    second input), view, mean, sum or logsumexp (dims, keepdim), avg_pool (kernel, stride, padding,
    ceil_mode, count_include_pad, divisor), scale (factor), or the name of an activation. The
    ``constants`` of conv and linear are the weight [out, in, ...] and the bias.
    """

    kind: str
    inputs: tuple[int, ...]  # values: 0 is the state, k + 1 the output of nodes[k]
    shape: tuple[int, ...]  # shape of its output for one chain
    settings: tuple[Any, ...] = ()
    constants: tuple[Constant | None, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        constants = tuple(None if c is None else c.key for c in self.constants)
        return self.kind, self.inputs, self.shape, self.settings, constants


@dataclass(frozen=True)
class Graph:
    """An energy as nodes in topological order. The last one's output is the energy of a chain."""

    chains: int  # n of the recorded batch: for another n the energy may compute something else
    shape: tuple[int, ...]  # shape of one chain's state
    dtype: torch.dtype  # dtype in which the state enters the network
    device: torch.device
    nodes: tuple[Node, ...]
    fingerprint: tuple[Any, ...] | None = None
    owners: tuple[Any, ...] = field(default=(), repr=False)  # keeps the ids in the keys valid

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for graphs of the same operations on the same parameters."""
        nodes = tuple(node.key for node in self.nodes)
        return self.chains, self.shape, self.dtype, self.device, nodes

    @functools.cached_property
    def bases(self) -> list[Tensor]:
        """The parameters and buffers that the nodes read, without duplicates."""
        bases = {id(c.base): c.base for node in self.nodes for c in node.constants if c is not None}
        return list(bases.values())

    def versions(self) -> list[tuple[int, int]]:
        """Return the version counters and addresses of the bases, to notice that one has changed.

        Inference tensors have no version counter; theirs is given as 0.
        """
        return [(0 if t.is_inference() else t._version, t.data_ptr()) for t in self.bases]

    def input_shape(self, node: Node) -> tuple[int, ...]:
        """Return the shape of a node's first input for one chain."""
        value = node.inputs[0]
        return self.nodes[value - 1].shape if value else self.shape

    def is_current(self, energy: Callable[..., Tensor], x: Tensor) -> bool:
        """Return whether recording this energy on an x of this kind would give the same graph."""
        return (
            self.fingerprint is not None
            and isinstance(energy, nn.Module)
            and self.fingerprint == fingerprint(energy, x)
        )


def global_hooks() -> bool:
    """Return whether hooks are set for all modules of the process."""
    return any(getattr(_module, name) for name in _GLOBAL_HOOKS)


def fingerprint(energy: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
    """Return everything that a recording depends on, or None if that cannot be known.

    Parameters enter with their identity and address, and not with their values, which an engine
    reads before every chain.
    """
    parts: list[Any] = [x.shape, x.dtype, x.device]
    if global_hooks():
        return None
    for module in energy.modules():
        kind = type(module)
        # Other code may read anything, such as globals, so it is recorded at every call.
        if not kind.__module__.startswith(("torch.nn.", "fastlangevin.")):
            return None
        parts += (kind, id(module), kind.forward)
        for name, value in module.__dict__.items():
            kind = type(value)
            if kind in _SIMPLE:
                parts += (name, value)
            elif name == "_parameters" or name == "_buffers":
                for tensor in value.values():
                    if tensor is not None:
                        # functional_call passes such tensors, for a single call.
                        if tensor.grad_fn is not None or not in_memory(tensor):
                            return None
                        layout = tensor.shape, tensor.stride(), tensor.dtype
                        parts += (id(tensor), tensor.data_ptr(), *layout)
            elif name == "_modules":
                parts += [(key, id(child)) for key, child in value.items()]
            elif kind is tuple or kind is list:
                if any(type(item) not in _SIMPLE for item in value):
                    return None
                parts += (name, tuple(value))
            elif name in HOOKS:
                if value:
                    return None
            elif name not in _TABLES:
                return None
    return tuple(parts)


_SIMPLE = frozenset((int, float, bool, str, type(None), torch.dtype))
_TABLES = frozenset(nn.Module().__dict__)  # the tables of every module, which hold no settings
