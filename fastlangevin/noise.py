"""The noise: every random number is a pure function of its address.

The address is (seed, stream, chain, step, element). Nothing else has an influence: not the batch,
the device, the dtype of the network, the number of threads or the memory format.
:mod:`fastlangevin.kernels.philox` defines the numbers; the functions here compute them with the
fastest kernel that can run on a device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlangevin.kernels import extension, triton_backend
from fastlangevin.kernels.memory import has_values
from fastlangevin.kernels.philox import (
    ACCEPT,
    DATA,
    FOLD_IN,
    INITIAL,
    LANGEVIN,
    ORDER,
    USER,
    Address,
    check_address,
    check_range,
    check_request,
    check_seed,
    philox,
    words,
)
from fastlangevin.kernels.philox import normal as normal_ref
from fastlangevin.kernels.philox import uniform as uniform_ref

__all__ = [
    "ACCEPT",
    "DATA",
    "FOLD_IN",
    "INITIAL",
    "LANGEVIN",
    "ORDER",
    "USER",
    "check_address",
    "check_seed",
    "draw_seed",
    "fold_in",
    "initial",
    "normal",
    "normal_ref",
    "philox",
    "uniform",
    "uniform_ref",
    "words",
]


def normal(
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    stream: int = LANGEVIN,
    first_chain: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals [n, ...] of chains first_chain, ..., first_chain + n - 1 at one step.

    Element e of row i is the normal at (seed, stream, first_chain + i, step, e); |z| <= 5.77.

    Args:
        shape: [n, ...], at most 2**34 elements per chain.
        seed: An integer in [0, 2**64).
        step, stream, first_chain: Integers in [0, 2**32).
        device: The CPU by default, even if torch has another default device.
        dtype: torch.float32 (within 2e-6 of the exact formula) or torch.float64.

    Raises TypeError or ValueError for other arguments. torch's generators are left alone.
    """
    return _draw(shape, Address(seed, step, stream, first_chain), device, dtype, uniform=False)


def uniform(
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    stream: int = INITIAL,
    first_chain: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniforms [n, ...] in [0, 1), multiples of 2**-24; arguments as for :func:`normal`."""
    return _draw(shape, Address(seed, step, stream, first_chain), device, dtype, uniform=True)


def initial(
    shape: Sequence[int],
    *,
    seed: int,
    first_chain: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The states [n, ...] from which the chains of a seed start: U(-1, 1), in float32.

    They are 2 u - 1, where u are the uniforms of the stream of initial states at step 0.
    """
    return 2 * uniform(shape, seed=seed, step=0, first_chain=first_chain, device=device) - 1


def fold_in(seed: int, number: int) -> int:
    """A new 64-bit seed, derived from a seed and a number in [0, 2**64).

    It consists of words 0 (low) and 1 (high) of the Philox block at the counter
    (low word of number, high word of number, 0, 255).
    """
    seed, number = check_seed(seed), check_range("number", number, 64)
    low, high, _, _ = philox((number & 0xFFFFFFFF, number >> 32, 0, FOLD_IN), seed)
    return int(low) | int(high) << 32


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A seed in [0, 2**63 - 1), drawn from ``generator`` or, by default, torch's own."""
    device = "cpu" if generator is None else generator.device
    drawn = torch.randint(2**63 - 1, (), dtype=torch.int64, generator=generator, device=device)
    # Under FakeTensorMode there is no number to read, and the noise has no values either.
    return int(drawn) if has_values(drawn) else 0


def _draw(
    shape: Sequence[int],
    address: Address,
    device: torch.device | str | None,
    dtype: torch.dtype,
    *,
    uniform: bool,
) -> Tensor:
    # Half precisions do not hold 24 bits: uniforms would reach 1, and normals the logarithm of 0.
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"noise: dtype must be torch.float32 or torch.float64, got {dtype}")
    # None means the CPU: torch's default device must not change the numbers.
    device = torch.device("cpu" if device is None else device)
    kernels = _kernels(device) if dtype == torch.float32 else None
    if kernels is not None:
        values: Tensor | None = kernels.fill(
            shape, check_request(shape, address), device, uniform=uniform
        )
        if values is not None:
            return values
    reference = uniform_ref if uniform else normal_ref
    return reference(shape, *address, device=device, dtype=dtype)


def _kernels(device: torch.device) -> Any:
    """The module whose ``fill`` makes float32 noise on a device, or None."""
    if extension.available(device) is None:
        return extension
    # On a CPU, Triton's interpreter is slower than plain torch.
    return (
        triton_backend
        if device.type != "cpu" and triton_backend.available(device) is None
        else None
    )
