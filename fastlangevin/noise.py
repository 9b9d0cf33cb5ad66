"""The noise contract: every random number is a pure function of where it is used.

A number is addressed by (seed, stream, chain, step, element). The generator is Philox4x32-10
(Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", constants of Random123):

    key     = the 64-bit seed, low word first
    counter = (element // 4, chain, step, stream)

The four words w0..w3 of a block serve elements 4g..4g+3 of the chain, elements being counted in
logical (C, H, W) order:

    u(w) = (w >> 8) * 2**-24         in [0, 1)      v(w) = ((w >> 8) + 1) * 2**-24    in (0, 1]
    z0 = sqrt(-2 ln v(w0)) cos(2 pi u(w1))          z1 = sqrt(-2 ln v(w0)) sin(2 pi u(w1))

and z2, z3 alike from w2, w3. Nothing else enters: not the batch, the device, the dtype of the
network, the number of threads or the memory format.
"""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlangevin.kernels import extension
from fastlangevin.kernels.memory import has_values

LANGEVIN, INITIAL, DATA, ACCEPT, ORDER, USER, FOLD_IN = 0, 1, 2, 3, 4, 5, 255

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_MASK = 0xFFFFFFFF


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
    _check_dtype(dtype)
    if (place := _native_device(device, dtype)) is not None:
        seed, step, stream, first_chain = _check_request(shape, seed, step, stream, first_chain)
        made = extension.normal(
            shape, seed=seed, step=step, stream=stream, first_chain=first_chain, device=place
        )
        if made is not None:
            return made
    return normal_ref(shape, seed, step, stream, first_chain, device, dtype)


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
    _check_dtype(dtype)
    if (place := _native_device(device, dtype)) is not None:
        seed, step, stream, first_chain = _check_request(shape, seed, step, stream, first_chain)
        made = extension.uniform(
            shape, seed=seed, step=step, stream=stream, first_chain=first_chain, device=place
        )
        if made is not None:
            return made
    return uniform_ref(shape, seed, step, stream, first_chain, device, dtype)


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


