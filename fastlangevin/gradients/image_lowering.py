"""Lowers a graph to layers over images, for the fused CPU engine."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch

from fastlangevin.gradients.graph.aten_ops import ACTIVATIONS
from fastlangevin.gradients.graph.ir import Graph, Node
from fastlangevin.gradients.graph.linear import run_linear
from fastlangevin.gradients.image_graph import Image, ImageGraph, ImageLayer, Link
from fastlangevin.gradients.passes import Dataflow

Place = tuple[int, Image]  # the number of a value, and its image


def image_graph(graph: Graph, views_state: bool = True) -> ImageGraph | str:
    """Return a graph as layers over images, or the reason why it has no such form.

    With ``views_state``, a state that is read through one view only has the shape of the view.
    """
    key = f"image_graph, views_state={views_state}"
    lowered: ImageGraph | str | None = graph.derived.get(key)
    if lowered is None:
        lowered = graph.derived[key] = _lowered(graph, views_state)
    return lowered


def _lowered(graph: Graph, views_state: bool) -> ImageGraph | str:
    flow = Dataflow(graph)
    if all(flow.constant[1:]):
        return "it has no activation"
    try:
        return _Lowering(graph, flow, views_state).result()
    except _NoImageForm as error:
        return str(error)


class _NoImageForm(Exception):
    """Says why a graph has no form as layers over images."""


class _Lowering:
    def __init__(self, graph: Graph, flow: Dataflow, views_state: bool) -> None:
        self.graph, self.flow = graph, flow
        self.layers: list[ImageLayer] = []
        shape = self._viewed_shape() if views_state else graph.shape
        self.places: dict[int, Place] = {0: (0, _image(shape))}
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
            if constant[k] or node.kind in ("constant", "cat"):
                continue
            if node.kind in ACTIVATIONS:
                self.places[k] = self._activation(node)
            elif node.kind in self._LOWER:
                self.places[k] = self._LOWER[node.kind](self, node)
            else:
                raise _NoImageForm(f"no kernel has the operation {node.kind}")
        tail = tuple(k for k in range(1, len(nodes) + 1) if constant[k])
        read = {i for k in tail for i in nodes[k - 1].inputs} or {len(nodes)}
        heads = tuple((*self._place(i), i) for i in sorted(read) if i == 0 or not constant[i])
        return ImageGraph(self.places[0][1], tuple(self.layers), heads, tail)

    def _viewed_shape(self) -> tuple[int, ...]:
        """Return the shape of the state: that of its view, if it is read through one only."""
        first = {k for k, node in enumerate(self.graph.nodes, 1) if 0 in node.inputs}
        views = {self.graph.nodes[k - 1].shape for k in first if self.flow.memory[k] == 0}
        only = len(views) == 1 and all(self.flow.memory[k] == 0 for k in first)
        return views.pop() if only else self.graph.shape

    def _kind(self, value: int) -> str:
        return self.graph.nodes[value - 1].kind if value else ""

    def _shape(self, value: int) -> tuple[int, ...]:
        return self.graph.nodes[value - 1].shape if value else self.graph.shape

    def _place(self, value: int) -> Place:
        """Return the number and the image of a value."""
        if self._kind(value) == "cat":
            raise _NoImageForm("cat is supported only in front of convolutions and linear layers")
        if self._kind(value) == "constant" and value not in self.places:
            self.places[value] = self._constant(value, _image(self._shape(value)))
        return self.places[value]

    def _image_of(self, node: Node) -> Image:
        """Return the image that a node reads, which must not be viewed in another shape."""
        image = self._place(node.inputs[0])[1]
        if _image(self._shape(node.inputs[0])) != image:
            raise _viewed(node)
        return image

    def _alone(self, value: int) -> ImageLayer | None:
        """Return the layer of a value if it has no activation and only one node reads the value."""
        place, _ = self._place(value)
        layer = self.layers[place - 1] if place else None
        read_once = self.uses[self.flow.memory[value]] == 1
        return layer if layer and not layer.activation and read_once else None

    def _append(self, layer: ImageLayer) -> Place:
        self.layers.append(layer)
        return len(self.layers), layer.shape

    def _add_layer(self, kind: str, node: Node, **fields: Any) -> Place:
        """Add a layer that reads a node's inputs; by default it has the first input's shape."""
        inputs = tuple(self._place(i)[0] for i in node.inputs)
        image = self._place(node.inputs[0])[1]
        return self._append(ImageLayer(kind, inputs, image, **({"shape": image} | fields)))

    def _constant(self, value: int, image: Image, through: Node | None = None) -> Place:
        layer = ImageLayer("constant", (), image, image, number=value, through=through)
        return self._append(layer)

    def _view(self, node: Node) -> Place:
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
        bias, _ = self._append(ImageLayer("constant", (), shape, shape, bias=layer.bias))
        return self._append(ImageLayer("pointwise", (place, bias), shape, shape))

    def _activation(self, node: Node) -> Place:
        """Add an activation to the layer before it, or as a layer if others read its input."""
        return self._join(node, self._alone(node.inputs[0]), activation=node)

    def _batch_norm(self, node: Node) -> Place:
        """Add a batch norm to the convolution before it, or as a layer if others read its input."""
        self._image_of(node)
        before = self._alone(node.inputs[0])
        joins = before is not None and before.kind == "conv" and before.norm is None
        return self._join(node, before if joins else None, norm=node)

    def _join(self, node: Node, before: ImageLayer | None, **fields: Node) -> Place:
        """Add a node to the layer before it, or as a layer of its own if ``before`` is None."""
        if before is None:
            return self._add_layer("pointwise", node, **fields)
        place, image = self._place(node.inputs[0])
        self.layers[place - 1] = replace(before, **fields)  # type: ignore[arg-type]
        return place, image

    def _conv(self, node: Node) -> Place:
        """Add a convolution, transposed or not, or a linear layer."""
        if self._kind(node.inputs[0]) == "cat" and node.kind != "transposed":
            return self._conv_of_parts(node)
        weight, bias = node.constants
        assert weight is not None
        kind = "transposed" if node.kind == "transposed" else "conv"
        fields: dict[str, Any] = {"weight": weight, "bias": bias, "shape": _image(node.shape)}
        if node.kind == "linear":
            image = self._place(node.inputs[0])[1]
            if self._shape(node.inputs[0]) != (math.prod(image),):
                raise _viewed(node)
            return self._add_layer(kind, node, kernel=image[1:], **fields)
        self._image_of(node)
        *geometry, fields["groups"] = node.settings
        if node.kind == "transposed":
            del geometry[2]  # the padding of the output is in its shape
        missing = 2 - len(geometry[0])  # a convolution of sequences has no vertical dimension
        for name, neutral, sizes in zip(
            ("kernel", "stride", "padding", "dilation"),
            ((1,), (1,), (0,), (1,)),
            (weight.tensor().shape[2:], *geometry),
            strict=True,
        ):
            fields[name] = (*neutral[:missing], *sizes)
        return self._add_layer(kind, node, **fields)

    def _conv_of_parts(self, node: Node) -> Place:
        """Add a convolution or linear layer that reads a cat, as a sum over the parts.

        The terms of constants are computed once per call.
        """
        weight, bias = node.constants
        assert weight is not None
        if node.kind == "conv" and node.settings[-1] != 1:
            raise _NoImageForm("cat in front of a convolution with groups is not supported")
        cat = self.graph.nodes[node.inputs[0] - 1]
        firsts = itertools.accumulate(cat.settings, initial=0)
        parts = list(zip(cat.inputs, firsts, cat.settings, strict=False))
        parts.sort(key=lambda part: self._kind(part[0]) == "constant")
        total: Place | None = None
        for value, first, size in parts:
            sizes = weight.size[0], size, *weight.size[2:]
            offset = weight.offset + first * weight.stride[1]
            columns = replace(weight, size=sizes, offset=offset)
            constants = columns, bias if total is None else None
            part = replace(node, inputs=(value,), constants=constants)
            if self._kind(value) == "constant":
                term = self._constant(value, _image(node.shape), part)
            else:
                term = self._conv(part)
            if total is not None:
                inputs, image = (total[0], term[0]), total[1]
                term = self._append(ImageLayer("pointwise", inputs, image, image))
            total = term
        assert total is not None
        return total

    def _combine(self, node: Node) -> Place:
        """Add a sum or product of two values."""
        image, other = (self._place(value)[1] for value in node.inputs)
        is_broadcast = self._kind(node.inputs[1]) == "constant" and other[1:] == (1, 1)
        if other != ((image[0], 1, 1) if is_broadcast else image):
            raise _viewed(node)
        kind = "pointwise" if node.kind == "add" else "multiply"
        return self._add_layer(kind, node, factors=(1.0, *node.settings, 1.0)[:2])

    def _scale(self, node: Node) -> Place:
        constant = node.constants[0] if node.constants else None
        if constant is not None:
            self._image_of(node)
            size = constant.size[-len(node.shape) :]
            if math.prod(size) != 1 and (len(size) != len(node.shape) or math.prod(size[1:]) != 1):
                raise _NoImageForm("scale has a constant that differs between pixels")
        return self._add_layer("pointwise", node, factors=(node.settings[0], 1.0), weight=constant)

    def _group_norm(self, node: Node) -> Place:
        self._image_of(node)
        (weight, bias), (groups, eps) = node.constants, node.settings
        return self._add_layer(
            "norm", node, weight=weight, bias=bias, groups=groups, factors=(eps, 1.0)
        )

    def _max_pool(self, node: Node) -> Place:
        links = _max_windows(self._image_of(node), node)
        return self._add_layer("max_pool", node, shape=_image(node.shape), links=links)

    def _mix(self, node: Node) -> Place:
        """Add a layer that computes each pixel of a channel as a sum over pixels of the channel."""
        image = self._image_of(node)
        if node.kind == "avg_pool":
            links = _pool_windows(image, node)
        elif node.kind == "upsample":
            links = _interpolation(image, node)
        else:
            links = self._all_pixels(image, node)
        return self._add_layer("mix", node, shape=_image(node.shape), links=links)

    def _all_pixels(self, image: Image, node: Node) -> tuple[Link, ...]:
        """Return the links of a sum or mean over all pixels."""
        if node.settings[0] != tuple(range(2, len(self._shape(node.inputs[0])) + 1)):
            raise _NoImageForm(f"{node.kind} is supported only over all pixels of a channel")
        pixels = image[1] * image[2]
        factor = 1 / pixels if node.kind == "mean" else 1.0
        return tuple(Link(0, pixel, factor) for pixel in range(pixels))

    def _logsumexp(self, node: Node) -> Place:
        if len(node.settings[0]) != len(self._shape(node.inputs[0])):
            raise _NoImageForm("logsumexp is supported only over all of a chain's values")
        return self._add_layer("logsumexp", node, shape=(1, 1, 1))

    _LOWER: ClassVar[dict[str, Callable[["_Lowering", Node], Place]]] = {
        **dict.fromkeys(("conv", "linear", "transposed"), _conv),
        **dict.fromkeys(("add", "mul"), _combine),
        **dict.fromkeys(("avg_pool", "mean", "sum", "upsample"), _mix),
        "batch_norm": _batch_norm,
        "group_norm": _group_norm,
        "logsumexp": _logsumexp,
        "max_pool": _max_pool,
        "scale": _scale,
        "view": _view,
    }


def _viewed(node: Node) -> _NoImageForm:
    return _NoImageForm(f"{node.kind} reads values that have been viewed in another shape")


def _image(shape: tuple[int, ...]) -> Image:
    """Return the image of a value of this shape."""
    if len(shape) > 3:
        raise _NoImageForm(f"a value of shape {list(shape)} is not an image [C, H, W]")
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if len(shape) == 2:
        return shape[0], 1, shape[1]
    return (shape[0] if shape else 1), 1, 1


def _pool_windows(image: Image, node: Node) -> tuple[Link, ...]:
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
        links += [Link(pixel, y * image[2] + x, 1 / count) for y in rows for x in columns]
    return tuple(links)


def _interpolation(image: Image, node: Node) -> tuple[Link, ...]:
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
        Link(pixel, y * image[2] + x, tall * wide)
        for pixel, (rows, columns) in enumerate(itertools.product(*shares))
        for (y, tall), (x, wide) in itertools.product(rows, columns)
    )


def _max_windows(image: Image, node: Node) -> tuple[Link, ...]:
    """Return the links of max_pool2d; the factors are positions in the window."""
    kernel, stride, padding, dilation, _ = node.settings
    axes = []
    for axis in range(2):
        firsts = [o * stride[axis] - padding[axis] for o in range(node.shape[1 + axis])]
        reach = range(0, dilation[axis] * kernel[axis], dilation[axis])
        axes.append([[f + r for r in reach if 0 <= f + r < image[1 + axis]] for f in firsts])
    return tuple(
        Link(pixel, y * image[2] + x, float(position))
        for pixel, (rows, columns) in enumerate(itertools.product(*axes))
        for position, (y, x) in enumerate(itertools.product(rows, columns))
    )
