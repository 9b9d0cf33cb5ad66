"""Checks of ``rng_state``, which only the backends' own step functions accept."""

import torch
from torch import Tensor

_OP = "langevin_step_"


def check_rng_state(x: Tensor, rng_state: Tensor | None, unread: str | None) -> None:
    """TypeError or ValueError unless ``rng_state`` holds {seed, step} where kernels read it.

    ``unread``: why the kernels for x would not read it, or None. Ignoring it would repeat the same
    noise at every replay of a captured graph.
    """
    if rng_state is None:
        return
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
    if rng_state.device != x.device:
        raise ValueError(
            f"{_OP}: rng_state must be on x's device {x.device}, got {rng_state.device}"
        )
