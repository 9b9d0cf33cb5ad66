"""What torch's convolutions on a CPU can be trusted with, which depends on oneDNN and the CPU."""

import torch

from fastlangevin.gradients.graph.ir import Node

_HALVES = (torch.bfloat16, torch.float16)


def runs(dtype: torch.dtype) -> bool:
    """Whether oneDNN runs convolutions in this dtype here."""
    mkldnn = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)):
        return False
    if dtype == torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def has_amx() -> bool:
    """Whether the CPU has AMX; True where this version of torch cannot tell."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is None or bool(supported())


def product_dtype(node: Node, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which to run a convolution of operands in ``dtype``, which may be wider.

    float32 replaces a 16-bit dtype on a CPU in two cases. Where oneDNN does not run it, torch's own
    kernels also sum in 16 bits (and are slower: for 64 chains of [64, 16, 16] and a
    [128, 64, 4, 4] weight on AVX2, 0.41 s forward and 2.7 s back, against 0.06 s and 0.07 s). With
    AMX, oneDNN is wrong for some shapes: see :func:`is_wrong_with_amx`. The autograd engine runs
    the energy's own code, and with it torch's convolutions as they are.
    """
    if device.type != "cpu" or dtype not in _HALVES:
        return dtype
    if not runs(dtype) or (has_amx() and is_wrong_with_amx(node)):
        return torch.float32
    return dtype


def is_wrong_with_amx(node: Node) -> bool:
    """Whether oneDNN's 16-bit convolution with AMX can give wrong numbers or NaN for a node.

    Two classes of shapes are known, in oneDNN 3.12 that torch 2.13 contains: outputs one pixel
    wide of a horizontal stride above 1 (pytorch/pytorch#169688), and strides that are larger than
    the kernel, where too small a buffer is overwritten (uxlfoundation/oneDNN#5494). Kernels of one
    pixel without padding run elsewhere in oneDNN, and are not affected.
    """
    weight = node.constants[0]
    assert weight is not None
    stride, padding, _, _ = node.settings
    kernel = weight.size[2:]
    one_column = node.shape[2] == 1 and stride[1] > 1
    pointwise = tuple(kernel) == (1, 1) and tuple(padding) == (0, 0)
    skips = any(s > k for s, k in zip(stride, kernel, strict=True))
    return one_column or (skips and not pointwise)
