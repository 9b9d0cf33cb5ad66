"""Stacks of convolutions, the image graphs that the fused GPU engine runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastlangevin.gradients.graph.aten_ops import ACTIVATIONS
from fastlangevin.gradients.graph.ir import Graph, Node
from fastlangevin.gradients.image_graph import Image, ImageGraph, ImageLayer
from fastlangevin.gradients.image_lowering import image_graph
from fastlangevin.gradients.passes import Dataflow

_IDENTITY = Node("leaky_relu", (), (), (1.0,))
_KINDS = {"conv", "linear", "view", *ACTIVATIONS}  # of the nodes before the linear tail


@dataclass(frozen=True, eq=False)
class StackedConv:
    """A convolution and the activation after it.

    A Linear is a convolution whose kernel has the size of its input. ``weight``
    [out, in / groups, kh, kw] and ``bias`` [out] are the parameters themselves or views of them.
    ``activation`` has a kind and settings.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    activation: Node

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Return the height and width of the output for an input of this height and width."""
        height, width = (
            (size[i] + 2 * self.padding[i] - self.dilation[i] * (self.weight.shape[2 + i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(2)
        )
        return height, width


@dataclass(frozen=True, eq=False)
class ConvStack:
    """Convolutions with activations, then a linear tail: a chain's energy is <h, v> + c.

    h is the output of the last activation.
    """

    shape: Image  # shape of one chain's state
    convs: tuple[StackedConv, ...]
    features: Image  # shape of h
    network: ImageGraph
    graph: Graph

    def head(self) -> tuple[Tensor, Tensor]:
        """Return v, in the shape of ``features``, and c [], from the current weights."""
        (v,), c = self.network.linear_tail(self.graph)
        return v, c


def conv_stack(graph: Graph) -> ConvStack | str:
    """Return a graph as a stack of convolutions, or the reason why it is not one."""
    if len(graph.shape) != 3:
        return f"a state of shape {list(graph.shape)} is not an image [C, H, W]"
    for node, is_tail in zip(graph.nodes, Dataflow(graph).constant[1:], strict=True):
        if not is_tail and node.kind not in _KINDS:
            return f"{node.kind} is not a convolution, a linear layer or an activation"
    network = image_graph(graph, views_state=False)
    if isinstance(network, str):
        return network
    layers = network.layers
    if [place.number for place, _ in network.heads] != [len(layers)]:
        return "a value before the last activation is read again after it"
    for k, layer in enumerate(layers):
        if layer.inputs != (k,):
            return "it is not a single chain of operations"
        if layer.kind == "transposed":
            return "the output of a linear layer is viewed as an image"
        if layer.kind != "conv":
            return "an activation does not follow a convolution or linear layer"
        activation = layer.activation
        if activation and activation.kind == "silu" and activation.settings:
            return "silu has a factor"
    convs = tuple(map(_stacked, layers))
    return ConvStack(network.state.image, convs, layers[-1].shape, network, graph)


def _stacked(layer: ImageLayer) -> StackedConv:
    weight, bias, _ = layer.parameters()
    assert weight is not None
    geometry = layer.stride, layer.padding, layer.dilation
    return StackedConv(weight, bias, *geometry, layer.groups, layer.activation or _IDENTITY)
