"""Convolutional stacks: what the engines for them read, and how a graph is seen to be one."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlangevin.gradients.graph.aten_ops import ACTIVATIONS, NONLINEAR
from fastlangevin.gradients.graph.ir import Constant, Graph, Node
from fastlangevin.gradients.graph.record import recognise

__all__ = ["Activation", "ConvStack", "Graph", "StackedConv", "conv_stack", "recognise"]

_LINEAR = frozenset(("conv", "linear", "add", "view", "mean", "sum", "avg_pool", "scale"))


@dataclass(frozen=True)
class Activation:
    """leaky_relu (slope), relu, silu, softplus (beta, threshold), elu (alpha), gelu (1.0 for the
    tanh form, else 0.0) or tanh."""

    kind: str
    settings: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class StackedConv:
    """A convolution and the activation after it. A Linear is one of the size of what it reads.

    weight [out, in / groups, kh, kw] and bias [out] are the parameters themselves or views of them.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    activation: Activation


@dataclass(frozen=True, eq=False)
class ConvStack:
    """Convolutions with activations, and a linear rest: the energy of a chain is <h, v> + c."""

    shape: tuple[int, int, int]  # of one chain's state
    convs: tuple[StackedConv, ...]
    features: tuple[int, int, int]  # h: the shape after the last activation
    tail: tuple[Node, ...]  # the linear rest; its value 0 is h, in the shape tail_shape
    tail_shape: tuple[int, ...]

    def head(self) -> tuple[Tensor, Tensor]:
        """v, in the shape of features, and c [], from the weights as they are now."""
        weight = self.convs[0].weight
        h = torch.zeros((1, *self.tail_shape), dtype=weight.dtype, device=weight.device)
        with torch.enable_grad(), torch.autocast(h.device.type, enabled=False):
            h.requires_grad_()
            values = [h]
            for node in self.tail:
                values.append(run_linear(node, *(values[i] for i in node.inputs)))
            (v,) = torch.autograd.grad(values[-1].sum(), h)
        return v.view(self.features), values[-1].detach().reshape(())


def run_linear(node: Node, x: Tensor, *others: Tensor) -> Tensor:
    """A linear or affine node on a batch, in plain torch."""
    settings = node.settings
    if node.kind in ("conv", "linear"):
        weight, bias = node.constants
        assert weight is not None
        offset = None if bias is None else bias.tensor()
        if node.kind == "linear":
            return F.linear(x, weight.tensor(), offset)
        stride, padding, dilation, groups = settings
        return torch.conv2d(x, weight.tensor(), offset, stride, padding, dilation, groups)
    if node.kind == "add":
        return torch.add(x, *others, alpha=settings[0])
    if node.kind == "view":
        return x.reshape(x.shape[0], *node.shape)
    if node.kind in ("mean", "sum"):
        return getattr(torch, node.kind)(x, settings[0], settings[1])
    if node.kind == "avg_pool":
        return F.avg_pool2d(x, *settings)
    assert node.kind == "scale", node.kind
    return x * settings[0]


def conv_stack(graph: Graph) -> ConvStack | str:
    """A graph as a stack of convolutions, or why it is none."""
    if len(graph.shape) != 3:
        return f"a state of shape {list(graph.shape)} is not an image [C, H, W]"
    last = max((k for k, n in enumerate(graph.nodes, 1) if n.kind in ACTIVATIONS), default=0)
    if not last:
        return "it has no activation"
    tail = graph.nodes[last:]
    if any(node.kind in NONLINEAR for node in tail):
        return "what follows the last activation is not linear"
    if any(i < last for node in tail for i in node.inputs):
        return "a value before the last activation is read again after it"
    image: tuple[int, ...] = graph.shape  # the layout of the values, however they are viewed
    convs: list[StackedConv] = []
    pending: Node | None = None
    for k, node in enumerate(graph.nodes[:last], 1):
        if node.inputs != (k - 1,):
            return f"it is not a single chain of operations ({node.kind})"
        if node.kind in ("conv", "linear"):
            if pending is not None:
                convs.append(_stacked(pending, image, _NONE))
                image = _output(pending)
            read = graph.input_shape(node)
            if read != (image if node.kind == "conv" else (math.prod(image),)):
                return f"{node.kind} reads values that have been viewed in another shape"
            pending = node
        elif node.kind in ACTIVATIONS:
            if pending is None:
                return f"{node.kind} does not follow a convolution or linear layer"
            activation = Activation(node.kind, node.settings)
            convs.append(_stacked(pending, image, activation))
            image, pending = _output(pending), None
        elif node.kind != "view":
            return f"{node.kind} stands between convolutions"
    moved = tuple(
        Node(n.kind, tuple(i - last for i in n.inputs), n.shape, n.settings, n.constants)
        for n in tail
    )
    shape = graph.shape
    features = (image[0], image[1], image[2])
    return ConvStack(
        (shape[0], shape[1], shape[2]), tuple(convs), features, moved, graph.nodes[last - 1].shape
    )


_NONE = Activation("leaky_relu", (1.0,))  # between two convolutions without one


def _output(node: Node) -> tuple[int, ...]:
    return node.shape if node.kind == "conv" else (*node.shape, 1, 1)


def _stacked(node: Node, image: tuple[int, ...], activation: Activation) -> StackedConv:
    weight, bias = node.constants
    assert weight is not None
    offset = None if bias is None else bias.tensor()
    if node.kind == "conv":
        stride, padding, dilation, groups = node.settings
        return StackedConv(weight.tensor(), offset, stride, padding, dilation, groups, activation)
    return StackedConv(
        _as_conv(weight, image).tensor(), offset, (1, 1), (0, 0), (1, 1), 1, activation
    )


def _as_conv(weight: Constant, image: tuple[int, ...]) -> Constant:
    """A matrix [out, C H W] as a kernel [out, C, H, W], in place."""
    (out, _), (row, column), (c, h, w) = weight.size, weight.stride, image
    strides = (row, h * w * column, w * column, column)
    return Constant(weight.base, (out, c, h, w), strides, weight.offset)
