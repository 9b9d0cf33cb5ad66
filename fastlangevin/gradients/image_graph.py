"""Graphs as layers over images: the form in which the fused CPU engine reads them.

Every value of a chain is an image [C, H, W]. A vector [D] is an image of one pixel, a sequence
[C, L] one of height 1, and a linear layer a convolution whose kernel has the size of its input.
A permuted value is the same image, whose axes are listed in another order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin.gradients.graph.ir import Constant, Graph, Node
from fastlangevin.gradients.graph.linear import run_linear
from fastlangevin.gradients.layers import scale_and_shift

Image = tuple[int, int, int]
# How many chains' constants are computed at a time.
_CONSTANT_CHAINS = 16


def axes_of(image: Image) -> tuple[int, ...]:
    """Return the axes of an image that are longer than 1, in their order."""
    return tuple(axis for axis in range(3) if image[axis] != 1)


class Place(NamedTuple):
    """Where a value of the graph is: in an image, which is value ``number`` of the layers.

    ``axes`` lists the image's axes that are longer than 1, in the order of the value's dimensions.
    """

    number: int
    image: Image
    axes: tuple[int, ...]

    @property
    def is_permuted(self) -> bool:
        """Whether the order of the value's elements is not that of the image."""
        return self.axes != axes_of(self.image)

    @property
    def shape(self) -> tuple[int, ...]:
        """The value's shape for one chain, without dimensions of size 1."""
        return tuple(self.image[axis] for axis in self.axes)

    def images(self, values: Tensor) -> Tensor:
        """Return values [n, ...] as images [n, C, H, W], in the same memory if that is possible."""
        if self.is_permuted:
            order = (1 + self.axes.index(axis) for axis in axes_of(self.image))
            values = values.reshape(-1, *self.shape).permute(0, *order)
        return values.reshape(-1, *self.image)


class Link(NamedTuple):
    """A pixel that an output pixel reads, and its factor in the sum.

    In max_pool the factor is the pixel's position in the window instead, in torch's order.
    """

    output_pixel: int
    input_pixel: int
    factor: float


@dataclass(frozen=True, eq=False)
class ImageLayer:
    """A layer and the activation after it.

    ``kind`` is that of a LayerKind in csrc/cpu/convnet_plan.h, which says what it computes.
    ``inputs`` are values: 0 is the state and k + 1 the output of layer k.
    """

    kind: str
    inputs: tuple[int, ...]
    read: Image
    shape: Image
    # conv: [out, in, kh, kw]; transposed: [in, out, kh, kw] (either may be stored flattened);
    # pointwise: [C] or [1].
    weight: Constant | None = None
    bias: Constant | None = None
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1  # groups of a convolution, or of a group norm
    factors: tuple[float, float] = (1.0, 1.0)
    links: tuple[Link, ...] = ()
    norm: Node | None = None  # a batch norm in eval mode, applied after the bias
    # For kind "constant" without a bias: the value of the graph that it holds, the order of that
    # value's dimensions (see Place), and the convolution or linear layer that is applied first.
    number: int = 0
    axes: tuple[int, ...] = ()
    through: Node | None = None
    activation: Node | None = None

    @property
    def activation_name(self) -> str:
        """The name of the activation's kernel."""
        if self.activation is None:
            return "identity"
        if self.activation.kind == "gelu" and self.activation.settings[0]:
            return "gelu_tanh"
        return "leaky_relu" if self.activation.kind == "relu" else self.activation.kind

    def parameters(self) -> tuple[Tensor | None, Tensor | None, tuple[float, float]]:
        """Return the current weight, bias and settings of the activation."""
        weight, bias = (None if c is None else c.tensor() for c in (self.weight, self.bias))
        if weight is not None and self.kind == "conv":
            weight = weight.reshape(self.shape[0], self.read[0] // self.groups, *self.kernel)
        elif weight is not None and self.kind == "transposed":
            weight = weight.reshape(self.read[0], self.shape[0] // self.groups, *self.kernel)
        elif weight is not None:
            weight = weight.reshape(-1).expand(self.shape[0])
            if self.kind == "pointwise":
                weight = weight * self.factors[0]
        if self.norm is not None:
            scale, shift = scale_and_shift(self.norm)
            bias = shift if bias is None else torch.addcmul(shift, bias, scale)
            weight = scale if weight is None else weight * scale.view(-1, 1, 1, 1)
        return weight, bias, _settings(self.activation)


@dataclass(frozen=True, eq=False)
class ImageGraph:
    """A chain's energy: layers, and an affine function of some of their values, the heads."""

    state: Place
    layers: tuple[ImageLayer, ...]
    heads: tuple[tuple[Place, int], ...]  # the place of a value, and its number in the graph
    tail: tuple[int, ...]  # the linear nodes after the heads

    @property
    def constants_differ(self) -> bool:
        """Whether chains have constants of their own, not only biases that they share."""
        return any(layer.kind == "constant" and layer.bias is None for layer in self.layers)

    def constants(
        self, graph: Graph, model_kwargs: dict[str, Any]
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield the constants [n, C, H, W] of a call, as (number of the layer, chains, values).

        The layers that are constants are numbered in order. A shared bias has one row. A
        constant that a linear layer is applied to is computed a few chains at a time: the layer's
        values may be the largest that a chain has.
        """
        layers = [layer for layer in self.layers if layer.kind == "constant"]
        tensors = graph.constants_of_chains(model_kwargs) if layers else {}
        for k, layer in enumerate(layers):
            if layer.bias is not None:
                yield k, slice(None), layer.bias.tensor().reshape(1, *layer.shape)
                continue
            tensor = tensors[layer.number]
            if layer.through is None:
                yield k, slice(None), Place(0, layer.shape, layer.axes).images(tensor)
                continue
            for first in range(0, len(tensor), _CONSTANT_CHAINS):
                chains = slice(first, first + _CONSTANT_CHAINS)
                with torch.no_grad(), torch.autocast(graph.device.type, enabled=False):
                    part = run_linear(layer.through, tensor[chains])
                yield k, chains, part.reshape(-1, *layer.shape)

    def linear_tail(self, graph: Graph) -> tuple[list[Tensor], Tensor]:
        """Return dE/dh [C, H, W] at each head h, and E [] where all heads are 0."""
        values: dict[int, Tensor] = {}
        leaves: list[Tensor] = []
        with torch.enable_grad(), torch.autocast(graph.device.type, enabled=False):
            for _, k in self.heads:
                shape = graph.nodes[k - 1].shape if k else graph.shape
                leaf = torch.zeros((1, *shape), dtype=graph.dtype, device=graph.device)
                leaves.append(leaf.requires_grad_())
                values[k] = leaves[-1]
            for k in self.tail:
                node = graph.nodes[k - 1]
                values[k] = run_linear(node, *(values[i] for i in node.inputs))
            energy = values[len(graph.nodes)]
            grads = torch.autograd.grad(energy.sum(), leaves)
        images = [place.images(grad)[0] for grad, (place, _) in zip(grads, self.heads, strict=True)]
        return images, energy.detach().reshape(())


def _settings(node: Node | None) -> tuple[float, float]:
    """Return the settings of an activation as its kernel reads them."""
    if node is None:
        return 0.0, 0.0
    settings = node.settings
    if node.kind == "silu" and not settings:
        settings = (1.0,)  # beta
    one, two = (*settings, 0.0, 0.0)[:2]
    for constant in node.constants:
        assert constant is not None
        one *= float(constant.tensor())
    return one, two
