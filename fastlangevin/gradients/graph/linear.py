"""Linear and affine nodes of a graph in torch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlangevin.gradients.graph.ir import Node


def run_linear(node: Node, x: Tensor, *others: Tensor) -> Tensor:
    """Run a linear or affine node on a batch."""
    settings = node.settings
    if node.kind in ("conv", "linear", "transposed"):
        weight, bias = node.constants
        assert weight is not None
        offset = None if bias is None else bias.tensor()
        if node.kind == "linear":
            return F.linear(x, weight.tensor(), offset)
        if node.kind == "transposed":
            stride, padding, added, dilation, groups = settings
            transposed = torch.conv_transpose1d if x.ndim == 3 else torch.conv_transpose2d
            return transposed(x, weight.tensor(), offset, stride, padding, added, groups, dilation)
        stride, padding, dilation, groups = settings
        convolve = torch.conv1d if x.ndim == 3 else torch.conv2d
        return convolve(x, weight.tensor(), offset, stride, padding, dilation, groups)
    if node.kind == "upsample":
        return getattr(torch.ops.aten, settings[0])(x, node.shape[1:], *settings[1:])
    if node.kind == "add":
        return torch.add(x, *others, alpha=settings[0])
    if node.kind == "cat":
        return torch.cat((x, *others), 1)
    if node.kind == "view":
        return x.reshape(x.shape[0], *node.shape)
    if node.kind == "permute":
        return x.permute(0, *(dim + 1 for dim in settings))
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