def normal_ref(
    shape: Sequence[int],
    seed: int,
    step: int,
    stream: int = LANGEVIN,
    first_chain: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """:func:`normal` in plain torch: the specification that the kernels are held to."""
    u0, u1, u2, u3 = _units(shape, seed, step, stream, first_chain, device, dtype)
    radius = torch.stack((u0, u2), dim=-1).add_(2.0**-24).log_().mul_(-2.0).sqrt_()
    turn = torch.stack((u1, u3), dim=-1)
    # Half turns are taken out exactly, so that the angle's own rounding stays below 1.1e-7 in fp32.
    half_turns = (turn * 2).round_()
    radius *= 1 - 2 * (half_turns == 1).to(dtype)
    angle = (turn - half_turns / 2).mul_(2 * math.pi)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return _rows(pairs, shape)


def uniform_ref(
    shape: Sequence[int],
    seed: int,
    step: int,
    stream: int = INITIAL,
    first_chain: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """:func:`uniform` in plain torch."""
    units = _units(shape, seed, step, stream, first_chain, device, dtype)
    return _rows(torch.stack(units, dim=-1), shape)


def words(
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    stream: int,
    first_chain: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The raw 32-bit words behind :func:`uniform`, as int64 [n, ...] in [0, 2**32)."""
    return _rows(torch.stack(_words(shape, seed, step, stream, first_chain, device), -1), shape)


def fold_in(seed: int, number: int) -> int:
    """A new 64-bit seed from a seed and a number in [0, 2**64).

    Words 0 and 1 (low, high) of the block at counter (number low, number high, 0, 255).
    """
    seed, number = check_seed(seed), _check_range("number", number, 64)
    low, high, _, _ = philox((number & _MASK, number >> 32, 0, FOLD_IN), seed)
    return int(low) | int(high) << 32


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A seed in [0, 2**63 - 1): one draw from ``generator``, by default from torch's own."""
    device = "cpu" if generator is None else generator.device
    drawn = torch.randint(2**63 - 1, (), dtype=torch.int64, generator=generator, device=device)
    # Under FakeTensorMode there is no number to read, and the noise will have none either.
    return int(drawn) if has_values(drawn) else 0


def check_seed(seed: int) -> int:
    """``seed`` as a Python int; ValueError unless it is an integer in [0, 2**64)."""
    return _check_range("seed", seed, 64)


def check_address(first_chain: int, chains: int, first_step: int, steps: int) -> tuple[int, int]:
    """(first_chain, first_step) as Python ints; ValueError unless all of them fit 32-bit words."""
    first_chain = _check_range("first_chain", first_chain, 32)
    first_step = _check_range("step", first_step, 32)
    _check_range("the last chain", first_chain + max(chains - 1, 0), 32)
    _check_range("the last step", first_step + max(steps - 1, 0), 32)
    return first_chain, first_step


def philox(counter: tuple, seed: int) -> tuple:
    """Philox4x32-10 of four counter words, each an int or an int64 tensor in [0, 2**32).

    Tensors broadcast. 64-bit products wrap around in int64, which keeps all their bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> 32 & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _check_request(
    shape: Sequence[int], seed: int, step: int, stream: int, first_chain: int
) -> tuple[int, int, int, int]:
    """Seed, step, stream and first chain as Python ints; errors where they address nothing."""
    if len(shape) == 0:
        raise ValueError("noise: shape must have a leading chain dimension, got ()")
    seed = check_seed(seed)
    first_chain, step = check_address(first_chain, shape[0], step, 1)
    _check_range("the number of blocks of four elements", -(-math.prod(shape[1:]) // 4), 32)
    return seed, step, _check_range("stream", stream, 32), first_chain


def _check_dtype(dtype: torch.dtype) -> None:
    # Halves cannot hold 24 bits: uniforms would reach 1, and the normals' logarithm 0.
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"noise: dtype must be torch.float32 or torch.float64, got {dtype}")


def _native_device(device: torch.device | str | None, dtype: torch.dtype) -> torch.device | None:
    """The device as such where the native kernels make its float32 numbers, else None."""
    place = _place(device)
    return place if dtype == torch.float32 and extension.available(place) is None else None


def _place(device: torch.device | str | None) -> torch.device:
    """A device as such. None is the CPU: torch's default device must not change what is drawn."""
    return torch.device("cpu") if device is None else torch.device(device)


def _words(
    shape: Sequence[int],
    seed: int,
    step: int,
    stream: int,
    first_chain: int,
    device: torch.device | str | None,
) -> tuple[Tensor, ...]:
    """Words w0..w3 of every block, each int64 [n, ceil(elements / 4)]."""
    seed, step, stream, first_chain = _check_request(shape, seed, step, stream, first_chain)
    chains, blocks = shape[0], -(-math.prod(shape[1:]) // 4)
    place, int64 = _place(device), torch.int64
    block = torch.arange(blocks, dtype=int64, device=place)[None, :]
    chain = torch.arange(first_chain, first_chain + chains, dtype=int64, device=place)[:, None]
    return philox((block, chain, step, stream), seed)


def _units(
    shape: Sequence[int],
    seed: int,
    step: int,
    stream: int,
    first_chain: int,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """u(w0)..u(w3) of every block, each [n, ceil(elements / 4)]."""
    rounds = _words(shape, seed, step, stream, first_chain, device)
    return tuple((word >> 8).to(dtype).mul_(2.0**-24) for word in rounds)


def _rows(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """Cut [n, blocks, ...] to the chain's elements and give it its shape."""
    elements = math.prod(shape[1:])
    return blocks.flatten(1)[:, :elements].reshape(tuple(shape))


def _check_range(name: str, value: int, bits: int) -> int:
    try:
        # torch.compile would compile anew for every number that operator.index sees.
        number = value if isinstance(value, int) else operator.index(value)
    except TypeError:
        raise TypeError(f"noise: {name} must be an integer, got {value!r}") from None
    if not 0 <= number < 2**bits:
        raise ValueError(f"noise: {name} must be in [0, 2**{bits}), got {number}")
    return number
