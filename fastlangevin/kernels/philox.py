"""The generator of the noise contract in plain torch: the specification of every random number.

Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", constants of
Random123), keyed by a 64-bit seed, low word first, at the counter

    (element // 4, chain, step, stream)

The four words w0..w3 of a block belong to elements 4g..4g+3 of a chain, whose elements are counted
in logical (C, H, W) order:

    u(w) = (w >> 8) * 2**-24         in [0, 1)      v(w) = ((w >> 8) + 1) * 2**-24    in (0, 1]
    z0 = sqrt(-2 ln v(w0)) cos(2 pi u(w1))          z1 = sqrt(-2 ln v(w0)) sin(2 pi u(w1))

and z2, z3 likewise from w2, w3.
"""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

LANGEVIN, INITIAL, DATA, ACCEPT, ORDER, USER, FOLD_IN = 0, 1, 2, 3, 4, 5, 255

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def normal(
    shape: Sequence[int],
    seed: int,
    step: int,
    stream: int = LANGEVIN,
    first_chain: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals [n, ...]; see :func:`fastlangevin.noise.normal`."""
    u0, u1, u2, u3 = _units(shape, seed, step, stream, first_chain, device, dtype)
    radius = torch.stack((u0, u2), dim=-1).add_(2.0**-24).log_().mul_(-2.0).sqrt_()
    turn = torch.stack((u1, u3), dim=-1)
    # Half turns are taken out exactly, so that the angle's own rounding stays below 1.1e-7 in fp32.
    half_turns = (turn * 2).round_()
    radius *= 1 - 2 * (half_turns == 1).to(dtype)
    angle = (turn - half_turns / 2).mul_(2 * math.pi)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return _rows(pairs, shape)


def uniform(
    shape: Sequence[int],
    seed: int,
    step: int,
    stream: int = INITIAL,
    first_chain: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniforms [n, ...] in [0, 1); see :func:`fastlangevin.noise.uniform`."""
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
    """The 32-bit words behind :func:`uniform`, as int64 [n, ...] in [0, 2**32)."""
    return _rows(torch.stack(_words(shape, seed, step, stream, first_chain, device), -1), shape)


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


def check_request(
    shape: Sequence[int], seed: int, step: int, stream: int, first_chain: int
) -> tuple[int, int, int, int]:
    """Seed, step, stream and first chain as Python ints; errors where they address nothing."""
    if len(shape) == 0:
        raise ValueError("noise: shape must have a leading chain dimension, got ()")
    seed = check_seed(seed)
    first_chain, step = check_address(first_chain, shape[0], step, 1)
    check_range("the number of blocks of four elements", -(-math.prod(shape[1:]) // 4), 32)
    return seed, step, check_range("stream", stream, 32), first_chain


def check_seed(seed: int) -> int:
    """``seed`` as a Python int; ValueError unless it is an integer in [0, 2**64)."""
    return check_range("seed", seed, 64)


def check_address(first_chain: int, chains: int, first_step: int, steps: int) -> tuple[int, int]:
    """(first_chain, first_step) as Python ints; ValueError unless all of them fit 32-bit words."""
    first_chain = check_range("first_chain", first_chain, 32)
    first_step = check_range("step", first_step, 32)
    check_range("the last chain", first_chain + max(chains - 1, 0), 32)
    check_range("the last step", first_step + max(steps - 1, 0), 32)
    return first_chain, first_step


def _words(
    shape: Sequence[int],
    seed: int,
    step: int,
    stream: int,
    first_chain: int,
    device: torch.device | str | None,
) -> tuple[Tensor, ...]:
    """Words w0..w3 of every block, each int64 [n, ceil(elements / 4)]."""
    seed, step, stream, first_chain = check_request(shape, seed, step, stream, first_chain)
    chains, blocks = shape[0], -(-math.prod(shape[1:]) // 4)
    # None is the CPU: torch's default device must not change what is drawn.
    place, int64 = torch.device("cpu" if device is None else device), torch.int64
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


def check_range(name: str, value: int, bits: int) -> int:
    try:
        # torch.compile would compile anew for every number that operator.index sees.
        number = value if isinstance(value, int) else operator.index(value)
    except TypeError:
        raise TypeError(f"noise: {name} must be an integer, got {value!r}") from None
    if not 0 <= number < 2**bits:
        raise ValueError(f"noise: {name} must be in [0, 2**{bits}), got {number}")
    return number
