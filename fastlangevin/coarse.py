"""Coarse to fine: chains that start from the enlarged samples of a model of smaller images."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

import fastlangevin.noise as _noise

_START = 2**42  # folded into a seed, for the noise of the chains of smaller images
_PASSES = 6  # Every pass of the enlargement halves the error, roughly.


def check_shapes(op: str, small: Sequence[int] | None, shape: Sequence[int] | None) -> None:
    """Raise ValueError unless images of the shape ``small`` can be enlarged to ``shape``.

    None is a shape that is not known yet.
    """
    for whose, sizes in (("the start's", small), ("the energy's", shape)):
        if sizes is not None and (len(sizes) != 3 or not all(isinstance(s, int) for s in sizes)):
            raise ValueError(
                f"{op}: a start needs images [C, H, W], but {whose} shape is {sizes!r}"
            )
    if small is None or shape is None:
        return
    if small[0] != shape[0] or small[1] > shape[1] or small[2] > shape[2]:
        raise ValueError(
            f"{op}: the start's images {list(small)} must have the channels of the energy's "
            f"{list(shape)}, and at most its size"
        )


def enlarged_samples(
    op: str,
    start: Callable[..., Tensor],
    shape: Sequence[int],
    n: int,
    seed: int,
    first_chain: int,
    device: torch.device | None,
) -> Tensor:
    """Return n samples of ``start``, kept in [-1, 1] and enlarged to images of ``shape``.

    Row i is a function of (seed, first_chain + i).
    """
    samples: Any = start(n=n, seed=start_seed(seed), first_chain=first_chain)
    check_shapes(op, tuple(samples.shape[1:]), shape)
    return enlarged(samples, shape).to(device or "cpu")


def start_seed(seed: int) -> int:
    """Return the seed of the start's chains, for the seed of chains that begin at their ends."""
    return _noise.fold_in(seed, _START)


def enlarged(small: Tensor, shape: Sequence[int]) -> Tensor:
    """Return images [n, C, h, w], kept in [-1, 1] and enlarged to [n, *shape].

    Bicubic interpolation alone blurs: reduced again, its images are not the small ones. What is
    missing is therefore enlarged and added, u <- u + B(s - R u), where B enlarges bicubically and R
    reduces bicubically, as images of data are reduced. The result is kept in [-1, 1], which it
    exceeds at edges.
    """
    precise = torch.promote_types(small.dtype, torch.float32)
    bounded = small.to(precise).clamp(-1.0, 1.0).contiguous()
    size, small_size = tuple(shape[1:]), tuple(small.shape[2:])
    large = torch.zeros(*small.shape[:2], *size, dtype=precise, device=small.device)
    for _ in range(_PASSES):
        reduced = interpolate(large, size=small_size, mode="bicubic", antialias=True)
        large += interpolate(bounded - reduced, size=size, mode="bicubic")
    return large.clamp(-1.0, 1.0).to(small.dtype)
