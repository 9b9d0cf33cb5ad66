"""The noise contract: every random number is a pure function of where it is used.

A number is addressed by (seed, stream, chain, step, element), and nothing else enters: not the
batch, the device, the dtype of the network, the number of threads or the memory format.
:mod:`fastlangevin.kernels.philox` defines the numbers; the functions here take them from the
fastest kernel that runs on a device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlangevin.kernels import extension, triton
from fastlangevin.kernels.memory import has_values
from fastlangevin.kernels.philox import (
    ACCEPT,
    DATA,
    FOLD_IN,
    INITIAL,
    LANGEVIN,
    ORDER,
    USER,
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
    """Standard normals [n, ...] of chains first_chain .. first_chain + n - 1 at one step.

    Row i, element e is the normal at (seed, stream, first_chain + i, step, e); |z| <= 5.77.
    ``dtype`` is float32 (within 2e-6 of the exact formula) or float64; ``device`` is the CPU unless
    given, whatever torch's default device. Draws nothing from torch's generators. Raises ValueError
    for a seed outside [0, 2**64) or an address word outside [0, 2**32).
    """
    address = dict(seed=seed, step=step, stream=stream, first_chain=first_chain)
    return _draw("normal", normal_ref, shape, address, device, dtype)


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
    """Uniforms [n, ...] in [0, 1), multiples of 2**-24, addressed as in :func:`normal`."""
    address = dict(seed=seed, step=step, stream=stream, first_chain=first_chain)
    return _draw("uniform", uniform_ref, shape, address, device, dtype)


def initial(
    shape: Sequence[int],
    *,
    seed: int,
    first_chain: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """U(-1, 1), float32 [n, ...]: p0, the states from which the seed's chains start.

    2 u - 1 with the uniforms of the stream of initial states at step 0.
    """
    return 2 * uniform(shape, seed=seed, step=0, first_chain=first_chain, device=device) - 1


def fold_in(seed: int, number: int) -> int:
    """A new 64-bit seed from a seed and a number in [0, 2**64).

    Words 0 and 1 (low, high) of the block at counter (number low, number high, 0, 255).
    """
    seed, number = check_seed(seed), check_range("number", number, 64)
    low, high, _, _ = philox((number & 0xFFFFFFFF, number >> 32, 0, FOLD_IN), seed)
    return int(low) | int(high) << 32


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A seed in [0, 2**63 - 1): one draw from ``generator``, by default from torch's own."""
    device = "cpu" if generator is None else generator.device
    drawn = torch.randint(2**63 - 1, (), dtype=torch.int64, generator=generator, device=device)
    # Under FakeTensorMode there is no number to read, and the noise will have none either.
    return int(drawn) if has_values(drawn) else 0


def _draw(
    kind: str,
    reference: Callable[..., Tensor],
    shape: Sequence[int],
    address: dict[str, Any],
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> Tensor:
    # Halves cannot hold 24 bits: uniforms would reach 1, and the normals' logarithm 0.
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"noise: dtype must be torch.float32 or torch.float64, got {dtype}")
    # None is the CPU: torch's default device must not change what is drawn.
    place = torch.device("cpu") if device is None else torch.device(device)
    kernels = _kernels(place) if dtype == torch.float32 else None
    if kernels is not None:
        seed, step, stream, first_chain = check_request(shape, **address)
        made: Tensor | None = getattr(kernels, kind)(
            shape, seed=seed, step=step, stream=stream, first_chain=first_chain, device=place
        )
        if made is not None:  # None under modes of torch's that make tensors without memory
            return made
    return reference(shape, **address, device=place, dtype=dtype)


def _kernels(device: torch.device) -> Any:
    """The module whose kernels fill float32 tensors on a device, or None."""
    if extension.available(device) is None:
        return extension
    # On a CPU Triton's kernels are interpreted: slower than plain torch.
    return triton if device.type != "cpu" and triton.available(device) is None else None
