"""Lowers a graph to layers over images, for the fused CPU engine."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from fastlangevin.gradients.graph.aten_ops import ACTIVATIONS
from fastlangevin.gradients.graph.ir import Constant, Graph, Node
from fastlangevin.gradients.image_graph import (
    Image,
    ImageGraph,
    ImageLayer,
    Link,
    Place,
    axes_of,
)
from fastlangevin.gradients.image_links import interpolation, max_windows, pool_windows
from fastlangevin.gradients.passes import Dataflow


def image_graph(graph: Graph, views_state: bool = True) -> ImageGraph | str:
    """Return a graph as layers over images, or the reason why it has no such form.

    With ``views_state``, a state that is read through one view only has the shape of the view, and
    its dimensions may be those of an image in another order.
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
    shape = _viewed_shape(graph) if views_state else graph.shape
    # The order of the state's dimensions is that of the image for most graphs.
    orders = [tuple(range(len(shape)))]
    if views_state:
        orders += _other_orders(graph, flow, shape)
    reason = ""
    for order in orders:
        try:
            return _Lowering(graph, flow, shape, order).result()
        except _NoImageForm as error:
            reason = str(error)
    return reason


def _viewed_shape(graph: Graph) -> tuple[int, ...]:
    """Return the shape of the state: that of its view, if it is read through one only."""
    first = [node for node in graph.nodes if 0 in node.inputs]
    views = {node.shape for node in first if node.kind == "view"}
    only = len(views) == 1 and all(node.kind == "view" for node in first)
    return views.pop() if only else graph.shape


