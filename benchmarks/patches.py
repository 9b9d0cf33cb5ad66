"""Compare the fused engine's convolutions with those of :mod:`benchmarks.patch_kernels`, on a GPU.

    python -m benchmarks.patches --out DIR

writes DIR/patches-cuda.json, for the paper's networks in fp16: the microseconds of every launch of a
step, and of the whole step in a CUDA graph, with the package's kernels and with those. A step of
each is compared first.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benchmarks import patch_kernels
from fastlangevin.kernels import triton_conv, triton_conv_grad

Values = dict[str, Any]


class PatchKernel:
    """Stands in for a kernel of the package, and launches the one in Gluon where it can."""

    def __init__(self, plain: Any, kernel: Any) -> None:
        self.plain, self.kernel = plain, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        values = dict(zip(self.plain.arg_names, args, strict=False)) | options
        if not is_supported(values):
            self.plain[grid](*args, **options)
            return
        arguments = arguments_of(values)
        self.kernel[grid_of(values)](**arguments, num_warps=arguments["WARPS"])


@contextmanager
def patched() -> Iterator[None]:
    """Within it, the fused engine launches the kernels in Gluon."""
    with (
        mock.patch.object(
            triton_conv,
            "forward_kernel",
            PatchKernel(triton_conv.forward_kernel, patch_kernels.patch_forward_kernel),
        ),
        mock.patch.object(
            triton_conv_grad,
            "backward_kernel",
            PatchKernel(triton_conv_grad.backward_kernel, patch_kernels.patch_backward_kernel),
        ),
    ):
        yield


def is_supported(values: Values) -> bool:
    """Whether a launch of the package's forward or backward kernel can be one in Gluon."""
    geometry = {"TAPS": 4, "STRIDE": 2, "PAD": 1, "DILATION": 1}
    height, width = result_size(values)
    return (
        all(values[f"{name}_{axis}"] == size for name, size in geometry.items() for axis in "YX")
        and values["weight"].dtype in (torch.float16, torch.bfloat16)
        and values["C"] % min(values["C"], 64) == 0 == values["C"] % 32
        and values["COLUMNS"] % values["BN"] == 0
        and all(size >= 4 and size & (size - 1) == 0 for size in (height, width))
        and values.get("ACTIVATION", "leaky_relu") == "leaky_relu"
        and values.get("SIGNS", True)
    )


def is_forward(values: Values) -> bool:
    return "ACTIVATION" in values


def result_size(values: Values) -> tuple[int, int]:
    """Height and width of the result, or of one class of its pixels."""
    return (values["OUT_H"], values["OUT_W"]) if is_forward(values) else (values["H"], values["W"])


def box_of(values: Values) -> tuple[int, int, int]:
    """How many (rows, chains, columns) of pixels make a tile: as square as a power of 2 can be."""
    height, width = result_size(values)
    across = min(width, 16)
    down = min(height, values["BM"] // max(across, 8))
    return down, values["BM"] // (down * across), across


def grid_of(values: Values) -> tuple[int, int]:
    (height, width), (down, chains, across) = result_size(values), box_of(values)
    n = values["rows"] // (height * width)
    tiles = math.ceil(n / chains) * (height // down) * (width // across)
    return tiles * (values["COLUMNS"] // values["BN"]), values["weight"].shape[0]


def arguments_of(values: Values) -> Values:
    """The arguments of a launch in Gluon."""
    (height, width), (down, chains, across) = result_size(values), box_of(values)
    n, forward = values["rows"] // (height * width), is_forward(values)
    h, w, c, source, weight = (values[name] for name in ("H", "W", "C", "source", "weight"))
    if forward:  # the pixels (2 y + p, 2 x + q): channel q C + c of pixel x
        shape, strides = [2, h // 2, n, w // 2, 2 * c], [w * c, 2 * w * c, h * w * c, 2 * c, 1]
    else:
        shape, strides = [1, h, n, w, c], [w * c, w * c, h * w * c, c, 1]
    bk = min(c, 64)
    inside = [chains, across, bk]
    k = weight.shape[2]
    weights = [2, math.prod(weight.shape[:2]), k // 2], [k // 2, k, 1]  # two rows of taps
    arguments = {
        "box_desc": _descriptor(source, shape, strides, [1, down, *inside]),
        "row_desc": _descriptor(source, shape, strides, [1, 1, *inside]),
        "weight_desc": _descriptor(weight, *weights, [2, values["BN"], bk]),
        "n": n,
        "H": height,
        "W": width,
        "STAGES": values["num_stages"],
        "WARPS": values["num_warps"],
    }
    names = ["out", "saved", "p", "C", "COLUMNS", "BM", "BN"]
    names += ["bias", "head", "energies", "overflow"] if forward else []
    return arguments | {name: values[name] for name in names}


def _descriptor(
    tensor: Tensor, shape: list[int], strides: list[int], box: list[int]
) -> TensorDescriptor:
    swizzle = box[-1] * tensor.element_size()
    layout = NVMMASharedLayout(swizzle, 8 * tensor.element_size(), rank=len(box))
    return TensorDescriptor(tensor, shape, strides, box, layout)
