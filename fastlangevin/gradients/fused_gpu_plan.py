"""Launch plans of the convolution kernels: tiles, compile-time constants and packed weights."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin.kernels.triton_backend import power_of_2

if TYPE_CHECKING:
    from fastlangevin.gradients.graph.conv_stack import StackedConv

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
Image = tuple[int, int, int]  # channels, height, width


class Tile(NamedTuple):
    """Rows and columns of the result that one program computes, its warps, and loads in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


# With the most products per byte read first: a layer takes the first one that gives tiles to at
# least three quarters of the multiprocessors. Of 13 tiles, these were the fastest for the layers of
# widths 32 and 64 in fp16 on an H200, to within 12 %.
_TILES = (Tile(128, 128, 8, 3), Tile(64, 128, 4, 4), Tile(64, 64, 4, 4), Tile(64, 32, 4, 3))
# For 64 columns, which one tile of columns holds.
_NARROW_TILES = (Tile(128, 64, 8, 3), *_TILES[2:])
# An address per element, as the first layer has, and 128 columns need too many registers.
_FLAT_TILES = (Tile(128, 64, 4, 3), Tile(128, 32, 4, 3))
# Strict float32 has no matrix instructions: each thread adds up its own products.
_IEEE_TILES = (Tile(64, 64, 4, 3), Tile(64, 32, 4, 3))
# Whether the launches of engines that are made from now on begin before the one before them has
# ended, and wait for its results on the device: programmatic dependent launch, on GPUs of compute
# capability 9.0 and later. It is predicted to save 0.5 to 1.5 us for each launch. It is off until
# benchmarks.patches has measured it faster.
EARLY = False
_MULTIPROCESSORS = 132  # those of an H100 or H200, for use without a device


@dataclass(frozen=True)
class Plan:
    """The launch of one convolution in one direction.

    ``rows`` counts the output pixels of one class. A forward pass has one class. In an input
    gradient the pixels form a class for each residue modulo the stride.
    """

    constants: dict[str, Any]
    options: dict[str, Any]
    rows: int
    source_chain: int
    weight: Tensor  # [classes, columns, K]: taps and channels along K, then zeros

    @property
    def tiles(self) -> int:
        """The number of tiles of columns."""
        return _quotient(self.constants["COLUMNS"], self.constants["BN"])

    @property
    def grid(self) -> tuple[int, int]:
        return _quotient(self.rows, self.constants["BM"]) * self.tiles, self.weight.shape[0]


def forward_plan(conv: "StackedConv", source: Image, result: Image, n: int, precision: str) -> Plan:
    """Plan the convolution from its input to its output."""
    rows, taps = n * result[1] * result[2], conv.weight.shape[2] * conv.weight.shape[3]
    tile = _tile(rows, source[0], result[0], precision, conv.weight.device)
    return _plan(conv, source, result, rows, 1, taps, tile, precision)


def backward_plan(
    conv: "StackedConv", source: Image, result: Image, n: int, precision: str
) -> Plan:
    """Plan the input gradient, from the gradient of the output to that of the input."""
    rows, classes, taps = _classes(conv, source, n)
    tile = _tile(rows * classes, result[0], source[0], precision, conv.weight.device)
    return _plan(conv, result, source, rows, classes, taps, tile, precision)


def image_plan(conv: "StackedConv", source: Image, result: Image, n: int, precision: str) -> Plan:
    """Plan the input gradient of the first convolution, for all channels of an image at once.

    Three columns take a tile of four or eight, and a matrix instruction computes eight. The 2.7
    products for each one needed do not matter in a launch that is bound by its reads.
    """
    rows, classes, taps = _classes(conv, source, n)
    warps, columns = 4, power_of_2(source[0])
    if DTYPES[precision].itemsize == 2:
        # Copies of less than 4 bytes a thread are not asynchronous: every pass then waits for its
        # weights. More than 8 columns, whose noise is drawn for nothing, cost more than that.
        enough = 4 * 32 * warps // (2 * _block(result[0], precision))
        if enough <= 8:
            columns = max(columns, enough)
    tile = Tile(64 if precision == "fp32" else 128, columns, warps, 3)
    return _plan(conv, result, source, rows, classes, taps, tile, precision)


def _classes(conv: "StackedConv", source: Image, n: int) -> tuple[int, int, int]:
    """Return an input gradient's rows per class, classes, and the most taps of a class."""
    (y, x), (taps_y, taps_x) = conv.stride, conv.weight.shape[2:]
    rows = n * _quotient(source[1], y) * _quotient(source[2], x)
    return rows, y * x, _quotient(taps_y, y) * _quotient(taps_x, x)


