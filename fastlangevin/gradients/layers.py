"""The layers of the explicit engine: each has a forward pass and an input gradient.

Values of four dimensions are in channels_last, others contiguous. A layer owns the gradient that
it is given, so it may change it in place and return it.
"""

import math

import torch
from torch import Tensor

from fastlangevin.gradients.graph.ir import Constant, Node
from fastlangevin.kernels.signs import apply_signs_, pack_signs

aten = torch.ops.aten


def laid_out(x: Tensor) -> Tensor:
    """Return x in the memory format of all values, copied only if it has another one."""
    if x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def read_weight(value: Tensor, dtype: torch.dtype, target: Tensor | None, inplace: bool) -> Tensor:
    """Return a weight in a dtype, possibly as the weight itself.

    With ``inplace`` it is copied to ``target``, or to new memory if that is None: a captured graph
    reads fixed addresses, and so sees new values there.
    """
    if not inplace:
        return value.to(dtype)
    if target is None:
        layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
        target = torch.empty(value.shape, dtype=dtype, device=value.device, memory_format=layout)
    return target.copy_(value)


def broadcast(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return x broadcast to a shape, as a new tensor in the memory format of all values."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    return out.copy_(x)


def scale_and_shift(node: Node) -> tuple[Tensor, Tensor]:
    """Return a batch norm in eval mode as factors and shifts of channels, in the weights' dtype."""
    weight, bias, mean, variance = (None if c is None else c.tensor() for c in node.constants)
    assert mean is not None
    assert variance is not None
    scale = (variance + node.settings[0]).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


class WithWeights:
    """Reads the weight and the bias of a node, as far as it has them."""

    weight: Tensor | None = None
    bias: Tensor | None = None

    def __init__(self, node: Node, dtype: torch.dtype, inplace: bool = False) -> None:
        self.weight_read, self.bias_read = node.constants
        self.dtype, self.inplace = dtype, inplace

    def pack(self) -> None:
        self.weight = self._read(self.weight_read, self.weight)
        self.bias = self._read(self.bias_read, self.bias)

    def _read(self, constant: Constant | None, target: Tensor | None) -> Tensor | None:
        if constant is None:
            return None
        return read_weight(constant.tensor(), self.dtype, target, self.inplace)


class Linear(WithWeights):
    """x W^T + b."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        if self.bias is None:
            return x.mm(self.weight.t())
        return torch.addmm(self.bias, x, self.weight.t())

    def tangent(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return x.mm(self.weight.t())

    def backward(self, grad: Tensor) -> Tensor:
        assert self.weight is not None
        return grad.mm(self.weight)

    def weight_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        return grad.t().mm(x)


class View:
    """The same values in another shape, in their logical order."""

    def __init__(self, node: Node, read: tuple[int, ...]) -> None:
        self.shape, self.read = node.shape, read

    def forward(self, x: Tensor) -> Tensor:
        return laid_out(x.reshape(x.shape[0], *self.shape))

    def backward(self, grad: Tensor) -> Tensor:
        return laid_out(grad.reshape(grad.shape[0], *self.read))


class Reduction:
    """The sum or mean over dimensions of each chain."""

    def __init__(self, node: Node, read: tuple[int, ...]) -> None:
        self.dims, self.keepdim = node.settings
        self.read = read
        self.reduced = tuple(1 if d + 1 in self.dims else size for d, size in enumerate(read))
        count = math.prod(read) // max(math.prod(self.reduced), 1)
        self.factor = 1 / count if node.kind == "mean" and count else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return laid_out(x.sum(self.dims, self.keepdim) * self.factor)

    def backward(self, grad: Tensor) -> Tensor:
        chains = grad.shape[0]
        return broadcast(grad.reshape(chains, *self.reduced) * self.factor, (chains, *self.read))


class LogSumExp:
    """logsumexp over dimensions, as an energy by JEM takes it of logits. It saves the softmax."""

    def __init__(self, node: Node, read: tuple[int, ...]) -> None:
        self.dims, self.keepdim = node.settings
        self.reduced = tuple(1 if d + 1 in self.dims else size for d, size in enumerate(read))
        self.softmax: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = x.logsumexp(self.dims, True)
        self.softmax = (x - out).exp_()
        return out if self.keepdim else laid_out(out.squeeze(self.dims))

    def backward(self, grad: Tensor) -> Tensor:
        softmax, self.softmax = self.softmax, None
        assert softmax is not None
        return softmax.mul_(grad.reshape(grad.shape[0], *self.reduced))


class AvgPool:
    """aten.avg_pool2d."""

    def __init__(self, node: Node, read: tuple[int, ...]) -> None:
        self.settings, self.read = node.settings, read

    def forward(self, x: Tensor) -> Tensor:
        return laid_out(aten.avg_pool2d(x, *self.settings))

    def backward(self, grad: Tensor) -> Tensor:
        x = grad.new_empty(1).expand(grad.shape[0], *self.read)  # only its sizes are read
        return laid_out(aten.avg_pool2d_backward(grad, x, *self.settings))


class MaxPool:
    """aten.max_pool2d_with_indices. It saves where each maximum was found."""

    def __init__(self, node: Node, read: tuple[int, ...]) -> None:
        self.settings, self.read = node.settings, read
        self.indices: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out, self.indices = aten.max_pool2d_with_indices(x, *self.settings)
        return laid_out(out)

    def backward(self, grad: Tensor) -> Tensor:
        indices, self.indices = self.indices, None
        x = laid_out(grad.new_empty((grad.shape[0], *self.read)))  # only its sizes are read
        return laid_out(aten.max_pool2d_with_indices_backward(grad, x, *self.settings, indices))


class BatchNorm:
    """A batch norm in eval mode: weight (x - mean) / sqrt(var + eps) + bias for each channel."""

    weight: Tensor | None = None
    bias: Tensor | None = None

    def __init__(self, node: Node, dtype: torch.dtype, inplace: bool = False) -> None:
        self.node, self.dtype, self.inplace = node, dtype, inplace
        self.shape = (-1, *(1 for _ in node.shape[1:]))

    def pack(self) -> None:
        scale, shift = (v.view(self.shape) for v in scale_and_shift(self.node))
        self.weight = read_weight(scale, self.dtype, self.weight, self.inplace)
        self.bias = read_weight(shift, self.dtype, self.bias, self.inplace)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        assert self.bias is not None
        return torch.addcmul(self.bias, x, self.weight)

    def tangent(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return x * self.weight

    def backward(self, grad: Tensor) -> Tensor:
        assert self.weight is not None
        return grad.mul_(self.weight)


class GroupNorm(WithWeights):
    """aten.native_group_norm. It saves its input."""

    saved: tuple[Tensor, Tensor, Tensor] | None = None

    def __init__(self, node: Node, dtype: torch.dtype, inplace: bool = False) -> None:
        super().__init__(node, dtype, inplace)
        self.groups, self.eps = node.settings
        self.sizes = node.shape[0], math.prod(node.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        sizes = x.shape[0], *self.sizes
        out, mean, scale = aten.native_group_norm(
            x, self.weight, self.bias, *sizes, self.groups, self.eps
        )
        self.saved = x, mean, scale
        return laid_out(out)

    def backward(self, grad: Tensor) -> Tensor:
        assert self.saved is not None
        saved, self.saved = self.saved, None
        sizes = grad.shape[0], *self.sizes
        mask = True, False, False
        return laid_out(
            aten.native_group_norm_backward(grad, *saved, self.weight, *sizes, self.groups, mask)[0]
        )


class Scale:
    """factor x, and a constant times that if there is one."""

    def __init__(self, node: Node) -> None:
        (self.factor,), self.constants = node.settings, node.constants

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x * self.factor)

    def backward(self, grad: Tensor) -> Tensor:
        return self._multiply(grad.mul_(self.factor))

    def _multiply(self, x: Tensor) -> Tensor:
        for constant in self.constants:
            assert constant is not None
            x.mul_(constant.tensor())
        return x


class Multiply:
    """x y. It saves both."""

    saved: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.saved = x, y
        return x * y

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        assert self.saved is not None
        (x, y), self.saved = self.saved, None
        return grad * y, grad * x


class Add:
    """x + factor y."""

    def __init__(self, node: Node) -> None:
        (self.factor,) = node.settings

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.add(x, y, alpha=self.factor)

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad * self.factor


class Activation:
    """An activation, and what it saves for the backward pass.

    ``wanted`` is whether its output is needed, and not only its derivative. ``keeps`` is "input"
    or "output" if that tensor is saved and must not be changed later, or None if signs are saved.
    :class:`~fastlangevin.gradients.passes.Passes` sets ``inplace`` and ``fused``, since it knows
    what else reads the input.
    """

    def __init__(self, node: Node, device: torch.device, wanted: bool) -> None:
        self.kind, self.settings, self.wanted = node.kind, node.settings, wanted
        self.constants = node.constants
        self.inplace = False
        self.fused = False  # the convolution before it has already applied it
        self.saved: Tensor | None = None
        piecewise = node.kind in ("leaky_relu", "relu")
        # On a CPU one pass packs the signs, a bit per value. Elsewhere saving the output is free.
        self.bits = piecewise and wanted and device.type == "cpu"
        self.keeps: str | None = None
        if not self.bits:
            by_output = node.kind in ("elu", "tanh", "sigmoid") or (piecewise and wanted)
            self.keeps = "output" if by_output else "input"

    def forward(self, x: Tensor) -> Tensor | None:
        if self.keeps == "input":
            self.saved = x
            return self.value(x) if self.wanted else None
        out = x if self.fused else self.value(x)
        # At NaN, autograd passes the gradient of a relu on, but not that of a leaky relu.
        self.saved = pack_signs(out, self.kind == "relu") if self.bits else out
        return out

    def value(self, x: Tensor) -> Tensor:
        if self.kind == "gelu":
            return aten.gelu(x, approximate=self.form)
        if self.kind == "silu" and self.settings:
            return torch.sigmoid(x * self.beta).mul_(x)
        run = getattr(aten, self.kind + "_" * self.inplace)
        return run(x, *self.settings)

    @property
    def form(self) -> str:
        return "tanh" if self.settings[0] else "none"

    @property
    def beta(self) -> float | Tensor:
        """The factor of x in the sigmoid of a silu."""
        factor: float = self.settings[0] if self.settings else 1.0
        for constant in self.constants:
            assert constant is not None
            return constant.tensor().reshape(()) * factor
        return factor

    def backward(self, grad: Tensor) -> Tensor:
        saved, self.saved = self.saved, None
        assert saved is not None
        return self.scale_(grad, saved)

    def scale_(self, grad: Tensor, saved: Tensor) -> Tensor:
        """Multiply grad in place by the derivative, from what :meth:`forward` has saved."""
        s = self.settings
        if self.bits:
            return apply_signs_(grad, saved, s[0] if s else 0.0)
        if self.kind == "leaky_relu":
            by_output = self.keeps == "output"
            return aten.leaky_relu_backward.grad_input(grad, saved, *s, by_output, grad_input=grad)
        if self.kind == "relu":
            return aten.threshold_backward.grad_input(grad, saved, 0, grad_input=grad)
        if self.kind == "elu":
            return aten.elu_backward.grad_input(grad, *s, 1, 1, True, saved, grad_input=grad)
        if self.kind == "gelu":
            return aten.gelu_backward.grad_input(
                grad, saved, approximate=self.form, grad_input=grad
            )
        if self.kind == "silu" and s:  # the derivative of silu(beta x) / beta
            return aten.silu_backward.grad_input(grad, saved * self.beta, grad_input=grad)
        run = getattr(aten, f"{self.kind}_backward").grad_input
        return run(grad, saved, *s, grad_input=grad)
