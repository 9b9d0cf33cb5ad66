"""The random number generator in plain torch, which specifies every random number.

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
from typing import NamedTuple

import torch
from torch import Tensor

LANGEVIN, INITIAL, DATA, ACCEPT, ORDER, USER, FOLD_IN = 0, 1, 2, 3, 4, 5, 255

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_MASK = 0xFFFFFFFF


class Address(NamedTuple):
    """Where the numbers of a batch are; its row i is chain first_chain + i."""

    seed: int
    step: int
    stream: int
    first_chain: int = 0


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
    address = Address(seed, step, stream, first_chain)
    u0, u1, u2, u3 = _block_uniforms(shape, address, device, dtype)
    radius = torch.stack((u0, u2), dim=-1).add_(2.0**-24).log_().mul_(-2.0).sqrt_()
    turn = torch.stack((u1, u3), dim=-1)
    # Half turns are removed exactly, so that the angle's rounding error is below 1.1e-7 in float32.
    half_turns = (turn * 2).round_()
    radius *= 1 - 2 * (half_turns == 1).to(dtype)
    angle = (turn - half_turns / 2).mul_(2 * math.pi)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return _cut_to_chains(pairs, shape)


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
    units = _block_uniforms(shape, Address(seed, step, stream, first_chain), device, dtype)
    return _cut_to_chains(torch.stack(units, dim=-1), shape)


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
    address = Address(seed, step, stream, first_chain)
    return _cut_to_chains(torch.stack(_words(shape, address, device), dim=-1), shape)


def philox(counter: tuple, seed: int) -> tuple:
    """Philox4x32-10 of four counter words, each an int or an int64 tensor in [0, 2**32).

    Tensors broadcast. 64-bit products wrap around in int64, which preserves all their bits.
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


def check_request(shape: Sequence[int], address: Address) -> Address:
    """The address in Python ints; TypeError or ValueError if ``shape`` does not fit there."""
    if len(shape) == 0:
        raise ValueError("noise: shape must have a leading chain dimension, got ()")
    seed = check_seed(address.seed)
    first_chain, step = check_address(address.first_chain, shape[0], address.step, 1)
    check_range("the number of blocks of four elements", -(-math.prod(shape[1:]) // 4), 32)
    return Address(seed, step, check_range("stream", address.stream, 32), first_chain)


def check_seed(seed: int) -> int:
    """``seed`` as a Python int; ValueError unless it is an integer in [0, 2**64)."""
    return check_range("seed", seed, 64)


def check_address(first_chain: int, chains: int, first_step: int, steps: int) -> tuple[int, int]:
    """(first_chain, first_step) as Python ints; ValueError unless all numbers fit 32-bit words."""
    first_chain = check_range("first_chain", first_chain, 32)
    first_step = check_range("step", first_step, 32)
    check_range("the last chain", first_chain + max(chains - 1, 0), 32)
    check_range("the last step", first_step + max(steps - 1, 0), 32)
    return first_chain, first_step


def _words(
    shape: Sequence[int], address: Address, device: torch.device | str | None
) -> tuple[Tensor, ...]:
    """Words w0..w3 of every block, each int64 [n, ceil(elements / 4)]."""
    seed, step, stream, first_chain = check_request(shape, address)
    chains, blocks = shape[0], -(-math.prod(shape[1:]) // 4)
    # None means the CPU: torch's default device must not change the numbers.
    device = torch.device("cpu" if device is None else device)
    block = torch.arange(blocks, dtype=torch.int64, device=device)
    chain = torch.arange(first_chain, first_chain + chains, dtype=torch.int64, device=device)
    return philox((block[None, :], chain[:, None], step, stream), seed)


def _block_uniforms(
    shape: Sequence[int], address: Address, device: torch.device | str | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """u(w0)..u(w3) of every block, each [n, ceil(elements / 4)]."""
    words = _words(shape, address, device)
    return tuple((word >> 8).to(dtype).mul_(2.0**-24) for word in words)


def _cut_to_chains(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """Blocks [n, blocks, ...] cut to the elements of a chain and reshaped to ``shape``."""
    elements = math.prod(shape[1:])
    return blocks.flatten(1)[:, :elements].reshape(tuple(shape))


def check_range(name: str, value: int, bits: int) -> int:
    """The value as a Python int; TypeError or ValueError unless it is in [0, 2**bits)."""
    try:
        # operator.index would make torch.compile compile again for every number.
        number = value if isinstance(value, int) else operator.index(value)
    except TypeError:
        raise TypeError(f"noise: {name} must be an integer, got {value!r}") from None
    if not 0 <= number < 2**bits:
        raise ValueError(f"noise: {name} must be in [0, 2**{bits}), got {number}")
    return number
