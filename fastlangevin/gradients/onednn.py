"""The dtypes in which torch's convolutions on a CPU are correct and fast.

They depend on oneDNN and on the CPU.
"""

from collections.abc import Sequence

import torch

from fastlangevin.gradients.graph.ir import Node
from fastlangevin.gradients.precision import HALVES


def runs(dtype: torch.dtype) -> bool:
    """Return whether oneDNN runs convolutions in this dtype on this CPU."""
    mkldnn = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)):
        return False
    if dtype == torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def packs(dtype: torch.dtype) -> bool:
    """Return whether oneDNN runs convolutions of weights that are packed in its own order."""
    return hasattr(torch.ops.mkldnn, "_convolution_transpose_pointwise") and runs(dtype)


def unread(
    read: Sequence[int],
    out: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Return the rows and columns at the end of the image ``read`` that no window reads."""
    sizes = zip(read, out, kernel, stride, padding, dilation, strict=True)
    return [r - (o - 1) * s + 2 * p - d * (k - 1) - 1 for r, o, k, s, p, d in sizes]


def has_amx() -> bool:
    """Return whether the CPU has AMX, or True if this version of torch cannot tell."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is None or bool(supported())


def product_dtype(node: Node, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which to run a convolution of operands in ``dtype``.

    On a CPU, float32 replaces a 16-bit dtype in two cases. If oneDNN does not run that dtype,
    torch's own kernels would: they also sum in 16 bits, and they are slower than float32. With AMX,
    oneDNN is wrong for some shapes; see :func:`is_wrong_with_amx`. Only images have been examined,
    so sequences are convolved in float32 too. The autograd engine is not
    affected by this function: it runs the energy's own code with torch's convolutions as they are.
    """
    if device.type != "cpu" or dtype not in HALVES.values():
        return dtype
    if len(node.shape) != 3 or not runs(dtype) or (has_amx() and is_wrong_with_amx(node)):
        return torch.float32
    return dtype


def is_wrong_with_amx(node: Node) -> bool:
    """Return whether oneDNN's 16-bit convolution with AMX can give wrong numbers or NaN for a node.

    Two classes of shapes are known, in oneDNN 3.12, which torch 2.13 contains. The first is an
    output one pixel wide with a horizontal stride above 1 (pytorch/pytorch#169688). The second is a
    stride larger than the kernel, for which oneDNN writes past the end of a buffer
    (uxlfoundation/oneDNN#5494). Kernels of one pixel without padding take another path in oneDNN
    and are not affected.
    """
    weight = node.constants[0]
    assert weight is not None
    stride, padding, _, _ = node.settings
    one_column = node.shape[2] == 1 and stride[1] > 1
    return one_column or skips(weight.size[2:], stride, padding)


def skips(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Return whether a convolution skips pixels in a way that oneDNN must not be given packed.

    With packed weights oneDNN writes past the end of a buffer in float32 too, on CPUs without AMX:
    [1, 33, 4, 1] with stride (1, 2) and padding 1 crashes after some calls (torch 2.13, AVX2).
    """
    pointwise = all(k == 1 for k in kernel) and not any(padding)
    return not pointwise and any(s > k for s, k in zip(stride, kernel, strict=True))
