"""The step in the compiled extension: on the CPU, and on CUDA if it was built with nvcc.

It performs the operations of :mod:`fastlangevin.kernels.reference` with the same roundings, so that
a step with given noise equals the reference's bit for bit. Its own normals differ from the
reference's by less than 2e-6, and are equal on all instruction sets and GPUs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin.arguments import check_rng_state
from fastlangevin.kernels import extension, reference
from fastlangevin.kernels.extension import available
from fastlangevin.kernels.memory import all_in_memory

__all__ = ["Update", "available", "chain_", "launch", "reads", "step_"]

_OP = "langevin_step_"
_INF = float("inf")


class Update(NamedTuple):
    """One update of a chain's states; a step with noise before its gradient has two."""

    along_gradient: bool
    step_size: reference.Coefficient
    noise_std: reference.Coefficient
    step: int


def step_(
    x: Tensor,
    grad: Tensor | None,
    z: Tensor | None,
    *,
    step_size: reference.Coefficient,
    noise_std: reference.Coefficient,
    step: int,
    rng_state: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """:func:`reference.step_` on checked arguments, in place on x in any memory format.

    ``options`` are those of :class:`reference.StepOptions`.

    ``rng_state`` is an int64 tensor [2] on x's CUDA device: the seed, and a number that is added to
    ``step``. The kernel reads it when it runs, so that writing to it gives a replayed graph other
    noise. Raises ValueError if no CUDA kernel would read it.

    A float64 x, an x of more than MAX_DIMS dimensions and operands that are not
    :func:`~fastlangevin.kernels.memory.in_memory` fall back to the reference; a float64 grad or z
    is converted to float32 first. Returns x.
    """
    fallback = not (reads(x) and all_in_memory(x, grad, z, step_size, noise_std))
    if rng_state is not None:
        check_rng_state(_OP, x, rng_state, _why_unread(x, fallback))
    if fallback:
        return reference.step_(
            x, grad, z, step_size=step_size, noise_std=noise_std, step=step, **options
        )
    grad, z = _as_float(grad), _as_float(z)
    if z is not None and x.is_cuda:
        z = z.float()  # given noise is rare, and the CUDA kernels read it in float32 only
    # Converted values must stay alive until the kernel is launched.
    if isinstance(step_size, Tensor):
        step_size = _as_values(step_size, x)
    if isinstance(noise_std, Tensor):
        noise_std = _as_values(noise_std, x)
    launch(
        x, grad, z, _coefficient(step_size), _coefficient(noise_std), step,
        reference.StepOptions(**options), rng_state,
    )  # fmt: skip
    return x


def reads(tensor: Tensor) -> bool:
    """Whether :func:`launch` takes a tensor in memory as it is, without a conversion."""
    return tensor.dtype in extension.DTYPES and tensor.dim() <= extension.library.MAX_DIMS


def launch(
    x: Tensor,
    grad: Tensor | None,
    z: Tensor | None,
    step_size: float | tuple[int, int],
    noise_std: float | tuple[int, int],
    step: int,
    options: reference.StepOptions,
    rng_state: Tensor | None = None,
) -> None:
    """:func:`step_` on operands that the kernels read as they are, which is not checked.

    All tensors must be in memory. :func:`reads` must hold for x, grad and z, which for CUDA must be
    in float32. Coefficients are numbers, or addresses and strides of float32 values per chain.
    """
    dtypes = extension.DTYPES
    seed, first_chain, clamp, grad_clip, maximize, noise_last = options
    lo, hi = clamp or (-_INF, _INF)
    device, queue = extension.device_and_queue(x)
    # By position and without helpers, which would take longer than the kernel on a few elements.
    extension.library.langevin_step(
        x.shape,
        (x.data_ptr(), dtypes[x.dtype], x.stride()),
        None if grad is None else (grad.data_ptr(), dtypes[grad.dtype], grad.stride()),
        None if z is None else (z.data_ptr(), dtypes[z.dtype], z.stride()),
        step_size,
        noise_std,
        maximize,
        _INF if grad_clip is None else grad_clip,
        lo,
        hi,
        noise_last,
        z is None and noise_std != 0,
        seed,
        step,
        first_chain,
        0 if rng_state is None else rng_state.data_ptr(),
        device,
        queue,
    )
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def chain_(
    net: Any,
    operands: tuple[Any, ...],
    x: Tensor,
    grad: Tensor,
    updates: Sequence[Update],
    *,
    workspace: int,
    threads: int,
    **options: Any,
) -> None:
    """Updates in turn, in place on x, each the same as :func:`step_` along the network's gradient.

    ``net`` is a ConvNet of the extension, ``operands`` are those of its ``score``, with grad as
    memory for the gradient. x and grad must be in memory and in float32, as must all tensors among
    the coefficients, in any floating dtype; :func:`reads` must hold for x. ``options`` are those of
    :class:`reference.StepOptions`.
    """
    seed, first_chain, clamp, grad_clip, maximize, noise_last = reference.StepOptions(**options)
    lo, hi = clamp or (-_INF, _INF)
    # Converted values must stay alive until the kernels have run.
    values = [
        [_as_values(v, x) if isinstance(v, Tensor) else v for v in (u.step_size, u.noise_std)]
        for u in updates
    ]
    net.chain(
        operands,
        x.shape,
        x.stride(),
        grad.stride(),
        [
            (u.along_gradient, _coefficient(a), _coefficient(b), not reference.is_zero(b), u.step)
            for u, (a, b) in zip(updates, values, strict=True)
        ],
        maximize,
        _INF if grad_clip is None else grad_clip,
        lo,
        hi,
        noise_last,
        seed,
        first_chain,
        workspace,
        threads,
    )
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def _coefficient(value: reference.Coefficient) -> float | tuple[int, int]:
    """A number, or the address and stride of float32 values per chain."""
    return (value.data_ptr(), value.dim()) if isinstance(value, Tensor) else value


def _why_unread(x: Tensor, fallback: bool) -> str | None:
    if not x.is_cuda:
        return f"only CUDA kernels read it, and x is on {x.device}"
    if not fallback:
        return None
    return (
        f"x of {x.dtype} and {x.dim()} dimensions, or an operand that is not in memory, falls back "
        "to the reference"
    )


def _as_float(value: Tensor | None) -> Tensor | None:
    return value if value is None or value.dtype in extension.DTYPES else value.float()


def _as_values(value: Tensor, x: Tensor) -> Tensor:
    """Coefficients per chain as the kernels read them: float32, contiguous, on x's device."""
    return value.to(device=x.device, dtype=torch.float32).contiguous()
