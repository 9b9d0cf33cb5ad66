"""Convolutional stacks: the form in which the fused GPU engine reads a graph."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlangevin.gradients.graph.aten_ops import ACTIVATIONS, NONLINEAR
from fastlangevin.gradients.graph.ir import Constant, Graph, Node


@dataclass(frozen=True)
class StackedActivation:
    """An activation of a stack.

    ``kind`` (``settings``) is leaky_relu (slope), relu, silu, softplus (beta, threshold), elu
    (alpha), gelu (1.0 for the tanh form, else 0.0) or tanh.
    """

    kind: str
    settings: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class StackedConv:
    """A convolution and the activation after it.

    A Linear is a convolution whose kernel has the size of its input. ``weight``
    [out, in / groups, kh, kw] and ``bias`` [out] are the parameters themselves or views of them.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    activation: StackedActivation

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

    shape: tuple[int, int, int]  # shape of one chain's state
    convs: tuple[StackedConv, ...]
    features: tuple[int, int, int]  # shape of h
    tail: tuple[Node, ...]  # the linear tail; its value 0 is h, viewed in tail_shape
    tail_shape: tuple[int, ...]

    def head(self) -> tuple[Tensor, Tensor]:
        """Return v, in the shape of ``features``, and c [], from the current weights."""
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
    """Run a linear or affine node on a batch."""
    settings = node.settings
    if node.kind in ("conv", "linear"):
        weight, bias = node.constants
        assert weight is not None
        offset = None if bias is None else bias.tensor()
        if node.kind == "linear":
            return F.linear(x, weight.tensor(), offset)
        stride, padding, dilation, groups = settings
        convolve = torch.conv1d if x.ndim == 3 else torch.conv2d
        return convolve(x, weight.tensor(), offset, stride, padding, dilation, groups)
    if node.kind == "transposed":
        weight, bias = node.constants
        assert weight is not None
        offset = None if bias is None else bias.tensor()
        stride, padding, added, dilation, groups = settings
        transposed = torch.conv_transpose1d if x.ndim == 3 else torch.conv_transpose2d
        return transposed(x, weight.tensor(), offset, stride, padding, added, groups, dilation)
    if node.kind == "upsample":
        return getattr(torch.ops.aten, settings[0])(x, node.shape[1:], *settings[1:])
    if node.kind == "add":
        return torch.add(x, *others, alpha=settings[0])
    if node.kind == "cat":
        return torch.cat((x, *others), 1)
    if node.kind == "view":
        return x.reshape(x.shape[0], *node.shape)
    if node.kind in ("mean", "sum"):
        return getattr(torch, node.kind)(x, settings[0], settings[1])
    if node.kind == "avg_pool":
        return F.avg_pool2d(x, *settings)
    constants = [None if c is None else c.tensor() for c in node.constants]
    if node.kind == "batch_norm":
        factor, shift, mean, variance = constants
        return F.batch_norm(x, mean, variance, factor, shift, eps=settings[0])
    assert node.kind == "scale", node.kind
    return x * settings[0] * (constants[0] if constants else 1)


def conv_stack(graph: Graph) -> ConvStack | str:
    """Return a graph as a stack of convolutions, or the reason why it is not one."""
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
    image: tuple[int, ...] = graph.shape  # shape of the values before any view
    convs: list[StackedConv] = []
    pending: Node | None = None
    for k, node in enumerate(graph.nodes[:last], 1):
        if node.inputs != (k - 1,):
            return f"it is not a single chain of operations ({node.kind})"
        if node.kind in ("conv", "linear"):
            if pending is not None:
                convs.append(_stacked(pending, image, _IDENTITY))
                image = _output(pending)
            read = graph.input_shape(node)
            if read != (image if node.kind == "conv" else (math.prod(image),)):
                return f"{node.kind} reads values that have been viewed in another shape"
            pending = node
        elif node.kind in ACTIVATIONS:
            if pending is None:
                return f"{node.kind} does not follow a convolution or linear layer"
            if node.kind == "silu" and node.settings:
                return "silu has a factor"
            activation = StackedActivation(node.kind, node.settings)
            convs.append(_stacked(pending, image, activation))
            image, pending = _output(pending), None
        elif node.kind != "view":
            return f"{node.kind} stands between convolutions"
    renumbered = tuple(
        Node(n.kind, tuple(i - last for i in n.inputs), n.shape, n.settings, n.constants)
        for n in tail
    )
    shape = graph.shape
    features = (image[0], image[1], image[2])
    return ConvStack(
        (shape[0], shape[1], shape[2]),
        tuple(convs),
        features,
        renumbered,
        graph.nodes[last - 1].shape,
    )


_IDENTITY = StackedActivation("leaky_relu", (1.0,))  # for a convolution without an activation


def _output(node: Node) -> tuple[int, ...]:
    return node.shape if node.kind == "conv" else (*node.shape, 1, 1)


def _stacked(node: Node, image: tuple[int, ...], activation: StackedActivation) -> StackedConv:
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
    """Return a matrix [out, C H W] as a kernel [out, C, H, W] in the same memory."""
    (out, _), (row, column), (c, h, w) = weight.size, weight.stride, image
    strides = (row, h * w * column, w * column, column)
    return replace(weight, size=(out, c, h, w), stride=strides)
