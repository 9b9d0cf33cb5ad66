"""The operations of a lean score: forward on a batch, and the gradient of what was read.

Values of four dimensions are in channels_last, others contiguous. A layer owns the gradient it is
given, and may return it changed in place.
"""

import math

import torch
from torch import Tensor

from fastlangevin.gradients import onednn
from fastlangevin.gradients.graph.ir import Constant, Node
from fastlangevin.kernels.signs import apply_signs_, pack_signs

aten = torch.ops.aten


def laid_out(x: Tensor) -> Tensor:
    """As all values are: a copy only where it is not yet."""
    if x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def read_weight(value: Tensor, dtype: torch.dtype, held: Tensor | None, inplace: bool) -> Tensor:
    """A weight in a dtype, which may be the weight itself.

    In place: laid out in memory of its own, that of ``held`` where something was read before, so
    that a captured graph, which knows addresses alone, sees new values there.
    """
    if not inplace:
        return value.to(dtype)
    if held is None:
        layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
        held = torch.empty(value.shape, dtype=dtype, device=value.device, memory_format=layout)
    return held.copy_(value)


def spread(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A new tensor of a shape, laid out, of the values of x, which are broadcast."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    return out.copy_(x)


class Conv:
    """A convolution by torch's operators.

    ``dtype`` is what its weights are rounded to, and that of what it reads and returns. The
    operators run in :func:`onednn.product_dtype`, which may be wider.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None

    def __init__(
        self, node: Node, read: tuple[int, ...], dtype: torch.dtype, inplace: bool = False
    ) -> None:
        self.weight_read, self.bias_read = node.constants
        self.stride, self.padding, self.dilation, self.groups = node.settings
        self.dtype, self.inplace = dtype, inplace
        assert self.weight_read is not None
        self.product_dtype = onednn.product_dtype(node, dtype, self.weight_read.base.device)
        kernel, out = self.weight_read.size[2:], node.shape[1:]
        # What a transposed convolution cannot tell from its own input: rows that no window reached.
        self.left_over = [
            read[d + 1] - (out[d] - 1) * self.stride[d] + 2 * self.padding[d]
            - self.dilation[d] * (kernel[d] - 1) - 1
            for d in range(2)
        ]  # fmt: skip

    def pack(self) -> None:
        self.weight = self._read(self.weight_read, self.weight)
        # oneDNN reads a bias as if it were contiguous.
        self.bias = self._read(self.bias_read, self.bias)

    def _read(self, constant: Constant | None, held: Tensor | None) -> Tensor | None:
        if constant is None:
            return None
        value = constant.tensor()
        if self.product_dtype != self.dtype:
            value = value.to(self.dtype)
        return laid_out(read_weight(value, self.product_dtype, held, self.inplace))

    def _result(self, sums: Tensor) -> Tensor:
        return laid_out(sums).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._result(
            aten.convolution(
                x.to(self.product_dtype), self.weight, self.bias, self.stride, self.padding,
                self.dilation, False, (0, 0), self.groups,
            )
        )  # fmt: skip

    def tangent(self, x: Tensor) -> Tensor:
        return self._result(
            aten.convolution(
                x.to(self.product_dtype), self.weight, None, self.stride, self.padding,
                self.dilation, False, (0, 0), self.groups,
            )
        )  # fmt: skip

    def backward(self, grad: Tensor) -> Tensor:
        return self._result(
            aten.convolution(
                grad.to(self.product_dtype), self.weight, None, self.stride, self.padding,
                self.dilation, True, self.left_over, self.groups,
            )
        )  # fmt: skip

    def weight_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the weight alone, from what was read and the gradient of the output."""
        assert self.weight_read is not None
        few = grad.numel() < grad.shape[1] ** 2  # places, against channels
        if few and self.groups == 1 and grad.device.type == "cpu":
            return self._weight_grad_by_windows(x, grad)
        found: Tensor = aten.convolution_backward(
            grad, x, self.weight_read.tensor().to(self.dtype), None, self.stride, self.padding,
            self.dilation, False, (0, 0), self.groups, (False, True, False),
        )[1]  # fmt: skip
        return found

    def _weight_grad_by_windows(self, x: Tensor, grad: Tensor) -> Tensor:
        """As one matrix product: oneDNN puts weights in order and back, 3/4 of its time where few
        places make a large weight (128 and [256, 128, 4, 4]: 7 ms, and 1.9 here; one core)."""
        assert self.weight_read is not None
        (n, out, *places), kernel = grad.shape, self.weight_read.size[2:]
        vertical, horizontal = self.padding
        padded = torch.nn.functional.pad(
            x.permute(0, 2, 3, 1), (0, 0, horizontal, horizontal, vertical, vertical)
        ).contiguous()
        chain, row, column, _ = padded.stride()
        (up, along), (down, right) = self.stride, self.dilation
        windows = padded.as_strided(
            (n, *places, *kernel, x.shape[1]),
            (chain, row * up, column * along, row * down, column * right, 1),
        )
        rows = grad.permute(0, 2, 3, 1).reshape(-1, out)
        product = rows.t().mm(windows.reshape(rows.shape[0], -1))
        return product.view(out, *kernel, -1).permute(0, 3, 1, 2)


class PackedConv(Conv):
    """A convolution on a CPU, with weights in oneDNN's own order and an activation at its end.

    The numbers are those of :class:`Conv`, bit for bit. Packed once, a kernel is not put in order
    again by every call: 16 % of a width-64 chain's time at batch 8.
    """

    def __init__(self, node: Node, read: tuple[int, ...], dtype: torch.dtype, chains: int) -> None:
        super().__init__(node, read, dtype)
        self.sizes = [chains, *read], [chains, *node.shape]

    def pack(self) -> None:
        super().pack()
        mkldnn, (read, out) = torch.ops.mkldnn, self.sizes
        settings = self.stride, self.dilation, self.groups
        assert self.weight is not None
        weight = self.weight.contiguous()
        self.weight = mkldnn._reorder_convolution_weight(weight, self.padding, *settings, read)
        self.transposed = mkldnn._reorder_convolution_transpose_weight(
            weight, self.padding, self.left_over, *settings, out
        )

    def forward(self, x: Tensor, slope: float | None = None) -> Tensor:
        after = ("none", [], "") if slope is None else ("leaky_relu", [slope], "")
        return self._run(x, self.bias, after)

    def tangent(self, x: Tensor) -> Tensor:
        return self._run(x, None, ("none", [], ""))

    def _run(self, x: Tensor, bias: Tensor | None, after: tuple[str, list[float], str]) -> Tensor:
        return self._result(
            torch.ops.mkldnn._convolution_pointwise(
                x.to(self.product_dtype), self.weight, bias, self.padding, self.stride,
                self.dilation, self.groups, *after,
            )
        )  # fmt: skip

    def backward(self, grad: Tensor) -> Tensor:
        return self._result(
            torch.ops.mkldnn._convolution_transpose_pointwise(
                grad.to(self.product_dtype), self.transposed, None, self.padding, self.left_over,
                self.stride, self.dilation, self.groups, "none", [], "",
            )
        )  # fmt: skip


def packs(node: Node, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :class:`PackedConv` serves a node with operands in ``dtype``."""
    return (
        node.kind == "conv"
        and device.type == "cpu"
        and hasattr(torch.ops.mkldnn, "_convolution_transpose_pointwise")
        and (product := onednn.product_dtype(node, dtype, device)) != torch.float16
        and onednn.runs(product)
    )


class Linear:
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __init__(self, node: Node, dtype: torch.dtype, inplace: bool = False) -> None:
        self.weight_read, self.bias_read = node.constants
        self.dtype, self.inplace = dtype, inplace

    def pack(self) -> None:
        assert self.weight_read is not None
        how = self.dtype, self.weight, self.inplace
        self.weight = read_weight(self.weight_read.tensor(), *how)
        if self.bias_read is not None:
            how = self.dtype, self.bias, self.inplace
            self.bias = read_weight(self.bias_read.tensor(), *how)

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
    """Another shape of the same values, in their logical order."""

    def __init__(self, node: Node, read: tuple[int, ...]) -> None:
        self.shape, self.read = node.shape, read

    def forward(self, x: Tensor) -> Tensor:
        return laid_out(x.reshape(x.shape[0], *self.shape))

    def backward(self, grad: Tensor) -> Tensor:
        return laid_out(grad.reshape(grad.shape[0], *self.read))


class Reduction:
    """A sum or mean over dimensions of a chain."""

    def __init__(self, node: Node, read: tuple[int, ...]) -> None:
        self.dims, self.keepdim = node.settings
        self.read = read
        self.kept = tuple(1 if d + 1 in self.dims else size for d, size in enumerate(read))
        count = math.prod(read) // max(math.prod(self.kept), 1)
        self.factor = 1 / count if node.kind == "mean" and count else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return laid_out(x.sum(self.dims, self.keepdim) * self.factor)

    def backward(self, grad: Tensor) -> Tensor:
        chains = grad.shape[0]
        return spread(grad.reshape(chains, *self.kept) * self.factor, (chains, *self.read))


class LogSumExp:
    """Of a classifier's logits, say: what an energy by JEM ends in. It keeps their softmax."""

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
    def __init__(self, node: Node, read: tuple[int, ...]) -> None:
        self.settings, self.read = node.settings, read

    def forward(self, x: Tensor) -> Tensor:
        return laid_out(aten.avg_pool2d(x, *self.settings))

    def backward(self, grad: Tensor) -> Tensor:
        x = grad.new_empty(1).expand(grad.shape[0], *self.read)  # of which the sizes are read
        return laid_out(aten.avg_pool2d_backward(grad, x, *self.settings))


class Scale:
    def __init__(self, node: Node) -> None:
        (self.factor,) = node.settings

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def backward(self, grad: Tensor) -> Tensor:
        return grad.mul_(self.factor)


class Add:
    """x + factor y."""

    def __init__(self, node: Node) -> None:
        (self.factor,) = node.settings

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.add(x, y, alpha=self.factor)

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad * self.factor


class Activation:
    """An activation, and what it keeps between the passes.

    wanted: whether its output is needed at all, or its derivative alone. ``keeps`` says which of
    its "input" and "output" must not be changed after it, if any. inplace and fused are set by
    whoever knows who else reads the input.
    """

    def __init__(self, node: Node, device: torch.device, wanted: bool) -> None:
        self.kind, self.settings, self.wanted = node.kind, node.settings, wanted
        self.inplace = False
        self.fused = False  # the convolution before it has applied it already
        self.kept: Tensor | None = None
        piecewise = node.kind in ("leaky_relu", "relu")
        # A bit a value where packing it is one pass; elsewhere the output, which costs no pass.
        self.bits = piecewise and wanted and device.type == "cpu"
        self.keeps: str | None = None
        if not self.bits:
            by_output = node.kind in ("elu", "tanh") or (piecewise and wanted)
            self.keeps = "output" if by_output else "input"

    def forward(self, x: Tensor) -> Tensor | None:
        if self.keeps == "input":
            self.kept = x
            return self.value(x) if self.wanted else None
        out = x if self.fused else self.value(x)
        # Autograd lets the gradient pass where a relu has read NaN, and not where a leaky one has.
        self.kept = pack_signs(out, self.kind == "relu") if self.bits else out
        return out

    def value(self, x: Tensor) -> Tensor:
        if self.kind == "gelu":
            return aten.gelu(x, approximate=self.form)
        run = getattr(aten, self.kind + "_" * self.inplace)
        return run(x, *self.settings)

    @property
    def form(self) -> str:
        return "tanh" if self.settings[0] else "none"

    def backward(self, grad: Tensor) -> Tensor:
        kept, self.kept = self.kept, None
        assert kept is not None
        return self.scale_(grad, kept)

    def scale_(self, grad: Tensor, kept: Tensor) -> Tensor:
        """In place: times the derivative, by what :meth:`forward` has kept."""
        s = self.settings
        if self.bits:
            return apply_signs_(grad, kept, s[0] if s else 0.0)
        if self.kind == "leaky_relu":
            by_output = self.keeps == "output"
            return aten.leaky_relu_backward.grad_input(grad, kept, *s, by_output, grad_input=grad)
        if self.kind == "relu":
            return aten.threshold_backward.grad_input(grad, kept, 0, grad_input=grad)
        if self.kind == "elu":
            return aten.elu_backward.grad_input(grad, *s, 1, 1, True, kept, grad_input=grad)
        if self.kind == "gelu":
            return aten.gelu_backward.grad_input(grad, kept, approximate=self.form, grad_input=grad)
        run = getattr(aten, f"{self.kind}_backward").grad_input
        return run(grad, kept, *s, grad_input=grad)