def _other_orders(graph: Graph, flow: Dataflow, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the orders of the state's dimensions in which layers may read it as an image."""
    orders = []
    for node in graph.nodes:
        if not node.inputs or flow.memory[node.inputs[0]] != 0 or graph.input_shape(node) != shape:
            continue
        if node.kind == "permute":
            orders.append(node.settings)
        elif node.kind == "linear" and len(shape) > 1:
            orders.append((len(shape) - 1, *range(len(shape) - 1)))
    return list(dict.fromkeys(orders))


class _NoImageForm(Exception):
    """Says why a graph has no form as layers over images."""


class _Lowering:
    """Lowers a graph; the state [*shape] is an image if its dimensions are put in an order."""

    def __init__(
        self, graph: Graph, flow: Dataflow, shape: tuple[int, ...], order: tuple[int, ...]
    ) -> None:
        self.graph, self.flow = graph, flow
        self.layers: list[ImageLayer] = []
        self.places: dict[int, Place] = {0: _state(shape, order)}
        # How often a value is read, under any view of it.
        self.uses = [0] * (len(graph.nodes) + 1)
        for k, node in enumerate(graph.nodes, 1):
            if node.kind not in ("permute", "view"):
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
        heads = tuple((self._place(i), i) for i in sorted(read) if i == 0 or not constant[i])
        return ImageGraph(self.places[0], tuple(self.layers), heads, tail)

    def _kind(self, value: int) -> str:
        return self.graph.nodes[value - 1].kind if value else ""

    def _shape(self, value: int) -> tuple[int, ...]:
        return self.graph.nodes[value - 1].shape if value else self.graph.shape

    def _place(self, value: int) -> Place:
        """Return the place of a value."""
        if self._kind(value) == "cat":
            raise _NoImageForm("cat is supported only in front of convolutions and linear layers")
        if self._kind(value) == "constant" and value not in self.places:
            self.places[value] = self._constant(value, _image(self._shape(value)))
        return self.places[value]

    def _image_of(self, node: Node) -> Image:
        """Return the image that a node reads, neither viewed in another shape nor permuted."""
        place = self._place(node.inputs[0])
        if place.is_permuted:
            raise _permuted(node)
        if _image(self._shape(node.inputs[0])) != place.image:
            raise _viewed(node)
        return place.image

    def _alone(self, value: int) -> ImageLayer | None:
        """Return the layer of a value if it has no activation and only one node reads the value."""
        number = self._place(value).number
        layer = self.layers[number - 1] if number else None
        read_once = self.uses[self.flow.memory[value]] == 1
        return layer if layer and not layer.activation and read_once else None

    def _append(self, layer: ImageLayer) -> Place:
        self.layers.append(layer)
        return Place(len(self.layers), layer.shape, axes_of(layer.shape))

    def _add_layer(self, kind: str, node: Node, **fields: Any) -> Place:
        """Add a layer that reads a node's inputs; by default its output is like the first input."""
        first = self._place(node.inputs[0])
        inputs = tuple(self._place(i).number for i in node.inputs)
        place = self._append(
            ImageLayer(kind, inputs, first.image, **({"shape": first.image} | fields))
        )
        return place if "shape" in fields else place._replace(axes=first.axes)

    def _constant(
        self,
        value: int,
        image: Image,
        axes: tuple[int, ...] | None = None,
        through: Node | None = None,
    ) -> Place:
        axes = axes_of(image) if axes is None else axes
        layer = ImageLayer("constant", (), image, image, number=value, axes=axes, through=through)
        return self._append(layer)._replace(axes=axes)

    def _view(self, node: Node) -> Place:
        """Return the place of a view.

        A linear layer whose result is viewed as an image alone becomes a transposed convolution of
        one pixel, since channels are stored next to each other.
        """
        (value,) = node.inputs
        place, layer = self._place(value), self._alone(value)
        number, image, _ = place
        is_image = len(node.shape) > 1 and math.prod(node.shape[1:]) > 1 and image[1:] == (1, 1)
        if not is_image or layer is None or layer.kind != "conv" or layer.norm is not None:
            return place
        is_linear = layer.kernel == (1, 1) and layer.padding == (0, 0)
        if layer.read[1:] != (1, 1) or layer.groups != 1 or not is_linear:
            return place
        assert layer.weight is not None
        shape = channels, height, width = _image(node.shape)
        row, column = layer.weight.stride[:2]
        weight = replace(
            layer.weight,
            size=(layer.read[0], channels, height, width),
            stride=(column, height * width * row, width * row, row),
        )
        self.layers[number - 1] = replace(
            layer, kind="transposed", weight=weight, bias=None, shape=shape, kernel=shape[1:]
        )
        if layer.bias is None:
            return Place(number, shape, axes_of(shape))
        bias = self._append(ImageLayer("constant", (), shape, shape, bias=layer.bias))
        return self._append(ImageLayer("pointwise", (number, bias.number), shape, shape))

    def _permute(self, node: Node) -> Place:
        """Return the place of a permuted value: the same image, its axes in another order."""
        axes = self._dims(node)
        order = (axis for dim in node.settings for axis in axes[dim])
        return self._place(node.inputs[0])._replace(axes=tuple(order))

    def _dims(self, node: Node) -> list[tuple[int, ...]]:
        """Return the axes of the image that each dimension of a node's first input consists of.

        An axis of size 1 belongs to no dimension.
        """
        place = self._place(node.inputs[0])
        axes, dims = list(place.axes), []
        for size in self._shape(node.inputs[0]):
            dim: list[int] = []
            while axes and math.prod(place.image[axis] for axis in dim) < size:
                dim.append(axes.pop(0))
            if math.prod(place.image[axis] for axis in dim) != size:
                raise _viewed(node)
            dims.append(tuple(dim))
        return dims

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
        place = self._place(node.inputs[0])
        self.layers[place.number - 1] = replace(before, **fields)  # type: ignore[arg-type]
        return place

    def _conv(self, node: Node) -> Place:
        """Add a convolution, transposed or not, or a linear layer."""
        if self._kind(node.inputs[0]) == "cat" and node.kind != "transposed":
            return self._conv_of_parts(node)
        if node.kind == "linear" and len(node.shape) > 1:
            return self._linear_of_pixels(node)
        weight, bias = node.constants
        assert weight is not None
        kind = "transposed" if node.kind == "transposed" else "conv"
        fields: dict[str, Any] = {"weight": weight, "bias": bias, "shape": _image(node.shape)}
        if node.kind == "linear":
            place = self._place(node.inputs[0])
            if self._shape(node.inputs[0]) != (math.prod(place.image),):
                raise _viewed(node)
            if place.is_permuted:
                fields["weight"] = _columns_as_image(weight, place)
            return self._add_layer(kind, node, kernel=place.image[1:], **fields)
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

    def _linear_of_pixels(self, node: Node) -> Place:
        """Add a linear layer over the last dimension as a 1x1 convolution, if that is channels."""
        place = self._place(node.inputs[0])
        weight, bias = node.constants
        assert weight is not None
        if self._dims(node)[-1] not in ((0,), ()) or weight.size[1] != place.image[0]:
            raise _NoImageForm("linear is supported only over channels or all of a chain's values")
        shape = node.shape[-1], *place.image[1:]
        lead = tuple(axis for axis in place.axes if axis != 0)
        out = self._add_layer("conv", node, weight=weight, bias=bias, shape=shape)
        return out._replace(axes=lead + (0,) * (shape[0] != 1))

    def _conv_of_parts(self, node: Node) -> Place:
        """Add a convolution or linear layer that reads a cat, as a sum over the parts.

        The terms of constants are computed once per call.
        """
        weight, bias = node.constants
        assert weight is not None
        if node.kind == "conv" and node.settings[-1] != 1:
            raise _NoImageForm("cat in front of a convolution with groups is not supported")
        if node.kind == "linear" and len(node.shape) > 1:
            raise _NoImageForm("cat in front of a linear layer is supported only of vectors")
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
                term = self._constant(value, _image(node.shape), through=part)
            else:
                term = self._conv(part)
            if total is not None:
                inputs, image = (total.number, term.number), total.image
                term = self._append(ImageLayer("pointwise", inputs, image, image))
            total = term
        assert total is not None
        return total

    def _combine(self, node: Node) -> Place:
        """Add a sum or product of two values."""
        one, two = node.inputs
        place, is_constant = self._place(one), self._kind(two) == "constant"
        if is_constant and place.is_permuted and self._shape(two) == self._shape(one):
            self.places[two] = self._constant(two, place.image, place.axes)
        other = self._place(two)
        if is_constant and other.image[1:] == (1, 1) and not place.is_permuted:
            place = Place(0, (place.image[0], 1, 1), other.axes)
        if other.image != place.image:
            raise _viewed(node)
        if other.axes != place.axes:
            raise _permuted(node)
        kind = "pointwise" if node.kind == "add" else "multiply"
        return self._add_layer(kind, node, factors=(1.0, *node.settings, 1.0)[:2])

    def _scale(self, node: Node) -> Place:
        constant = node.constants[0] if node.constants else None
        size = () if constant is None else constant.size[-len(node.shape) :]
        if math.prod(size) != 1:
            dims = self._dims(node)[-len(size) :]
            if any(n != 1 and dim != (0,) for n, dim in zip(size, dims, strict=True)):
                raise _NoImageForm("scale has a constant that differs between pixels")
        return self._add_layer("pointwise", node, factors=(node.settings[0], 1.0), weight=constant)

    def _group_norm(self, node: Node) -> Place:
        self._image_of(node)
        (weight, bias), (groups, eps) = node.constants, node.settings
        return self._add_layer(
            "norm", node, weight=weight, bias=bias, groups=groups, factors=(eps, 1.0)
        )

    def _max_pool(self, node: Node) -> Place:
        links = max_windows(self._image_of(node), node)
        return self._add_layer("max_pool", node, shape=_image(node.shape), links=links)

    def _mix(self, node: Node) -> Place:
        """Add a layer that computes each pixel of a channel as a sum over pixels of the channel."""
        image = self._image_of(node)
        links = pool_windows(image, node) if node.kind == "avg_pool" else interpolation(image, node)
        return self._add_layer("mix", node, shape=_image(node.shape), links=links)

    def _reduce(self, node: Node) -> Place:
        """Add a sum or mean over all pixels of a channel."""
        place, dims = self._place(node.inputs[0]), self._dims(node)
        reduced = {axis for dim in node.settings[0] for axis in dims[dim - 1]}
        if reduced != {axis for axis in place.axes if axis != 0}:
            raise _NoImageForm(f"{node.kind} is supported only over all pixels of a channel")
        channels, pixels = place.image[0], math.prod(place.image[1:])
        factor = 1 / pixels if node.kind == "mean" else 1.0
        links = tuple(Link(0, pixel, factor) for pixel in range(pixels))
        return self._add_layer("mix", node, shape=(channels, 1, 1), links=links)

    def _logsumexp(self, node: Node) -> Place:
        if len(node.settings[0]) != len(self._shape(node.inputs[0])):
            raise _NoImageForm("logsumexp is supported only over all of a chain's values")
        return self._add_layer("logsumexp", node, shape=(1, 1, 1))

    _LOWER: ClassVar[dict[str, Callable[["_Lowering", Node], Place]]] = {
        **dict.fromkeys(("conv", "linear", "transposed"), _conv),
        **dict.fromkeys(("add", "mul"), _combine),
        **dict.fromkeys(("avg_pool", "upsample"), _mix),
        **dict.fromkeys(("mean", "sum"), _reduce),
        "batch_norm": _batch_norm,
        "group_norm": _group_norm,
        "logsumexp": _logsumexp,
        "max_pool": _max_pool,
        "permute": _permute,
        "scale": _scale,
        "view": _view,
    }


def _viewed(node: Node) -> _NoImageForm:
    return _NoImageForm(f"{node.kind} reads values that have been viewed in another shape")


def _permuted(node: Node) -> _NoImageForm:
    return _NoImageForm(f"{node.kind} reads values whose dimensions have been permuted")


def _state(shape: tuple[int, ...], order: tuple[int, ...]) -> Place:
    """Return the place of a state whose dimensions are those of an image if put in this order."""
    image = _image(tuple(shape[dim] for dim in order))
    axes = {1: (0,), 2: (0, 2)}.get(len(shape), (0, 1, 2))
    of_dims = sorted(zip(order, axes, strict=False))
    return Place(0, image, tuple(axis for dim, axis in of_dims if shape[dim] != 1))


def _columns_as_image(weight: Constant, place: Place) -> Constant:
    """Return a linear layer's weight as [out, C, H, W]: it reads an image's axes in their order."""
    steps, step = [0, 0, 0], weight.stride[1]
    for axis in reversed(place.axes):
        steps[axis] = step
        step *= place.image[axis]
    size, stride = (weight.size[0], *place.image), (weight.stride[0], *steps)
    return replace(weight, size=size, stride=stride)


def _image(shape: tuple[int, ...]) -> Image:
    """Return the image of a value of this shape."""
    if len(shape) > 3:
        raise _NoImageForm(f"a value of shape {list(shape)} is not an image [C, H, W]")
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if len(shape) == 2:
        return shape[0], 1, shape[1]
    return (shape[0] if shape else 1), 1, 1
