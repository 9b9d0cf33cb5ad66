"""The step and the noise in Triton: CUDA and ROCm, and any CPU under Triton's interpreter.

Steps with given noise equal the reference bit for bit. The kernels' own normals differ from the
reference's by less than the contract's 2e-6, and are those of the native backend. Triton is
imported when a kernel is first asked for.
"""

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlangevin.kernels import reference
from fastlangevin.kernels.checks import check_rng_state
from fastlangevin.kernels.memory import all_in_memory, in_memory

# 16 bytes of the state for each of a program's 4 warps of 32 threads: one load, one store.
_WARPS = 4
_TILE_BYTES = _WARPS * 32 * 16
# Of one program, when lines are channels; 16 float32 channels are two 32-byte sectors of memory.
_MAX_CHANNELS = 16
# CUDA's limit on all dimensions of a grid but the first.
_MAX_GRID = 65535
# Every operation is rounded once, as in the other backends: see triton_kernels.
_COMPILE = {"num_warps": _WARPS, "enable_fp_fusion": False}


def available(device: torch.device) -> str | None:
    """None where Triton serves the device, else why not and what to do."""
    if device.type not in ("cpu", "cuda"):
        return f"its kernels are for CUDA and ROCm devices, not {device.type}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on a CPU it only runs interpreted, for tests; start Python with TRITON_INTERPRET=1"
    if not _installed():
        return "triton is not installed; pip install triton"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device.type == "cuda" and not _compiler():
        return "its launcher is compiled at run time; install gcc or clang, or set CC"
    return None


@functools.cache
def _compiler() -> bool:
    return "CC" in os.environ or any(shutil.which(name) for name in ("cc", "gcc", "clang"))


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def step_(
    x: Tensor,
    grad: Tensor | None,
    z: Tensor | None,
    *,
    rng_state: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """:func:`reference.step_` on checked arguments: in place on x, in any memory format.

    ``rng_state``: int64 [2] on x's device, the seed and a number added to ``step``, read when the
    kernel runs, so that writing to it gives a replayed graph other noise.

    Chains that are contiguous or channels_last, each tensor as it likes, are read and written as
    they are. Others, and channels_last ones with noise to draw whose channels are not multiples of
    4 elements, take contiguous copies. A float64 x and operands that are not
    :func:`~fastlangevin.kernels.memory.in_memory` fall back to the reference, which has no
    ``rng_state``: ValueError. Returns x.
    """
    fallback = None
    if x.dtype == torch.float64:
        fallback = "a float64 x falls back to the reference"
    elif not all_in_memory(x, grad, z, *options.values()):
        fallback = "an operand that is not in memory falls back to the reference"
    if rng_state is not None:
        check_rng_state(x, rng_state, fallback)
    if fallback is not None:
        return reference.step_(x, grad, z, **options)
    if x.numel() == 0:
        return x
    draws = z is None and not reference.is_zero(options["noise_std"])
    lines = _lines(x, grad, z, draws)
    if lines is None:
        dense = x.clone(memory_format=torch.contiguous_format)
        grad, z = (v if v is None else v.contiguous() for v in (grad, z))
        _step((1, x[0].numel()), dense, grad, z, rng_state=rng_state, **options)
        x.copy_(dense)
    else:
        _step(lines, x, grad, z, rng_state=rng_state, **options)
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)
    return x


def _step(
    lines: tuple[int, int],
    x: Tensor,
    grad: Tensor | None,
    z: Tensor | None,
    *,
    step_size: reference.Coefficient,
    noise_std: reference.Coefficient,
    seed: int,
    step: int,
    first_chain: int,
    clamp: tuple[float, float] | None = None,
    grad_clip: float | None = None,
    maximize: bool = False,
    noise_last: bool = False,
    rng_state: Tensor | None = None,
) -> None:
    """Launch the step on tensors whose chains are made of ``lines`` (channels, pixels)."""
    from fastlangevin.kernels.triton_step import step_kernel

    chains, (channels, pixels) = x.shape[0], lines
    a, step_sizes = coefficient(step_size, x)
    b, noise_stds = coefficient(noise_std, x)
    lo, hi = clamp or (-math.inf, math.inf)
    grid, tile = _grid(chains, channels, pixels, x.element_size())
    with torch.cuda.device_of(x):
        step_kernel[grid](
            x, grad, z, *_strides(x, *lines), *_strides(grad, *lines),
            chains, channels, pixels,
            a if maximize else -a, b, step_sizes, noise_stds, grad_clip, lo, hi,
            signed(seed), signed(seed >> 32), signed(step), signed(first_chain), rng_state,
            DRAW=z is None and not reference.is_zero(noise_std),
            NOISE_LAST=noise_last, BY_CHANNEL=channels > 1,
            **tile, **_COMPILE,
        )  # fmt: skip


