"""The forward and the backward pass of a recorded graph, as lists of layers."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from fastlangevin.gradients.conv_layers import Conv, PackedConv
from fastlangevin.gradients.graph.aten_ops import ACTIVATIONS, NONLINEAR
from fastlangevin.gradients.graph.ir import Graph, Node
from fastlangevin.gradients.layers import (
    Activation,
    Add,
    AvgPool,
    BatchNorm,
    GroupNorm,
    Linear,
    LogSumExp,
    MaxPool,
    Multiply,
    Reduction,
    Scale,
    View,
    broadcast,
)

Unweighted = Add | AvgPool | LogSumExp | MaxPool | Multiply | Reduction | Scale | View
Weighted = BatchNorm | Conv | GroupNorm | Linear
Layer = Activation | Unweighted | Weighted


def unweighted_layer(graph: Graph, node: Node) -> Unweighted:
    """Return the layer of a node that has neither weights nor an activation."""
    read = graph.input_shape(node)
    if node.kind == "view":
        return View(node, read)
    if node.kind == "avg_pool":
        return AvgPool(node, read)
    if node.kind in ("mean", "sum"):
        return Reduction(node, read)
    if node.kind == "logsumexp":
        return LogSumExp(node, read)
    if node.kind == "mul":
        return Multiply()
    if node.kind == "max_pool":
        return MaxPool(node, read)
    return Scale(node) if node.kind == "scale" else Add(node)


def deliver(grads: list[Tensor | None], inputs: tuple[int, ...], parts: Any) -> None:
    """Add a layer's input gradients to the gradients of the values that it read."""
    for value, part in zip(inputs, parts if isinstance(parts, tuple) else (parts,), strict=True):
        grad = grads[value]
        grads[value] = part if grad is None else grad.add_(part)


class Dataflow:
    """Which node reads which value of a graph.

    Value 0 is the state and value k the output of node k, counted from 1.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        count = len(graph.nodes) + 1
        self.readers: list[list[int]] = [[] for _ in range(count)]
        for k, node in enumerate(graph.nodes, 1):
            for value in dict.fromkeys(node.inputs):
                self.readers[value].append(k)
        # Whether a value's gradient is the same in every chain and its node is linear. Such a node
        # is left out of the backward pass, and of the forward pass unless energies are wanted.
        self.constant = [False] * count
        for k in range(count - 1, 0, -1):
            linear = graph.nodes[k - 1].kind not in NONLINEAR
            self.constant[k] = linear and all(self.constant[r] for r in self.readers[k])
        # The value whose memory a value may share: a view may share that of its input.
        self.memory = list(range(count))
        for k, node in enumerate(graph.nodes, 1):
            if node.kind in ("permute", "view"):
                self.memory[k] = self.memory[node.inputs[0]]

    def is_last_reader(self, k: int, readers: list[list[int]]) -> bool:
        """Return whether node k, of one input, is the last to read the memory of its input."""
        (value,) = self.graph.nodes[k - 1].inputs
        aliases = [v for v, m in enumerate(self.memory) if m == self.memory[value]]
        return all(r < k or (r == k and v == value) for v in aliases for r in readers[v])


class Passes:
    """The forward and the backward pass, with or without energies.

    No activation changes the values ``protected`` in place.
    """

    def __init__(
        self,
        flow: Dataflow,
        weighted: dict[int, Weighted],
        chains: int,
        energies: bool,
        protected: Iterable[int] = (),
    ) -> None:
        graph, nodes = flow.graph, flow.graph.nodes
        self.chains, self.energies = chains, energies
        active = [k for k in range(1, len(nodes) + 1) if energies or not flow.constant[k]]
        readers = [[k for k in ks if k in active] for ks in flow.readers]
        self.layers: dict[int, Layer] = {}
        for k in active:
            node = nodes[k - 1]
            if node.kind in ACTIVATIONS:
                wanted = bool(readers[k]) or (energies and k == len(nodes))
                self.layers[k] = Activation(node, graph.device, wanted)
            else:
                self.layers[k] = weighted.get(k) or unweighted_layer(graph, node)
        fused = self._choose_inplace(flow, readers, protected)
        self._forward = [
            (k, fused.get(k, self.layers[k].forward), nodes[k - 1].inputs,
             _dead(nodes, readers, k), graph.dtype if flow.constant[k] else None)
            for k in active
        ]  # fmt: skip
        self._backward = [
            (k, self.layers[k], nodes[k - 1].inputs, (chains, *nodes[k - 1].shape))
            for k in reversed(active)
            if not flow.constant[k]
        ]
        self._count = len(nodes) + 1
        self._shape = (chains, *graph.shape)

    def _choose_inplace(
        self, flow: Dataflow, readers: list[list[int]], protected: Iterable[int]
    ) -> dict[int, Callable[..., Any]]:
        """Set which activations run in place, and return the convolutions that apply one."""
        nodes = flow.graph.nodes
        saved = {flow.memory[value] for value in protected}
        for k, layer in self.layers.items():
            if isinstance(layer, Activation) and layer.keeps is not None:
                value = k if layer.keeps == "output" else nodes[k - 1].inputs[0]
                saved.add(flow.memory[value])
            if isinstance(layer, GroupNorm | Multiply):
                saved.update(flow.memory[value] for value in nodes[k - 1].inputs)
        fused: dict[int, Callable[..., Any]] = {}
        for k, layer in self.layers.items():
            if not isinstance(layer, Activation) or layer.keeps == "input":
                continue
            (value,) = nodes[k - 1].inputs
            layer.inplace = flow.is_last_reader(k, readers) and flow.memory[value] not in saved
            conv = self.layers.get(value)
            # oneDNN's fused relu turns NaN into 0; its leaky relu keeps NaN.
            leaky = layer.kind == "leaky_relu" and layer.settings[0] > 0
            if leaky and isinstance(conv, PackedConv) and readers[value] == [k]:
                layer.fused = True
                fused[value] = functools.partial(conv.forward, slope=layer.settings[0])
        return fused

    def forward(self, x: Tensor) -> Tensor | None:
        """Return the energies [n], or None if they are not wanted."""
        values: list[Any] = [None] * self._count
        values[0] = x
        for k, run, inputs, dead, dtype in self._forward:
            read = [values[value] for value in inputs]
            if dtype is not None:
                read = [value.to(dtype) for value in read]
            values[k] = run(*read)
            del read
            for value in dead:
                values[value] = None
        return values[-1].reshape(self.chains) if self.energies else None

    def backward(self, offsets: list[Tensor | None]) -> Tensor:
        """Return d energy / d x. ``offsets``: the constant parts of the values' gradients."""
        grads: list[Tensor | None] = [None] * self._count
        for k, layer, inputs, shape in self._backward:
            grad = total(grads[k], offsets[k], shape)
            grads[k] = None
            deliver(grads, inputs, layer.backward(grad))
        return total(grads[0], offsets[0], self._shape)


def total(grad: Tensor | None, offset: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Return grad + offset, in place of grad if both exist; the offset is broadcast to shape."""
    if offset is None:
        assert grad is not None
        return grad
    return broadcast(offset, shape) if grad is None else grad.add_(offset)


def _dead(nodes: tuple[Node, ...], readers: list[list[int]], k: int) -> list[int]:
    """Return the values that node k is the last to read."""
    return [value for value in set(nodes[k - 1].inputs) if max(readers[value]) == k]
