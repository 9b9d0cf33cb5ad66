"""Convolutions by minimal filtering in the compiled extension, as operators of a program."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlangevin.kernels import extension

# The predicted part of the time that is saved at least. The prediction compares with direct
# products, and oneDNN's need no copy of the image.
_SAVING = 0.15
# Vectors of channels are written whole, for every instruction set.
_LANES = 16


class Convolution:
    """A 2-D convolution of float32 images in channels_last, or the input gradient of one.

    It is called with images [n, C, H, W], weights from :meth:`pack`, a bias [C] or None, and the
    slope of a leaky relu that is applied to the result.
    """

    def __init__(self, native: Any, shape: tuple[int, ...]) -> None:
        self._native, self._shape = native, shape
        self.packed_numbers: int = native.packed
        self.saving: float = native.saving

    def pack(self, weight: Tensor) -> Tensor:
        """Return weights [out, in, kh, kw] in the order of the products."""
        packed = torch.empty(self.packed_numbers, dtype=torch.float32, device="cpu")
        weight = weight.contiguous()
        self._native.pack(weight.data_ptr(), packed.data_ptr(), torch.get_num_threads())
        return packed

    def __call__(
        self, x: Tensor, packed: Tensor, bias: Tensor | None, slope: float = 1.0
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        out = torch.empty(
            (x.shape[0], *self._shape),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        if bias is None and slope != 1:
            bias = x.new_zeros(self._shape[0])
        bias = None if bias is None else bias.contiguous()
        address = 0 if bias is None else bias.data_ptr()
        self._native.run(
            x.shape[0], x.data_ptr(), packed.data_ptr(), address, slope, out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out


def faster(
    read: Sequence[int],
    written: Sequence[int],
    kernel: Sequence[int],
    settings: tuple[Sequence[int], Sequence[int], Sequence[int], int],
    gradient: bool,
) -> Convolution | None:
    """Return a convolution from shape ``read`` [n, C, H, W] to ``written``, if it would be faster.

    ``kernel`` is the shape of the weights and ``settings`` stride, padding, dilation and groups.
    """
    stride, padding, dilation, groups = settings
    plain = groups == 1 and all(d == 1 for d in dilation) and len(read) == 4
    if extension.library is None or not plain or written[1] % _LANES or 0 in (*read, *written):
        return None
    outer, inner = (written, read) if gradient else (read, written)
    if math.prod(kernel[2:]) == 1 or max(map(math.prod, (read[1:], written[1:]))) > 2**26:
        return None
    convolution = _planned(
        extension.library.instruction_set(), tuple(written[1:]), outer[1], inner[1],
        tuple(inner[2:]), tuple(outer[2:]), tuple(kernel[2:]), tuple(stride), tuple(padding),
        gradient,
    )  # fmt: skip
    return None if convolution.saving < _SAVING else convolution


@functools.lru_cache(maxsize=256)
def _planned(instruction_set: str, shape: tuple[int, ...], *settings: Any) -> Convolution:
    """Return one object for equal convolutions, so that two programs share packed weights.

    The plan depends on the ``instruction_set`` of this moment.
    """
    library: Any = extension.library
    return Convolution(library.Convolution(*settings), shape)
