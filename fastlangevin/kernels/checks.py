"""Checks of what only the backends' own step functions accept: out, cast and state."""

import torch
from torch import Tensor

CAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OP = "langevin_step_"


def check_outputs(x: Tensor, out: Tensor | None, cast: Tensor | None) -> None:
    """TypeError or ValueError unless ``out`` can take x's place, and ``cast`` its values."""
    for name, value in (("out", out), ("cast", cast)):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{_OP}: {name} must be a tensor, got {type(value).__name__}")
        if value.shape != x.shape:
            raise ValueError(
                f"{_OP}: {name} must have x's shape {list(x.shape)}, got {list(value.shape)}"
            )
        if value.device != x.device:
            raise ValueError(f"{_OP}: {name} must be on x's device {x.device}, got {value.device}")
        if any(s == 0 and n > 1 for s, n in zip(value.stride(), value.shape, strict=True)):
            raise ValueError(f"{_OP}: {name} is an expanded view (stride 0); use {name}.clone()")
    if out is not None and out.dtype != x.dtype:
        raise TypeError(f"{_OP}: out must be of x's dtype {x.dtype}, got {out.dtype}")
    if cast is not None and cast.dtype not in CAST_DTYPES:
        raise TypeError(
            f"{_OP}: cast must be of dtype float32, bfloat16 or float16, got {cast.dtype}"
        )


def check_state(x: Tensor, state: Tensor | None, unread: str | None) -> None:
    """TypeError or ValueError unless ``state`` holds a seed and a step that kernels will read.

    ``unread``: why those that serve x would not read it. To go on without it would repeat one noise
    at every replay of a graph.
    """
    if state is None:
        return
    if unread is not None:
        raise ValueError(f"{_OP}: state cannot be used: {unread}")
    if not isinstance(state, Tensor) or state.dtype != torch.int64:
        raise TypeError(
            f"{_OP}: state must be an int64 tensor, got {getattr(state, 'dtype', type(state))}"
        )
    if state.shape != (2,) or not state.is_contiguous():
        raise ValueError(
            f"{_OP}: state must be contiguous and of shape [2], got {list(state.shape)}"
        )
    if state.device != x.device:
        raise ValueError(f"{_OP}: state must be on x's device {x.device}, got {state.device}")