def _plan(
    conv: "StackedConv",
    source: Image,
    result: Image,
    rows: int,
    classes: int,
    taps: int,
    tile: Tile,
    precision: str,
) -> Plan:
    """Plan a gather from a source for a result, with ``taps`` kernel positions in each class."""
    # BK and the order of a sum do not depend on n, so no chain depends on its batch.
    bk = _block(source[0], precision)
    k = _quotient(taps * source[0], bk) * bk
    constants: dict[str, Any] = {
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "FLAT": not _steps(source[0], precision),
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": bk,
        "K": k,
        "EARLY": EARLY and _can_begin_early(conv.weight.device),
    }
    constants |= zip(("C", "H", "W", "COLUMNS", "OUT_H", "OUT_W"), (*source, *result), strict=True)
    pairs = {
        "TAPS": conv.weight.shape[2:],
        "STRIDE": conv.stride,
        "PAD": conv.padding,
        "DILATION": conv.dilation,
    }
    for name, (y, x) in pairs.items():
        constants |= {f"{name}_Y": int(y), f"{name}_X": int(x)}
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    if constants["EARLY"]:
        options["launch_pdl"] = True
    shape = classes, result[0], k
    weight = torch.zeros(shape, dtype=DTYPES[precision], device=conv.weight.device)
    return Plan(constants, options, rows, math.prod(source), weight)


def pack_forward(plan: Plan, conv: "StackedConv") -> None:
    """Copy a convolution's weights into its forward plan."""
    _fill(plan, 0, conv.weight.permute(0, 2, 3, 1))


def pack_backward(plan: Plan, conv: "StackedConv") -> None:
    """Copy a convolution's weights into its backward plan, class by class."""
    (stride_y, stride_x), (pad_y, pad_x) = conv.stride, conv.padding
    for rest_y in range(stride_y):
        for rest_x in range(stride_x):
            first_y, first_x = (rest_y + pad_y) % stride_y, (rest_x + pad_x) % stride_x
            taps = conv.weight[:, :, first_y::stride_y, first_x::stride_x]
            _fill(plan, rest_y * stride_x + rest_x, taps.permute(1, 2, 3, 0))


def _fill(plan: Plan, number: int, weight: Tensor) -> None:
    rows = weight.detach().flatten(1).float()
    if plan.constants["PRECISION"] == "tf32":
        # Round to nearest, as the kernels round values; matrix instructions would truncate.
        bits = (rows.contiguous().view(torch.int32) + 0x1000) & -0x2000
        rows = torch.where(rows == rows, bits.view(torch.float32), rows)
    plan.weight[number, :, : rows.shape[1]].copy_(rows)


def _tile(rows: int, channels: int, columns: int, precision: str, device: torch.device) -> Tile:
    """Return the tile of a layer."""
    widest = max(32, power_of_2(columns))  # a word of signs holds 32 channels
    if precision == "fp32":
        tiles: tuple[Tile, ...] = _IEEE_TILES
    elif not _steps(channels, precision):
        tiles = _FLAT_TILES
    else:
        tiles = _NARROW_TILES if widest == 64 else _TILES
    tiles = tuple(tile for tile in tiles if tile.columns <= widest)
    wanted = 0.75 * _multiprocessors(device)
    for tile in tiles:
        if _quotient(rows, tile.rows) * _quotient(columns, tile.columns) >= wanted:
            return tile
    return tiles[-1]


def _steps(channels: int, precision: str) -> list[int]:
    """Return the BK, largest first, that divide the source's channels.

    With such a BK a step reads a single tap. 64 elements of two bytes, or 32 of four, fill the 128
    bytes of a swizzled row.
    """
    widest = 16 if precision == "fp32" else 128 // DTYPES[precision].itemsize
    return [bk for bk in (64, 32, 16) if bk <= widest and channels % bk == 0]


def _can_begin_early(device: torch.device) -> bool:
    from fastlangevin.kernels import triton_conv  # imports Triton

    if not triton_conv.can_begin_early:
        return False
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _block(channels: int, precision: str) -> int:
    """Return BK."""
    steps = _steps(channels, precision)
    return steps[0] if steps else 16 if precision == "fp32" else 32


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _quotient(number: int, by: int) -> int:
    """Return number / by, rounded up."""
    return -(-number // by)
