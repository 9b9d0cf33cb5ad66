"""Signs of activations as one bit each, and their use in the gradient: native and reference.

The bits follow the order of memory, which must be dense. A tensor and the gradient that its bits
are applied to must have the same layout.
"""

import torch
from torch import Tensor

from fastlangevin.kernels import extension
from fastlangevin.kernels.memory import in_memory


def pack_signs(values: Tensor, unordered: bool = False) -> Tensor:
    """uint8 [ceil(numel / 8)], where bit k % 8 of byte k // 8 is value k > 0, in memory order.

    With ``unordered`` it is !(value <= 0) instead, which is also true for NaN.
    """
    if not _is_native(values):
        return pack_signs_ref(values, unordered)
    bits = torch.empty((values.numel() + 7) // 8, dtype=torch.uint8, device="cpu")
    if not in_memory(bits):  # in some modes torch makes tensors without memory
        return pack_signs_ref(values, unordered)
    extension.library.pack_signs(
        values.data_ptr(), extension.DTYPES[values.dtype], values.numel(), unordered,
        bits.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return bits


def apply_signs_(grad: Tensor, bits: Tensor, slope: float) -> Tensor:
    """In place: grad if a bit is set, else slope * grad; with slope 0 that is 0 even for NaN."""
    if not (_is_native(grad) and in_memory(bits)):
        return apply_signs_ref_(grad, bits, slope)
    extension.library.apply_signs(
        grad.data_ptr(), extension.DTYPES[grad.dtype], grad.numel(), bits.data_ptr(), slope,
        torch.get_num_threads(),
    )  # fmt: skip
    return grad


def pack_signs_ref(values: Tensor, unordered: bool = False) -> Tensor:
    """:func:`pack_signs` in plain torch."""
    flat = _in_memory_order(values)
    signs = ~(flat <= 0) if unordered else flat > 0
    signs = torch.nn.functional.pad(signs, (0, -flat.numel() % 8)).view(-1, 8)
    powers = 2 ** torch.arange(8, dtype=torch.int64, device=flat.device)
    return (signs * powers).sum(1).to(torch.uint8)


def apply_signs_ref_(grad: Tensor, bits: Tensor, slope: float) -> Tensor:
    """:func:`apply_signs_` in plain torch."""
    flat = _in_memory_order(grad)
    powers = 2 ** torch.arange(8, dtype=torch.int64, device=flat.device)
    negative = ((bits[:, None] & powers) == 0).view(-1)[: flat.numel()]
    other = torch.zeros_like(flat) if slope == 0 else flat * slope
    flat.copy_(torch.where(negative, other, flat))
    return grad


def _in_memory_order(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))


def _is_native(tensor: Tensor) -> bool:
    return tensor.dtype in extension.DTYPES and tensor.device.type == "cpu" and in_memory(tensor)
