"""The check of ``rng_state``, an argument of the kernels' step functions alone."""

import torch
from torch import Tensor

from fastlangevin.arguments import check_device

_OP = "langevin_step_"


def check_rng_state(x: Tensor, rng_state: Tensor, unread: str | None) -> None:
    """TypeError or ValueError unless ``rng_state`` holds {seed, step} where the kernels read it.

    ``unread`` is the reason why the kernels for x would not read it, or None. A step that ignored
    it would repeat the same noise at every replay of a captured graph.
    """
    if unread is not None:
        raise ValueError(f"{_OP}: rng_state cannot be used: {unread}")
    if not isinstance(rng_state, Tensor) or rng_state.dtype != torch.int64:
        raise TypeError(
            f"{_OP}: rng_state must be an int64 tensor, got "
            f"{getattr(rng_state, 'dtype', type(rng_state))}"
        )
    if rng_state.shape != (2,) or not rng_state.is_contiguous():
        raise ValueError(
            f"{_OP}: rng_state must be contiguous and of shape [2], got {list(rng_state.shape)}"
        )
    check_device(_OP, "rng_state", rng_state, x.device, "x")
