"""Graphs as layers over images: the form in which the fused CPU engine reads them.

Every value of a chain is an image [C, H, W]. A vector [D] is an image of one pixel, a sequence
[C, L] one of height 1, and a linear layer a convolution whose kernel has the size of its input.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastlangevin.gradients.graph.aten_ops import ACTIVATIONS
from fastlangevin.gradients.graph.conv_stack import run_linear
from fastlangevin.gradients.graph.ir import Constant, Graph, Node
from fastlangevin.gradients.layers import scale_and_shift
from fastlangevin.gradients.passes import Dataflow

Image = tuple[int, int, int]
Links = tuple[tuple[int, int, float], ...]
# The chains whose constants pass a layer at a time.
_CONSTANT_CHAINS = 16


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
    # Of conv [out, in, kh, kw] and of transposed [in, out, kh, kw], in some shape; of pointwise [C]
    # or [1].
    weight: Constant | None = None
    bias: Constant | None = None
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1  # of a convolution, or those that a norm is taken over
    factors: tuple[float, float] = (1.0, 1.0)
    links: Links = ()
    norm: Node | None = None  # a batch norm in eval mode, after the bias
    # Of a constant that is not a bias alone: its number in the graph, and a convolution or linear
    # layer that it passes.
    number: int = 0
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
    """A chain's energy: layers, then the sum of linear functions of some values, and a number."""

    shape: Image
    layers: tuple[ImageLayer, ...]
    heads: tuple[tuple[int, Image, int], ...]  # value, its image, and its number in the graph
    tail: tuple[int, ...]  # the linear nodes after the heads

    @property
    def constants_differ(self) -> bool:
        """Whether chains have constants of their own, not only biases that they share."""
        return any(layer.kind == "constant" and layer.bias is None for layer in self.layers)

    def constants(
        self, graph: Graph, model_kwargs: dict[str, Any]
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield the constants [n, C, H, W] of a call, as (number of the layer, chains, values).

        The layers that are constants are numbered in order. A shared bias has one row. Layers that
        constants pass are computed a few chains at a time: their values may be the largest that
        a chain has.
        """
        layers = [layer for layer in self.layers if layer.kind == "constant"]
        tensors = graph.constants_of_chains(model_kwargs) if layers else {}
        for k, layer in enumerate(layers):
            if layer.bias is not None:
                yield k, slice(None), layer.bias.tensor().reshape(1, *layer.shape)
                continue
            tensor = tensors[layer.number]
            if layer.through is None:
                yield k, slice(None), tensor.reshape(-1, *layer.shape)
                continue
            for first in range(0, len(tensor), _CONSTANT_CHAINS):
                chains = slice(first, first + _CONSTANT_CHAINS)
                with torch.no_grad(), torch.autocast(graph.device.type, enabled=False):
                    part = run_linear(layer.through, tensor[chains])
                yield k, chains, part.reshape(-1, *layer.shape)

    def head(self, graph: Graph) -> tuple[list[Tensor], Tensor]:
        """Return the gradients [C, H, W] of the energy at the heads, and the number []."""
        values: dict[int, Tensor] = {}
        leaves: list[Tensor] = []
        with torch.enable_grad(), torch.autocast(graph.device.type, enabled=False):
            for _, _, k in self.heads:
                shape = graph.nodes[k - 1].shape if k else graph.shape
                leaf = torch.zeros((1, *shape), dtype=graph.dtype, device=graph.device)
                leaves.append(leaf.requires_grad_())
                values[k] = leaves[-1]
            for k in self.tail:
                node = graph.nodes[k - 1]
                values[k] = run_linear(node, *(values[i] for i in node.inputs))
            energy = values[len(graph.nodes)]
            grads = torch.autograd.grad(energy.sum(), leaves)
        images = [
            grad.reshape(image) for grad, (_, image, _) in zip(grads, self.heads, strict=True)
        ]
        return images, energy.detach().reshape(())


def image_graph(graph: Graph) -> ImageGraph | str:
    """Return a graph as layers over images, or the reason why it is none."""
    lowered: ImageGraph | str | None = graph.derived.get("image_graph")
    if lowered is None:
        lowered = graph.derived["image_graph"] = _lowered(graph)
    return lowered


def _lowered(graph: Graph) -> ImageGraph | str:
    flow = Dataflow(graph)
    if all(flow.constant[1:]):
        return "it has no activation"
    try:
        return _Lowering(graph, flow).result()
    except _Refused as refused:
        return str(refused)


class _Refused(Exception):
    """Says why a graph has no form as layers over images."""


class _Lowering:
    def __init__(self, graph: Graph, flow: Dataflow) -> None:
        self.graph, self.flow = graph, flow
        self.layers: list[ImageLayer] = []
        self.places: dict[int, tuple[int, Image]] = {0: (0, _image(self._state_shape()))}
        # How often a value is read, under any view of it.
        self.uses = [0] * (len(graph.nodes) + 1)
        for k, node in enumerate(graph.nodes, 1):
            if node.kind != "view":
                for value in node.inputs:
                    self.uses[flow.memory[value]] += 1
            if k == len(graph.nodes):
                self.uses[flow.memory[k]] += 1

    def result(self) -> ImageGraph:
        nodes, constant = self.graph.nodes, self.flow.constant
        for k, node in enumerate(nodes, 1):
            # Constants and parts are lowered with the layers that read them.
            if not constant[k] and node.kind not in ("constant", "cat"):
                self.places[k] = self._lower(k, node)
        tail = tuple(k for k in range(1, len(nodes) + 1) if constant[k])
        read = {i for k in tail for i in nodes[k - 1].inputs} or {len(nodes)}
        heads = tuple((*self._place(i), i) for i in sorted(read) if i == 0 or not constant[i])
        return ImageGraph(self.places[0][1], tuple(self.layers), heads, tail)

    def _kind(self, value: int) -> str:
        return self.graph.nodes[value - 1].kind if value else ""

    def _place(self, value: int) -> tuple[int, Image]:
        """Return the number and the image of a value."""
        if self._kind(value) == "cat":
            raise _Refused("cat is supported only in front of convolutions and linear layers")
        if self._kind(value) == "constant" and value not in self.places:
            self.places[value] = self._add(self._constant(value, _image(self._shape(value))))
        return self.places[value]

    def _constant(self, value: int, image: Image, through: Node | None = None) -> ImageLayer:
        return ImageLayer("constant", (), image, image, number=value, through=through)

    def _state_shape(self) -> tuple[int, ...]:
        """Return the shape of the state: that of its view, if it is read through one only."""
        first = {k for k, node in enumerate(self.graph.nodes, 1) if 0 in node.inputs}
        views = {self.graph.nodes[k - 1].shape for k in first if self.flow.memory[k] == 0}
        only = len(views) == 1 and all(self.flow.memory[k] == 0 for k in first)
        return views.pop() if only else self.graph.shape

    def _lower(self, k: int, node: Node) -> tuple[int, Image]:
        if node.kind == "view":
            return self._view(node)
        if node.kind in ACTIVATIONS:
            return self._activate(node)
        if node.kind in ("conv", "linear") and self._kind(node.inputs[0]) == "cat":
            return self._conv_of_parts(node)
        inputs = tuple(self._place(i)[0] for i in node.inputs)
        image = self._place(node.inputs[0])[1]
        layer = ImageLayer("pointwise", inputs, image, image)
        if node.kind in ("conv", "linear", "transposed"):
            layer = self._conv(layer, node)
        elif node.kind in ("add", "mul"):
            other = node.inputs[1]
            of_pixels = self._kind(other) == "constant" and self._place(other)[1][1:] == (1, 1)
            if self._place(other)[1] != ((image[0], 1, 1) if of_pixels else image):
                raise _Refused(f"{node.kind} reads values that have been viewed in another shape")
            kind = "pointwise" if node.kind == "add" else "multiply"
            layer = replace(layer, kind=kind, factors=(1.0, *node.settings, 1.0)[:2])
        elif node.kind == "scale":
            layer = self._scale(layer, node)
        elif node.kind == "batch_norm":
            return self._normalise(layer, node)
        elif node.kind == "group_norm":
            self._check_image(node)
            weight, bias = node.constants
            groups, eps = node.settings
            layer = replace(
                layer, kind="norm", weight=weight, bias=bias, groups=groups, factors=(eps, 1.0)
            )
        elif node.kind == "max_pool":
            self._check_image(node)
            links = _max_windows(image, node)
            layer = replace(layer, kind="max_pool", shape=_image(node.shape), links=links)
        elif node.kind in ("avg_pool", "mean", "sum", "upsample"):
            self._check_image(node)
            if node.kind == "avg_pool":
                links = _pool_windows(image, node)
            elif node.kind == "upsample":
                links = _interpolation(image, node)
            else:
                links = self._all_pixels(image, node)
            layer = replace(layer, kind="mix", shape=_image(node.shape), links=links)
        elif node.kind == "logsumexp":
            if len(node.settings[0]) != len(self._shape(node.inputs[0])):
                raise _Refused("logsumexp is supported only over all of a chain's values")
            layer = replace(layer, kind="logsumexp", shape=(1, 1, 1))
        else:
            raise _Refused(f"no kernel has the operation {node.kind}")
        return self._add(layer)

    def _add(self, layer: ImageLayer) -> tuple[int, Image]:
        self.layers.append(layer)
        return len(self.layers), layer.shape

    def _shape(self, value: int) -> tuple[int, ...]:
        return self.graph.nodes[value - 1].shape if value else self.graph.shape

    def _view(self, node: Node) -> tuple[int, Image]:
        """Return the place of a view.

        A linear layer whose result is viewed as an image alone becomes a transposed convolution of
        one pixel, since channels are stored next to each other.
        """
        (value,) = node.inputs
        place, image = self._place(value)
        layer = self._alone(value)
        is_image = len(node.shape) > 1 and math.prod(node.shape[1:]) > 1 and image[1:] == (1, 1)
        if not is_image or layer is None or layer.kind != "conv" or layer.norm is not None:
            return place, image
        if layer.read[1:] != (1, 1) or layer.groups != 1:
            return place, image
        assert layer.weight is not None
        shape = channels, height, width = _image(node.shape)
        row, column = layer.weight.stride[:2]
        weight = replace(
            layer.weight,
            size=(layer.read[0], channels, height, width),
            stride=(column, height * width * row, width * row, row),
        )
        self.layers[place - 1] = replace(
            layer, kind="transposed", weight=weight, bias=None, shape=shape, kernel=shape[1:]
        )
        if layer.bias is None:
            return place, shape
        bias, _ = self._add(ImageLayer("constant", (), shape, shape, bias=layer.bias))
        return self._add(ImageLayer("pointwise", (place, bias), shape, shape))

    def _check_image(self, node: Node) -> None:
        if _image(self._shape(node.inputs[0])) != self._place(node.inputs[0])[1]:
            raise _Refused(f"{node.kind} reads values that have been viewed in another shape")

    def _activate(self, node: Node) -> tuple[int, Image]:
        """Add an activation to the layer before it, or as a layer if others read its input."""
        (value,) = node.inputs
        place, image = self._place(value)
        layer = self._alone(value)
        if layer is None:
            return self._add(ImageLayer("pointwise", (place,), image, image, activation=node))
        self.layers[place - 1] = replace(layer, activation=node)
        return place, image

    def _conv(self, layer: ImageLayer, node: Node) -> ImageLayer:
        weight, bias = node.constants
        assert weight is not None
        kind = "transposed" if node.kind == "transposed" else "conv"
        layer = replace(layer, kind=kind, weight=weight, bias=bias, shape=_image(node.shape))
        if node.kind == "linear":
            if self._shape(node.inputs[0]) != (math.prod(layer.read),):
                raise _Refused("linear reads values that have been viewed in another shape")
            return replace(layer, kernel=layer.read[1:])
        self._check_image(node)
        *geometry, groups = node.settings
        if node.kind == "transposed":
            del geometry[2]  # the padding of the output is in its shape
        missing = 2 - len(geometry[0])  # a convolution of sequences has no vertical dimension
        kernel, stride, padding, dilation = (
            (*neutral[:missing], *sizes)
            for neutral, sizes in zip(
                ((1,), (1,), (0,), (1,)), (weight.tensor().shape[2:], *geometry), strict=True
            )
        )
        return replace(
            layer, kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups
        )

    def _conv_of_parts(self, node: Node) -> tuple[int, Image]:
        """Add a convolution or linear layer that reads a cat, as a sum over the parts.

        The terms of constants are computed once per call.
        """
        weight, bias = node.constants
        assert weight is not None
        if node.kind == "conv" and node.settings[-1] != 1:
            raise _Refused("cat in front of a convolution with groups is not supported")
        cat = self.graph.nodes[node.inputs[0] - 1]
        firsts = itertools.accumulate(cat.settings, initial=0)
        parts = list(zip(cat.inputs, firsts, cat.settings, strict=False))
        parts.sort(key=lambda part: self._kind(part[0]) == "constant")
        total: tuple[int, Image] | None = None
        for value, first, size in parts:
            sizes = weight.size[0], size, *weight.size[2:]
            offset = weight.offset + first * weight.stride[1]
            part = replace(
                node,
                inputs=(value,),
                constants=(
                    replace(weight, size=sizes, offset=offset),
                    bias if total is None else None,
                ),
            )
            if self._kind(value) == "constant":
                term = self._add(self._constant(value, _image(node.shape), part))
            else:
                place, image = self._place(value)
                term = self._add(self._conv(ImageLayer("pointwise", (place,), image, image), part))
            if total is not None:
                inputs, image = (total[0], term[0]), total[1]
                term = self._add(ImageLayer("pointwise", inputs, image, image))
            total = term
        assert total is not None
        return total

    def _all_pixels(self, image: Image, node: Node) -> Links:
        """Return the links of a sum or mean over all pixels."""
        if node.settings[0] != tuple(range(2, len(self._shape(node.inputs[0])) + 1)):
            raise _Refused(f"{node.kind} is supported only over all pixels of a channel")
        pixels = image[1] * image[2]
        factor = 1 / pixels if node.kind == "mean" else 1.0
        return tuple((0, pixel, factor) for pixel in range(pixels))

    def _scale(self, layer: ImageLayer, node: Node) -> ImageLayer:
        layer = replace(layer, factors=(node.settings[0], 1.0))
        if not node.constants:
            return layer
        self._check_image(node)
        (constant,) = node.constants
        assert constant is not None
        size = constant.size[-len(node.shape) :]
        if math.prod(size) != 1 and (len(size) != len(node.shape) or math.prod(size[1:]) != 1):
            raise _Refused("scale has a constant that differs between pixels")
        return replace(layer, weight=constant)

    def _normalise(self, layer: ImageLayer, node: Node) -> tuple[int, Image]:
        """Add a batch norm to the convolution before it, or as a layer if others read its input."""
        self._check_image(node)
        (value,) = node.inputs
        place, image = self._place(value)
        before = self._alone(value)
        if before is None or before.kind != "conv" or before.norm is not None:
            return self._add(replace(layer, norm=node))
        self.layers[place - 1] = replace(before, norm=node)
        return place, image

    def _alone(self, value: int) -> ImageLayer | None:
        """Return the layer of a value if it has no activation and only one node reads the value."""
        place, _ = self._place(value)
        layer = self.layers[place - 1] if place else None
        read_once = self.uses[self.flow.memory[value]] == 1
        return layer if layer and not layer.activation and read_once else None


def _image(shape: tuple[int, ...]) -> Image:
    """Return the image of a value of this shape."""
    if len(shape) > 3:
        raise _Refused(f"a value of shape {list(shape)} is not an image [C, H, W]")
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if len(shape) == 2:
        return shape[0], 1, shape[1]
    return (shape[0] if shape else 1), 1, 1


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


def _pool_windows(image: Image, node: Node) -> Links:
    """Return the links of avg_pool2d, by its definition."""
    kernel, stride, padding, _, counted, divisor = node.settings
    axes = []
    for axis in range(2):
        size, pad = image[1 + axis], padding[axis]
        windows = []
        for o in range(node.shape[1 + axis]):
            first = o * stride[axis] - pad
            last = min(first + kernel[axis], size + pad)
            windows.append((range(max(first, 0), min(last, size)), last - first))
        axes.append(windows)
    links = []
    for pixel, ((rows, tall), (columns, wide)) in enumerate(itertools.product(*axes)):
        count = divisor or (tall * wide if counted else len(rows) * len(columns))
        links += [(pixel, y * image[2] + x, 1 / count) for y in rows for x in columns]
    return tuple(links)


def _interpolation(image: Image, node: Node) -> Links:
    """Return the links of an interpolation, which weighs rows and columns independently."""
    shares = []
    for axis in range(2):
        # A row (or column) of ones at a time: its share in every row of the result.
        size = image[1 + axis]
        ones = torch.eye(size, dtype=torch.float32, device="cpu").view(
            (size, 1, -1, 1) if axis == 0 else (size, 1, 1, -1)
        )
        ones = ones.expand(size, 1, *image[1:])
        out = run_linear(node, ones)[:, 0]
        share = (out[:, :, 0] if axis == 0 else out[:, 0]).T
        shares.append([[(k, float(row[k])) for k in row.nonzero()[:, 0].tolist()] for row in share])
    return tuple(
        (pixel, y * image[2] + x, tall * wide)
        for pixel, (rows, columns) in enumerate(itertools.product(*shares))
        for (y, tall), (x, wide) in itertools.product(rows, columns)
    )


def _max_windows(image: Image, node: Node) -> Links:
    """Return the links of max_pool2d; the factors count a window's pixels in torch's order."""
    kernel, stride, padding, dilation, _ = node.settings
    axes = []
    for axis in range(2):
        firsts = [o * stride[axis] - padding[axis] for o in range(node.shape[1 + axis])]
        reach = range(0, dilation[axis] * kernel[axis], dilation[axis])
        axes.append([[f + r for r in reach if 0 <= f + r < image[1 + axis]] for f in firsts])
    return tuple(
        (pixel, y * image[2] + x, float(number))
        for pixel, (rows, columns) in enumerate(itertools.product(*axes))
        for number, (y, x) in enumerate(itertools.product(rows, columns))
    )
