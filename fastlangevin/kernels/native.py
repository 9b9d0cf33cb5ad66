"""The step by the compiled extension: on the CPU, and on CUDA where it was built with nvcc.

It computes the operations of :mod:`fastlangevin.kernels.reference` with the same roundings, so that
a step with given noise is equal to the reference's bit for bit. Its own normals differ from the
reference's by less than the contract's 2e-6, and are equal on all instruction sets and GPUs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlangevin.kernels import extension, reference
from fastlangevin.kernels.checks import check_outputs, check_state
from fastlangevin.kernels.extension import available
from fastlangevin.kernels.memory import all_in_memory, in_memory

__all__ = ["available", "step_"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INF = float("inf")


def step_(
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
    joined: bool = False,
    out: Tensor | None = None,
    cast: Tensor | None = None,
    state: Tensor | None = None,
) -> Tensor:
    """:func:`reference.step_` on checked arguments: in place on x, in any memory format.

    ``out``, ``cast`` and ``joined`` are as there. ``state``: int64 [2] on x's CUDA device, the seed
    and a number added to ``step``, read when the kernel runs; a captured graph is replayed with
    other noise by writing to it. ValueError where no CUDA kernel would read it.

    A float64 x, an x of more than MAX_DIMS dimensions and operands that are not
    :func:`~fastlangevin.kernels.memory.in_memory` go through the reference; a float64 grad or z is
    copied to float32. Returns x, or ``out``.
    """
    operands = x, grad, z, step_size, noise_std, out, cast
    detour = (
        x.dtype not in _DTYPES
        or x.dim() > extension.library.MAX_DIMS
        or not all_in_memory(*operands)
    )
    if state is not None:
        check_state(x, state, _why_unread(x, detour))
    if detour:
        return reference.step_(
            x, grad, z, joined=joined, out=out, cast=cast, step_size=step_size,
            noise_std=noise_std, seed=seed, step=step, first_chain=first_chain, clamp=clamp,
            grad_clip=grad_clip, maximize=maximize, noise_last=noise_last,
        )  # fmt: skip
    if out is not None or cast is not None:
        check_outputs(x, out, cast)
    lo, hi = clamp or (-_INF, _INF)
    grad, z = _as_float(grad), _as_float(z)
    if z is not None and x.is_cuda:
        z = z.float()  # the CUDA kernels read given noise, a rarity, in float32 only
    if isinstance(step_size, Tensor):
        step_size = _as_values(step_size, x)
    if isinstance(noise_std, Tensor):
        noise_std = _as_values(noise_std, x)
    device, queue = extension.device_and_queue(x)
    extension.library.langevin_step(
        x.shape,
        (x.data_ptr(), _DTYPES[x.dtype], x.stride()),
        None if out is None else (out.data_ptr(), _DTYPES[out.dtype], out.stride()),
        None if grad is None else (grad.data_ptr(), _DTYPES[grad.dtype], grad.stride()),
        None if z is None else (z.data_ptr(), _DTYPES[z.dtype], z.stride()),
        None if cast is None else (cast.data_ptr(), _DTYPES[cast.dtype], cast.stride()),
        (step_size.data_ptr(), step_size.dim()) if isinstance(step_size, Tensor) else step_size,
        (noise_std.data_ptr(), noise_std.dim()) if isinstance(noise_std, Tensor) else noise_std,
        maximize,
        _INF if grad_clip is None else grad_clip,
        lo,
        hi,
        noise_last or joined,
        joined,
        z is None and (isinstance(noise_std, Tensor) or noise_std != 0),
        seed,
        step,
        first_chain,
        0 if state is None else state.data_ptr(),
        device,
        queue,
    )
    written = x if out is None else out
    for changed in (written,) if cast is None else (written, cast):
        if not changed.is_inference():
            torch.autograd.graph.increment_version(changed)
    return written


def bind(
    x: Tensor,
    *,
    seed: int,
    first_chain: int,
    clamp: tuple[float, float] | None,
    grad_clip: float | None,
    maximize: bool,
    noise_last: bool,
) -> Callable[[Tensor | None, float, float, int], Tensor] | None:
    """:func:`step_` on one x, in place, as a function of (grad, step_size, noise_std, step).

    What stays the same from step to step is read here, once: x must keep its memory meanwhile. The
    function draws its own noise; its coefficients are numbers, its step a checked integer, and its
    gradient must be in memory. None for an x that goes through the reference.
    """
    if x.dtype not in _DTYPES or x.dim() > extension.library.MAX_DIMS or not in_memory(x):
        return None
    run, shape, bits = extension.library.langevin_step, x.shape, _DTYPES
    state = x.data_ptr(), bits[x.dtype], x.stride()
    lo, hi = clamp or (-_INF, _INF)
    clip = _INF if grad_clip is None else grad_clip
    device_and_queue = extension.device_and_queue
    counted, count = not x.is_inference(), torch.autograd.graph.increment_version

    def bound(grad: Tensor | None, step_size: float, noise_std: float, step: int) -> Tensor:
        operand = None
        if grad is not None:
            g = grad if grad.dtype in bits else grad.float()
            operand = g.data_ptr(), bits[g.dtype], g.stride()
        device, queue = device_and_queue(x)
        run(
            shape, state, None, operand, None, None, step_size, noise_std, maximize, clip, lo, hi,
            noise_last, False, noise_std != 0, seed, step, first_chain, 0, device, queue,
        )  # fmt: skip
        if counted:
            count(x)
        return x

    return bound


def _why_unread(x: Tensor, detour: bool) -> str | None:
    if not x.is_cuda:
        return f"only CUDA kernels read it, and x is on {x.device}"
    if not detour:
        return None
    return (
        f"x of {x.dtype} and {x.dim()} dimensions, or an operand that is not in memory, goes "
        "through the reference"
    )


def _as_float(value: Tensor | None) -> Tensor | None:
    return value if value is None or value.dtype in _DTYPES else value.float()


def _as_values(value: Tensor, x: Tensor) -> Tensor:
    """Per-chain coefficients as the kernels read them: float32, contiguous, where x is."""
    return value.to(device=x.device, dtype=torch.float32).contiguous()
