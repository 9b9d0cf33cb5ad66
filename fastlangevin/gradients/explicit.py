"""The lean score: an explicit forward pass and input gradient of a recorded graph, in torch.

Against autograd: no gradient of a weight is formed and no input of a convolution kept; of a
piecewise linear activation one bit is; values are in channels_last, activations in place, weights
packed once a chain, and what is linear after the last activations is not run at all: its gradient
is the same in every chain, and is found when the weights are packed.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastlangevin.gradients.autograd import network_precision
from fastlangevin.gradients.graph.aten_ops import ACTIVATIONS, NONLINEAR
from fastlangevin.gradients.graph.ir import Graph, Node
from fastlangevin.gradients.layers import (
    Activation,
    Add,
    AvgPool,
    Conv,
    Linear,
    LogSumExp,
    PackedConv,
    Reduction,
    Scale,
    View,
    packs,
    spread,
)
from fastlangevin.locks import new_lock

Plain = Add | AvgPool | LogSumExp | Reduction | Scale | View
Layer = Activation | Conv | Linear | Plain
_COMPUTE = {"fp16": torch.float16, "bf16": torch.bfloat16}


class ExplicitGradient:
    """Energies and d energy / d x of batches like x [n, ...], whose shape and device are fixed.

    precision: as of the sampler; half precisions are those of the weights and of all values, where
    a graph's own dtype is theirs otherwise. Weights are read at :meth:`begin`, and again at a call
    before which their version counters or addresses show that one has changed; ``inplace``, the
    default on CUDA, into memory of their own that stays theirs, where captured graphs find them.
    """

    def __init__(
        self, graph: Graph, x: Tensor, precision: str | None = None, inplace: bool | None = None
    ) -> None:
        self.graph, self.precision = graph, precision
        self.inplace = graph.device.type == "cuda" if inplace is None else inplace
        self.chains = x.shape[0]
        self.dtype = _COMPUTE.get(precision or "", graph.dtype)
        self._plan = Plan(graph)
        self._weighted = {
            k: self._layer(node, graph.input_shape(node), self._plan.constant[k])
            for k, node in enumerate(graph.nodes, 1)
            if node.kind in ("conv", "linear")
        }
        self._offsets: list[Tensor | None] = []
        # Of nodes with weights that are linear after the activations: one chain's gradient there.
        self._heads: dict[int, Tensor] = {}
        self._passes: dict[bool, Passes] = {}
        self._bases = graph.bases
        self._seen: list[tuple[int, int]] = []
        # A sampler may be called from several threads; the values kept for the way back are one.
        self._lock = new_lock()
        shape = (self.chains, *graph.shape)
        self._start = spread(torch.zeros((), dtype=self.dtype, device=graph.device), shape)

    def begin(self) -> None:
        """Read the weights: for every chain, as a write through .data leaves no other trace."""
        with self._lock, torch.no_grad(), network_precision(self.precision, self.graph.device):
            self._read()

    def _read(self) -> None:
        self._seen = [_state(base) for base in self._bases]
        for layer in self._weighted.values():
            layer.pack()
        offsets = self._constant_gradients()
        if not self.inplace or not self._offsets:
            self._offsets = offsets
            return
        for held, offset in zip(self._offsets, offsets, strict=True):
            if held is not None and offset is not None:
                held.copy_(offset)

    @torch.no_grad()
    def __call__(self, x: Tensor, want_energies: bool) -> tuple[Tensor | None, Tensor]:
        """(energies [n] or None, d energy / d x in x's shape and dtype)."""
        if not self.chains:
            return (x.new_zeros(0) if want_energies else None), torch.zeros_like(x)
        with self._lock, network_precision(self.precision, x.device):
            if self._seen != [_state(base) for base in self._bases]:
                self._read()
            passes = self._passes.get(want_energies)
            if passes is None:
                passes = Passes(self._plan, self._weighted, self.chains, want_energies)
                self._passes[want_energies] = passes
            energies = passes.forward(self._start.copy_(x))
            grad = passes.backward(self._offsets)
        return energies, grad.to(x.dtype)

    def held_bytes(self) -> int:
        """About: packed weights both ways, what activations keep, and the two largest values."""
        item, nodes = self.dtype.itemsize, self.graph.nodes
        sizes = [math.prod(node.shape) * self.chains for node in nodes]
        kept = sum(
            size / 8 if node.kind in ("leaky_relu", "relu") else size * item
            for node, size in zip(nodes, sizes, strict=True)
            if node.kind in ACTIVATIONS
        )
        weights = 2 * item * sum(base.numel() for base in self._bases)
        return int(weights + kept + item * sum(sorted(sizes)[-2:]))

    def buffers(self) -> list[Tensor]:
        """What a chain's launches read and write that is held between them, once begun."""
        packed = [v for layer in self._weighted.values() for v in (layer.weight, layer.bias)]
        return [v for v in (self._start, *packed, *self._offsets) if v is not None]

    def _layer(self, node: Node, read: tuple[int, ...], constant: bool) -> Conv | Linear:
        # What is linear after the activations is small: it runs in the weights' own dtype.
        dtype = self.graph.dtype if constant else self.dtype
        if node.kind == "linear":
            return Linear(node, dtype, self.inplace)
        if self.inplace:
            return Conv(node, read, dtype, inplace=True)
        if not constant and packs(node, self.graph.device, dtype) and self.chains:
            return PackedConv(node, read, dtype, self.chains)
        return Conv(node, read, dtype)

    def _constant_gradients(self) -> list[Tensor | None]:
        """Per value, what of its gradient does not depend on the state, as one chain's."""
        nodes = self.graph.nodes
        grads: list[Tensor | None] = [None] * (len(nodes) + 1)
        one = torch.ones((), dtype=self.graph.dtype, device=self.graph.device)
        grads[-1] = spread(one, (1, *nodes[-1].shape))
        for k in range(len(nodes), 0, -1):
            grad = grads[k]
            if self._plan.constant[k] and grad is not None:
                layer = self._weighted.get(k) or _plain_layer(self.graph, nodes[k - 1])
                if k in self._weighted:
                    self._heads[k] = grad
                deliver(grads, nodes[k - 1].inputs, layer.backward(grad))
                grads[k] = None
        return [None if grad is None else grad.to(self.dtype) for grad in grads]


def _state(base: Tensor) -> tuple[int, int]:
    return (0 if base.is_inference() else base._version), base.data_ptr()


def _plain_layer(graph: Graph, node: Node) -> Plain:
    """The layer of a node without weights."""
    read = graph.input_shape(node)
    if node.kind == "view":
        return View(node, read)
    if node.kind == "avg_pool":
        return AvgPool(node, read)
    if node.kind in ("mean", "sum"):
        return Reduction(node, read)
    if node.kind == "logsumexp":
        return LogSumExp(node, read)
    return Scale(node) if node.kind == "scale" else Add(node)


def deliver(grads: list[Tensor | None], to: tuple[int, ...], parts: Any) -> None:
    """Add a layer's gradients to those of the values that it read."""
    for value, part in zip(to, parts if isinstance(parts, tuple) else (parts,), strict=True):
        grad = grads[value]
        grads[value] = part if grad is None else grad.add_(part)


class Plan:
    """Who reads what in a graph. A value per index: 0 the state, k the output of node k - 1."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        count = len(graph.nodes) + 1
        self.readers: list[list[int]] = [[] for _ in range(count)]
        for k, node in enumerate(graph.nodes, 1):
            for value in dict.fromkeys(node.inputs):
                self.readers[value].append(k)
        # Whether a value's gradient is the same in every chain and its node linear, so that the
        # node takes no part in the backward pass, nor in a forward pass without energies.
        self.constant = [False] * count
        for k in range(count - 1, 0, -1):
            linear = graph.nodes[k - 1].kind not in NONLINEAR
            self.constant[k] = linear and all(self.constant[r] for r in self.readers[k])
        # Views may share the memory of what they view.
        self.memory = list(range(count))
        for k, node in enumerate(graph.nodes, 1):
            if node.kind == "view":
                self.memory[k] = self.memory[node.inputs[0]]

    def ends(self, k: int, readers: list[list[int]]) -> bool:
        """Whether node k, of one input, is the last to read the memory of what it reads."""
        (value,) = self.graph.nodes[k - 1].inputs
        alike = [v for v, m in enumerate(self.memory) if m == self.memory[value]]
        return all(r < k or (r == k and v == value) for v in alike for r in readers[v])


class Passes:
    """The forward and the backward pass as lists of layers, with or without energies.

    held: values that no activation may change in place.
    """

    def __init__(
        self,
        plan: Plan,
        weighted: dict[int, Conv | Linear],
        chains: int,
        energies: bool,
        held: Iterable[int] = (),
    ) -> None:
        graph, self.chains, self.energies = plan.graph, chains, energies
        nodes = graph.nodes
        runs = [k for k in range(1, len(nodes) + 1) if energies or not plan.constant[k]]
        readers = [[k for k in ks if k in runs] for ks in plan.readers]
        self.layers: dict[int, Layer] = {}
        layers = self.layers
        for k in runs:
            node = nodes[k - 1]
            if node.kind in ACTIVATIONS:
                wanted = bool(readers[k]) or (energies and k == len(nodes))
                layers[k] = Activation(node, graph.device, wanted)
            else:
                layers[k] = weighted.get(k) or _plain_layer(graph, node)
        kept = {
            plan.memory[k if layer.keeps == "output" else nodes[k - 1].inputs[0]]
            for k, layer in layers.items()
            if isinstance(layer, Activation) and layer.keeps is not None
        }
        kept.update(plan.memory[value] for value in held)
        forward: dict[int, Callable[..., Any]] = {k: layer.forward for k, layer in layers.items()}
        for k, layer in layers.items():
            if not isinstance(layer, Activation) or layer.keeps == "input":
                continue
            (value,) = nodes[k - 1].inputs
            layer.inplace = plan.ends(k, readers) and plan.memory[value] not in kept
            conv = layers.get(value)
            # oneDNN's own relu makes 0 of NaN: only a slope keeps it.
            leaky = layer.kind == "leaky_relu" and layer.settings[0] > 0
            if leaky and isinstance(conv, PackedConv) and readers[value] == [k]:
                layer.fused = True
                forward[value] = functools.partial(conv.forward, slope=layer.settings[0])
        self._forward = [
            (k, forward[k], nodes[k - 1].inputs, _dead(nodes, readers, k),
             graph.dtype if plan.constant[k] else None)
            for k in runs
        ]  # fmt: skip
        self._backward = [
            (k, layers[k], nodes[k - 1].inputs, (chains, *nodes[k - 1].shape))
            for k in reversed(runs)
            if not plan.constant[k]
        ]
        self._count = len(nodes) + 1
        self._shape = (chains, *graph.shape)

    def forward(self, x: Tensor) -> Tensor | None:
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
        grads: list[Tensor | None] = [None] * self._count
        for k, layer, inputs, shape in self._backward:
            grad = whole(grads[k], offsets[k], shape)
            grads[k] = None
            deliver(grads, inputs, layer.backward(grad))
        return whole(grads[0], offsets[0], self._shape)


def whole(grad: Tensor | None, offset: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if offset is None:
        assert grad is not None
        return grad
    return spread(offset, shape) if grad is None else grad.add_(offset)


def _dead(nodes: tuple[Node, ...], readers: list[list[int]], k: int) -> list[int]:
    """The values that are read for the last time by node k."""
    return [value for value in set(nodes[k - 1].inputs) if max(readers[value]) == k]
