"""Convolutions for the explicit engine: forward, input gradient and weight gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlangevin.gradients import onednn
from fastlangevin.gradients.graph.ir import Constant, Node
from fastlangevin.gradients.layers import WithWeights, laid_out, read_weight

aten = torch.ops.aten


class Conv(WithWeights):
    """A convolution that reads values of shape ``read`` per chain, by torch's operators.

    Its weights are rounded to ``dtype``, which is also the dtype of its inputs and outputs. The
    operators run in :func:`onednn.product_dtype`, which may be wider.
    """

    def __init__(
        self, node: Node, read: tuple[int, ...], dtype: torch.dtype, inplace: bool = False
    ) -> None:
        super().__init__(node, dtype, inplace)
        self.stride, self.padding, self.dilation, self.groups = node.settings
        self.no_padding = (0,) * len(self.stride)
        assert self.weight_read is not None
        self.product_dtype = onednn.product_dtype(node, dtype, self.weight_read.base.device)
        # The transposed convolution adds what no window reads.
        self.output_padding = onednn.unread(
            read[1:], node.shape[1:], self.weight_read.size[2:],
            self.stride, self.padding, self.dilation,
        )  # fmt: skip

    def _read(self, constant: Constant | None, target: Tensor | None) -> Tensor | None:
        if constant is None:
            return None
        value = constant.tensor()
        if self.product_dtype != self.dtype:
            value = value.to(self.dtype)
        # oneDNN assumes that a bias is contiguous.
        return laid_out(read_weight(value, self.product_dtype, target, self.inplace))

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.bias, False, self.no_padding)

    def tangent(self, x: Tensor) -> Tensor:
        return self._convolve(x, None, False, self.no_padding)

    def backward(self, grad: Tensor) -> Tensor:
        return self._convolve(grad, None, True, self.output_padding)

    def _convolve(
        self, x: Tensor, bias: Tensor | None, transposed: bool, output_padding: Sequence[int]
    ) -> Tensor:
        return self._result(
            aten.convolution(
                x.to(self.product_dtype), self.weight, bias, self.stride, self.padding,
                self.dilation, transposed, output_padding, self.groups,
            )
        )  # fmt: skip

    def _result(self, sums: Tensor) -> Tensor:
        return laid_out(sums).to(self.dtype)

    def weight_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the weight's gradient from the input x and the gradient of the output."""
        assert self.weight_read is not None
        few_pixels = grad.numel() < grad.shape[1] ** 2  # fewer pixels than channels
        if few_pixels and self.groups == 1 and grad.ndim == 4 and grad.device.type == "cpu":
            return self._weight_grad_by_windows(x, grad)
        weight_grad: Tensor = aten.convolution_backward(
            grad, x, self.weight_read.tensor().to(self.dtype), None, self.stride, self.padding,
            self.dilation, False, self.no_padding, self.groups, (False, True, False),
        )[1]  # fmt: skip
        return weight_grad

    def _weight_grad_by_windows(self, x: Tensor, grad: Tensor) -> Tensor:
        """Compute the weight's gradient as one matrix product.

        oneDNN reorders the weights and back. If few pixels meet a large weight, that takes 3/4 of
        its time (for 128 pixels and [256, 128, 4, 4], 7 ms against 1.9 ms here, on one core).
        """
        assert self.weight_read is not None
        (n, out, *pixels), kernel = grad.shape, self.weight_read.size[2:]
        vertical, horizontal = self.padding
        padded = torch.nn.functional.pad(
            x.permute(0, 2, 3, 1), (0, 0, horizontal, horizontal, vertical, vertical)
        ).contiguous()
        chain, row, column, _ = padded.stride()
        (up, along), (down, right) = self.stride, self.dilation
        windows = padded.as_strided(
            (n, *pixels, *kernel, x.shape[1]),
            (chain, row * up, column * along, row * down, column * right, 1),
        )
        rows = grad.permute(0, 2, 3, 1).reshape(-1, out)
        product = rows.t().mm(windows.reshape(rows.shape[0], -1))
        return product.view(out, *kernel, -1).permute(0, 3, 1, 2)


class PackedConv(Conv):
    """A convolution on a CPU that keeps its weights in oneDNN's order and can fuse an activation.

    Its results equal those of :class:`Conv` bit for bit. Without it, every call would reorder the
    weights, which takes 16 % of the time of a width-64 chain at batch 8.
    """

    def __init__(self, node: Node, read: tuple[int, ...], dtype: torch.dtype, chains: int) -> None:
        super().__init__(node, read, dtype)
        self.sizes = [chains, *read], [chains, *node.shape]
        self.transposed: Tensor | None = None  # the weights of the backward pass, once packed

    def pack(self) -> None:
        super().pack()
        mkldnn, (read, out) = torch.ops.mkldnn, self.sizes
        settings = self.stride, self.dilation, self.groups
        assert self.weight is not None
        weight = self.weight.contiguous()
        self.weight = mkldnn._reorder_convolution_weight(weight, self.padding, *settings, read)
        self.transposed = mkldnn._reorder_convolution_transpose_weight(
            weight, self.padding, self.output_padding, *settings, out
        )

    def forward(self, x: Tensor, slope: float | None = None) -> Tensor:
        activation = ("none", [], "") if slope is None else ("leaky_relu", [slope], "")
        return self._run(x, self.bias, activation)

    def tangent(self, x: Tensor) -> Tensor:
        return self._run(x, None, ("none", [], ""))

    def _run(
        self, x: Tensor, bias: Tensor | None, activation: tuple[str, list[float], str]
    ) -> Tensor:
        return self._result(
            torch.ops.mkldnn._convolution_pointwise(
                x.to(self.product_dtype), self.weight, bias, self.padding, self.stride,
                self.dilation, self.groups, *activation,
            )
        )  # fmt: skip

    def backward(self, grad: Tensor) -> Tensor:
        return self._result(
            torch.ops.mkldnn._convolution_transpose_pointwise(
                grad.to(self.product_dtype), self.transposed, None, self.padding,
                self.output_padding, self.stride, self.dilation, self.groups, "none", [], "",
            )
        )  # fmt: skip


def packs(node: Node, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether :class:`PackedConv` can run a node with operands in ``dtype``."""
    weight = node.constants[0] if node.kind == "conv" else None
    return (
        weight is not None
        and len(node.shape) == 3
        and not onednn.skips(weight.size[2:], *node.settings[:2])
        and device.type == "cpu"
        and (product := onednn.product_dtype(node, dtype, device)) != torch.float16
        and onednn.packs(product)
    )