def normal(shape: Sequence[int], **address: Any) -> Tensor | None:
    """:func:`fastlangevin.noise.normal` in float32, on checked arguments.

    None under modes of torch's that make tensors without memory.
    """
    return _fill(shape, uniform=False, **address)


def uniform(shape: Sequence[int], **address: Any) -> Tensor | None:
    """:func:`fastlangevin.noise.uniform` in float32, on checked arguments."""
    return _fill(shape, uniform=True, **address)


def _fill(
    shape: Sequence[int],
    *,
    uniform: bool,
    seed: int,
    step: int,
    stream: int,
    first_chain: int,
    device: torch.device,
) -> Tensor | None:
    from fastlangevin.kernels.triton_step import fill_kernel

    out = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    if not in_memory(out):
        return None
    if out.numel() == 0:
        return out
    chains, elements = out.shape[0], out[0].numel()
    grid, tile = _grid(chains, 1, elements, out.element_size())
    with torch.cuda.device_of(out):
        fill_kernel[grid](
            out, chains, elements,
            signed(seed), signed(seed >> 32), signed(step), signed(stream),
            signed(first_chain), UNIFORM=uniform, **tile, **_COMPILE,
        )  # fmt: skip
    return out


def _lines(x: Tensor, grad: Tensor | None, z: Tensor | None, draws: bool) -> tuple[int, int] | None:
    """How a chain divides into lines of evenly spaced elements, in every tensor alike.

    (1, elements) where all chains are contiguous, (channels, pixels) where some are channels_last,
    None where a tensor is neither. z must be laid out as x is.
    """
    if z is not None and z.stride() != x.stride():
        return None
    tensors = [v for v in (x, grad) if v is not None]
    elements = x[0].numel()
    if all(_planar(v) for v in tensors):
        return 1, elements
    if not all(_planar(v) or _channels_last(v) for v in tensors):
        return None
    if not draws and all(v.stride() == x.stride() for v in tensors):
        return 1, elements  # without noise to draw, an element's number does not matter
    pixels = elements // x.shape[1]
    return None if draws and pixels % 4 else (x.shape[1], pixels)


def _planar(v: Tensor) -> bool:
    return v.is_contiguous() or v[0].is_contiguous()


def _channels_last(v: Tensor) -> bool:
    return v.dim() > 2 and v[0].movedim(0, -1).is_contiguous()


def _strides(v: Tensor | None, channels: int, pixels: int) -> tuple[int, int, int]:
    """Between chains, channels and pixels, in elements."""
    if v is None:
        return 0, 0, 0
    if channels == 1:
        return v.stride(0), 0, 1
    return (v.stride(0), pixels, 1) if _planar(v) else (v.stride(0), 1, channels)


def _grid(
    chains: int, channels: int, pixels: int, itemsize: int
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The programs, lines by pixels, and the shape of their tiles: powers of 2."""
    tile = _TILE_BYTES // itemsize
    if channels > 1:
        lines = min(_MAX_CHANNELS, _power_of_2(channels))
        columns = min(tile // lines, max(4, _power_of_2(pixels)))
        rows = chains * -(-channels // lines)
    else:
        columns = min(tile, max(4, _power_of_2(pixels)))
        lines = tile // columns
        rows = -(-chains // lines)
    tiles = -(-pixels // columns)
    grid = rows, min(tiles, _MAX_GRID), -(-tiles // _MAX_GRID)
    return grid, {"LINES": lines, "PIXELS": columns}


def _power_of_2(number: int) -> int:
    """The least one >= number."""
    return 1 << (number - 1).bit_length()


def coefficient(value: reference.Coefficient, x: Tensor) -> tuple[float, Tensor | None]:
    """A coefficient as a number times float32 values per chain."""
    if not isinstance(value, Tensor):
        return float(value), None
    return 1.0, value.to(device=x.device, dtype=torch.float32).expand(x.shape[0]).contiguous()


def signed(number: int) -> int:
    """The low word of a number as the signed int32 with its bits.

    Triton would compile anew for a number that needs another integer type.
    """
    return ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
