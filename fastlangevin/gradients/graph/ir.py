"""The graph of operations that an energy computes."""

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlangevin.kernels.memory import versions


@dataclass(frozen=True)
class Constant:
    """A parameter or buffer of the energy, or a strided view of one, in its own memory.

    With a ``slot``, the base holds what the energy computes from its weights in that slot of the
    recording's trace.
    """

    base: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    slot: int | None = None

    def tensor(self, detach: bool = True) -> Tensor:
        base = self.base.detach() if detach else self.base
        if self.is_whole:
            return base
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)

    @property
    def is_whole(self) -> bool:
        """Whether this is the base itself and not a view of it."""
        return self.base.shape == self.size and self.base.stride() == self.stride

    @property
    def key(self) -> tuple[Any, ...]:
        return id(self.base), self.size, self.stride, self.offset


class Computed(Protocol):
    """Constants that an energy computes from its weights, in memory of their own."""

    leaves: list[Tensor]  # the parameters and buffers that they are computed from

    def refresh(self) -> None:
        """Compute them again."""


class ComputedInCalls(Protocol):
    """Tensors that an energy computes from its weights and the arguments of a call."""

    slots: list[int]
    leaves: dict[int, Tensor]  # the parameters and buffers that they are computed from

    def compute(self, model_kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return the tensors of the slots."""


@dataclass(frozen=True)
class Node:
    """An operation on a batch that treats all chains in the same way and independently.

    ``kind`` (``settings``) is conv (stride, padding, dilation, groups), linear (over the last
    dimension), add (factor of the second input), view, permute (dims of the input, counted from 0
    without the chains), mean, sum or logsumexp (dims, keepdim), avg_pool (kernel, stride, padding,
    ceil_mode, count_include_pad, divisor), scale (factor), mul of two values, max_pool
    (kernel, stride, padding, dilation, ceil_mode), batch_norm (eps) in eval mode, group_norm
    (groups, eps), or the name of an activation. The ``constants`` of conv and linear are the weight
    [out, in, ...] and the bias, those of batch_norm the weight, bias, mean and variance,
    and those of group_norm the weight and bias. A scale
    may have one constant to multiply by, and a silu one of a single element, its beta.

    constant reads no value: its constant [n, *shape] has a row for each chain or, with the setting
    "one_hot", is the number of each chain's class. The second input of add and mul may be a
    constant of shape [C, 1, ...] that is broadcast. cat (sizes) joins values along their first
    dimension. transposed (stride, padding, output_padding, dilation, groups) is a transposed
    convolution with the weight [in, out, ...] and the bias, and upsample (name of the operator, its
    arguments after the size) an interpolation.
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
    computed: Computed | None = field(default=None, repr=False)
    in_calls: ComputedInCalls | None = field(default=None, repr=False)
    # What other modules have derived from the nodes, by name.
    derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for graphs of the same operations on the same parameters."""
        nodes = tuple(node.key for node in self.nodes)
        return self.chains, self.shape, self.dtype, self.device, nodes

    @functools.cached_property
    def bases(self) -> list[Tensor]:
        """The parameters and buffers that the graph depends on, without duplicates."""
        constants = [c for node in self.nodes for c in node.constants if c is not None]
        bases = {id(c.base): c.base for c in constants if c.slot is None}
        if self.computed is not None:
            bases |= {id(leaf): leaf for leaf in self.computed.leaves}
        if self.in_calls is not None:
            bases |= {id(leaf): leaf for leaf in self.in_calls.leaves.values()}
        return list(bases.values())

    def refresh(self) -> None:
        """Compute again what the energy computes from its weights, before they are read."""
        if self.computed is not None:
            self.computed.refresh()

    @torch.no_grad()
    def constants_of_chains(self, model_kwargs: dict[str, Any]) -> dict[int, Tensor]:
        """Return the tensor [n, ...] of each constant node k, for the arguments of a call."""
        computed: dict[int | None, Tensor] = {}
        if self.in_calls is not None:
            tensors = self.in_calls.compute(model_kwargs)
            computed.update(zip(self.in_calls.slots, tensors, strict=True))
        constants = {}
        for k, node in enumerate(self.nodes, 1):
            if node.kind != "constant":
                continue
            (constant,) = node.constants
            assert constant is not None
            tensor = constant.tensor() if constant.slot is None else computed[constant.slot]
            if constant.slot is not None and not constant.is_whole:
                tensor = replace(constant, base=tensor.contiguous()).tensor()
            if node.settings:
                tensor = F.one_hot(tensor.reshape(self.chains), node.shape[0]).to(self.dtype)
            constants[k] = tensor
        return constants

    def versions(self) -> list[tuple[int, int]]:
        """Return the versions of the bases, to notice that one has changed."""
        return versions(self.bases)

    def input_shape(self, node: Node) -> tuple[int, ...]:
        """Return the shape of a node's first input for one chain."""
        value = node.inputs[0]
        return self.nodes[value - 1].shape if value else self.shape
