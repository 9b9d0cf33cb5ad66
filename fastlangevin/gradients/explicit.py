"""The explicit engine: forward pass and input gradient of a recorded graph in torch operators.

It does less than autograd. It forms no gradient of a weight, saves no input of a convolution, and
saves one bit per value of a piecewise linear activation. Values are in channels_last, activations
run in place, and weights are packed once per chain. The linear part after the last activations is
not run unless energies are wanted: its gradient is the same in every chain, and is computed when
the weights are packed.
"""

import math

import torch
from torch import Tensor

from fastlangevin.gradients.conv_layers import Conv, PackedConv, packs
from fastlangevin.gradients.graph.aten_ops import NONLINEAR
from fastlangevin.gradients.graph.ir import Graph, Node
from fastlangevin.gradients.layers import BatchNorm, GroupNorm, Linear, broadcast
from fastlangevin.gradients.passes import Dataflow, Passes, Weighted, deliver, unweighted_layer
from fastlangevin.gradients.precision import HALVES, network_precision
from fastlangevin.locks import new_rlock


def refusal(graph: Graph) -> str | None:
    """Return why this engine cannot run a graph, or None if it can."""
    reasons = {
        "cat": "it has no layer for cat",
        "constant": "it has no layer for constants of each chain",
        "permute": "it has no layer for permuted dimensions",
        "transposed": "it has no layer for transposed convolutions",
        "upsample": "it has no layer for interpolations",
    }
    for node in graph.nodes:
        if node.kind == "linear" and len(node.shape) > 1:
            return "it has linear layers of vectors only"
        if node.kind in reasons:
            return reasons[node.kind]
    return None


class ExplicitGradient:
    """Energies and d energy / d x of batches with the shape and device of x [n, ...].

    ``precision`` is the sampler's. In a half precision the weights and all values have its dtype;
    otherwise they have the graph's. The weights are read by :meth:`begin`, and again by a call if
    a version counter or an address shows that one has changed. With ``inplace``, the default on
    CUDA, they are copied to the same memory every time, where captured graphs read them.
    """

    def __init__(
        self, graph: Graph, x: Tensor, precision: str | None = None, inplace: bool | None = None
    ) -> None:
        self.graph, self.precision = graph, precision
        self.inplace = graph.device.type == "cuda" if inplace is None else inplace
        self.chains = x.shape[0]
        self.dtype = HALVES.get(precision or "", graph.dtype)
        self._flow = Dataflow(graph)
        self._weighted = {
            k: self._layer(node, graph.input_shape(node), self._flow.constant[k])
            for k, node in enumerate(graph.nodes, 1)
            if node.kind in ("batch_norm", "conv", "group_norm", "linear")
        }
        self._offsets: list[Tensor | None] = []
        # By node with weights in the linear part after the activations: its output's gradient.
        self._heads: dict[int, Tensor] = {}
        self._passes: dict[bool, Passes] = {}
        self._seen: list[tuple[int, int]] | None = None
        # Threads may share a sampler, but the layers save values for one backward pass only.
        self.lock = new_rlock()
        shape = (self.chains, *graph.shape)
        self._x = broadcast(torch.zeros((), dtype=self.dtype, device=graph.device), shape)

    def begin(self) -> None:
        """Read the weights."""
        with self.lock, torch.no_grad(), network_precision(self.precision, self.graph.device):
            self._read()

    def _read(self) -> None:
        self._seen = self.graph.versions()
        self.graph.refresh()
        for layer in self._weighted.values():
            layer.pack()
        offsets = self._constant_gradients()
        if not self.inplace or not self._offsets:
            self._offsets = offsets
            return
        for target, offset in zip(self._offsets, offsets, strict=True):
            if target is not None and offset is not None:
                target.copy_(offset)

    @torch.no_grad()
    def __call__(self, x: Tensor, want_energies: bool) -> tuple[Tensor | None, Tensor]:
        """Return (energies [n] or None, d energy / d x in x's shape and dtype)."""
        if not self.chains:
            return (x.new_zeros(0) if want_energies else None), torch.zeros_like(x)
        with self.lock, network_precision(self.precision, x.device):
            if self._seen != self.graph.versions():
                self._read()
            passes = self._passes.get(want_energies)
            if passes is None:
                passes = Passes(self._flow, self._weighted, self.chains, want_energies)
                self._passes[want_energies] = passes
            energies = passes.forward(self._x.copy_(x))
            grad = passes.backward(self._offsets)
        return energies, grad.to(x.dtype)

    def held_bytes(self) -> int:
        """Estimate the bytes held: packed weights, saved activations and the two largest values."""
        item, nodes = self.dtype.itemsize, self.graph.nodes
        sizes = [math.prod(node.shape) * self.chains for node in nodes]
        saved = sum(
            size / 8 if node.kind in ("leaky_relu", "relu") else size * item
            for node, size in zip(nodes, sizes, strict=True)
            if node.kind in NONLINEAR
        )
        return int(self.weight_bytes() + saved + item * sum(sorted(sizes)[-2:]))

    def weight_bytes(self) -> int:
        """Estimate the bytes of packed weights: one copy for each direction."""
        return 2 * self.dtype.itemsize * sum(base.numel() for base in self.graph.bases)

    def buffers(self) -> list[Tensor]:
        """Return the tensors that a chain's launches use and that outlive a call, after begin.

        Factors and a learned beta of silu are read where they are.
        """
        read = [
            constant.tensor()
            for k, node in enumerate(self.graph.nodes, 1)
            if k not in self._weighted
            for constant in node.constants
            if constant is not None
        ]
        return [self._x, *read, *self.packed()]

    def packed(self) -> list[Tensor]:
        """Return the tensors that :meth:`begin` writes, after it."""
        packed = [v for layer in self._weighted.values() for v in (layer.weight, layer.bias)]
        return [v for v in (*packed, *self._offsets) if v is not None]

    def _layer(self, node: Node, read: tuple[int, ...], constant: bool) -> Weighted:
        # The linear part after the activations is small, so it runs in the weights' own dtype.
        dtype = self.graph.dtype if constant else self.dtype
        if node.kind == "batch_norm":
            return BatchNorm(node, dtype, self.inplace)
        if node.kind == "group_norm":
            return GroupNorm(node, dtype, self.inplace)
        if node.kind == "linear":
            return Linear(node, dtype, self.inplace)
        if self.inplace:
            return Conv(node, read, dtype, inplace=True)
        if not constant and packs(node, self.graph.device, dtype) and self.chains:
            return PackedConv(node, read, dtype, self.chains)
        return Conv(node, read, dtype)

    def _constant_gradients(self) -> list[Tensor | None]:
        """Return, for each value, the part of its gradient [1, ...] that no state changes."""
        nodes = self.graph.nodes
        grads: list[Tensor | None] = [None] * (len(nodes) + 1)
        one = torch.ones((), dtype=self.graph.dtype, device=self.graph.device)
        grads[-1] = broadcast(one, (1, *nodes[-1].shape))
        for k in range(len(nodes), 0, -1):
            grad = grads[k]
            if self._flow.constant[k] and grad is not None:
                layer = self._weighted.get(k) or unweighted_layer(self.graph, nodes[k - 1])
                if k in self._weighted:
                    self._heads[k] = grad
                deliver(grads, nodes[k - 1].inputs, layer.backward(grad))
                grads[k] = None
        return [None if grad is None else grad.to(self.dtype) for grad in grads]
