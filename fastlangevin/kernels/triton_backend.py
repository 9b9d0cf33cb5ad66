"""The step and the noise in Triton, for CUDA, ROCm and any CPU under Triton's interpreter.

A step with given noise equals the reference's bit for bit. The kernels' own normals equal the
native backend's and differ from the reference's by less than 2e-6. Triton is imported at the first
launch.
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

from fastlangevin.arguments import check_rng_state
from fastlangevin.kernels import reference
from fastlangevin.kernels.memory import all_in_memory, in_memory
from fastlangevin.kernels.philox import Address

# A program has 4 warps of 32 threads; each thread takes 16 bytes of x, by one load and one store.
_WARPS = 4
_TILE_BYTES = _WARPS * 32 * 16
# The most channels of one program when lines are channels: 16 in float32 fill two 32-byte sectors.
_MAX_CHANNELS = 16
# CUDA's limit on every dimension of a grid except the first.
_MAX_GRID = 65535
# Every operation is rounded once, as in the other backends; see triton_step.
_COMPILE = {"num_warps": _WARPS, "enable_fp_fusion": False}


def available(device: torch.device) -> str | None:
    """None if Triton can run on the device, else the reason and the remedy."""
    if device.type not in ("cpu", "cuda"):
        return f"its kernels are for CUDA and ROCm devices, not {device.type}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on a CPU it runs interpreted, for tests only; start Python with TRITON_INTERPRET=1"
    if not _installed():
        return "triton is not installed; pip install triton"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device.type == "cuda" and not _compiler():
        return "it compiles its launcher at run time; install gcc or clang, or set CC"
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
    """:func:`reference.step_` on checked arguments, in place on x in any memory format.

    ``rng_state`` is an int64 tensor [2] on x's device: the seed, and a number that is added to
    ``step``. The kernel reads it when it runs, so that writing to it gives a replayed graph other
    noise.

    Chains that are contiguous or channels_last are read and written as they are, and x and grad
    may differ in this. Other chains take contiguous copies, and so do channels_last chains whose
    noise is drawn here and whose channels have a number of elements that 4 does not divide. A
    float64 x and operands that are not :func:`~fastlangevin.kernels.memory.in_memory` fall back to
    the reference, which cannot read an ``rng_state`` and then raises ValueError. Returns x.
    """
    fallback = None
    if x.dtype == torch.float64:
        fallback = "a float64 x falls back to the reference"
    elif not all_in_memory(x, grad, z, *options.values()):
        fallback = "an operand that is not in memory falls back to the reference"
    if rng_state is not None:
        check_rng_state("langevin_step_", x, rng_state, fallback)
    if fallback is not None:
        return reference.step_(x, grad, z, **options)
    if x.numel() == 0:
        return x
    draws = z is None and not reference.is_zero(options["noise_std"])
    lines = _line_layout(x, grad, z, draws)
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
    step: int,
    rng_state: Tensor | None = None,
    **options: Any,
) -> None:
    """Launches the step on tensors whose chains consist of ``lines`` = (channels, pixels)."""
    from fastlangevin.kernels.triton_step import step_kernel

    seed, first_chain, clamp, grad_clip, maximize, noise_last = reference.StepOptions(**options)
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


def fill(
    shape: Sequence[int], address: Address, device: torch.device, *, uniform: bool
) -> Tensor | None:
    """The normals, or uniforms, of a checked address, in float32.

    None if torch makes tensors without memory, as it does under FakeTensorMode.
    """
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
            signed(address.seed), signed(address.seed >> 32), signed(address.step),
            signed(address.stream), signed(address.first_chain),
            UNIFORM=uniform, **tile, **_COMPILE,
        )  # fmt: skip
    return out


def _line_layout(
    x: Tensor, grad: Tensor | None, z: Tensor | None, draws: bool
) -> tuple[int, int] | None:
    """(channels, pixels): how a chain divides into lines of evenly spaced elements in all tensors.

    (1, elements) if all chains are contiguous, the real channels and pixels if some chains are
    channels_last, and None if a chain is neither. z must be laid out as x is.
    """
    if z is not None and z.stride() != x.stride():
        return None
    tensors = [v for v in (x, grad) if v is not None]
    elements = x[0].numel()
    if all(_is_planar(v) for v in tensors):
        return 1, elements
    if not all(_is_planar(v) or _is_channels_last(v) for v in tensors):
        return None
    if not draws and all(v.stride() == x.stride() for v in tensors):
        return 1, elements  # the number of an element matters only to draw its noise
    pixels = elements // x.shape[1]
    return None if draws and pixels % 4 else (x.shape[1], pixels)


def _is_planar(v: Tensor) -> bool:
    return v.is_contiguous() or v[0].is_contiguous()


def _is_channels_last(v: Tensor) -> bool:
    return v.dim() > 2 and v[0].movedim(0, -1).is_contiguous()


def _strides(v: Tensor | None, channels: int, pixels: int) -> tuple[int, int, int]:
    """The strides between chains, channels and pixels, in elements."""
    if v is None:
        return 0, 0, 0
    if channels == 1:
        return v.stride(0), 0, 1
    return (v.stride(0), pixels, 1) if _is_planar(v) else (v.stride(0), 1, channels)


def _grid(
    chains: int, channels: int, pixels: int, itemsize: int
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The grid of programs (lines by pixels), and the shape of their tiles in powers of 2."""
    tile = _TILE_BYTES // itemsize
    if channels > 1:
        lines = min(_MAX_CHANNELS, power_of_2(channels))
        columns = min(tile // lines, max(4, power_of_2(pixels)))
        rows = chains * -(-channels // lines)
    else:
        columns = min(tile, max(4, power_of_2(pixels)))
        lines = tile // columns
        rows = -(-chains // lines)
    tiles = -(-pixels // columns)
    grid = rows, min(tiles, _MAX_GRID), -(-tiles // _MAX_GRID)
    return grid, {"LINES": lines, "PIXELS": columns}


def power_of_2(number: int) -> int:
    """The least power of 2 that is >= number."""
    return 1 << (number - 1).bit_length()


def coefficient(value: reference.Coefficient, x: Tensor) -> tuple[float, Tensor | None]:
    """A coefficient as a number and, if it is a tensor, float32 factors [n] of that number."""
    if not isinstance(value, Tensor):
        return float(value), None
    return 1.0, value.to(device=x.device, dtype=torch.float32).expand(x.shape[0]).contiguous()


def signed(number: int) -> int:
    """The low 32-bit word of a number, as the signed int32 with the same bits.

    For a number that needs another integer type, Triton would compile the kernel again.
    """
    return ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
